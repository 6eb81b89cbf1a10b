"""POST /v1/responses, read by OpenAI's own types, with an engine that says what a script says."""

from __future__ import annotations

import json

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

TOOLS = [{"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"a": 1}}\n</tool_call>'
EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def ask(make_engine, client_of):
    """Asks a server whose model says `script`; gives the engine too."""

    def send(script="", *, server=None, **fields):
        engine = make_engine(script=[script] if script else (), max_model_len=4096)
        client = client_of(engine, **(server or {}))
        return engine, client.post("/v1/responses", json={"input": "hi"} | fields)

    return send


def whole(response):
    assert response.status_code == 200, response.text
    return Response.model_validate(response.json())


def events(response):
    """Every event, checked against OpenAI's type of it, numbered without a gap."""
    assert response.status_code == 200, response.text
    found = []
    for number, frame in enumerate(response.text.strip().split("\n\n")):
        kind, data = frame.split("\n")
        found.append(EVENT.validate_json(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1].type}"
        assert json.loads(data.removeprefix("data: "))["sequence_number"] == number
    return found


def prompt_of(engine):
    return engine.tokenizer.decode(engine.seen[-1][0], skip_special_tokens=False)


def test_an_answer_is_a_response(ask):
    """A field that OpenAI's type does not accept, or wrong counts."""
    engine, answer = ask("Rome", instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=50, temperature=0.5)
    response = whole(answer)
    assert response.id.startswith("resp")
    assert (response.status, response.output_text, response.model) == ("completed", "Rome", "tiny")
    assert response.output[0].status == "completed"
    assert (response.instructions, response.metadata, response.max_output_tokens) == ("Be brief.", {"a": "b"}, 50)
    assert (response.temperature, response.store, response.previous_response_id) == (0.5, False, None)
    assert response.usage.output_tokens == 4
    assert response.usage.total_tokens == response.usage.input_tokens + 4
    assert prompt_of(engine).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi")


def test_the_order_of_events_is_openais(ask):
    """Clients build the response from events and fail on one that comes too early."""
    found = events(ask("Rom", stream=True)[1])
    kinds = [event.type.removeprefix("response.") for event in found]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added",
        "output_text.delta", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert "".join(event.delta for event in found if event.type.endswith("text.delta")) == "Rom"
    assert found[0].response.output == []
    assert found[-1].response.output_text == "Rom"
    assert found[2].item.content == []
    assert {event.item_id for event in found[3:9]} == {found[-1].response.output[0].id}


def test_calls_are_items_of_their_own(ask):
    _engine, answer = ask(f"Look.\n{CALL}", tools=TOOLS)
    words, call = whole(answer).output
    assert (words.type, words.content[0].text) == ("message", "Look.")
    assert (call.type, call.name, json.loads(call.arguments), call.status) == (
        "function_call", "weather", {"a": 1}, "completed",
    )  # fmt: skip
    found = events(ask(f"Look.\n{CALL}", tools=TOOLS, stream=True)[1])
    kinds = [event.type.removeprefix("response.") for event in found]
    assert kinds.index("output_text.done") < kinds.index("function_call_arguments.delta")
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert found[-3].arguments == '{"a": 1}'
    assert [item.type for item in found[-1].response.output] == ["message", "function_call"]


def test_reasoning_is_an_item_before_the_message(ask):
    server = {"reasoning_parser": "deepseek_r1"}
    _engine, answer = ask("hm</think>Rome", server=server)
    response = whole(answer)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "hm"
    assert response.usage.output_tokens_details.reasoning_tokens == 2
    found = events(ask("hm</think>Rome", server=server, stream=True)[1])
    assert "".join(event.delta for event in found if event.type == "response.reasoning_text.delta") == "hm"


def test_what_is_cut_says_so(ask):
    """A response that claims to be complete."""
    response = whole(ask(max_output_tokens=3)[1])
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    assert events(ask(max_output_tokens=3, stream=True)[1])[-1].type == "response.incomplete"


def test_an_error_in_the_midst_of_a_stream_fails_the_response(make_engine, client_of):
    """A stream that just ends, or an event that clients do not know."""
    from shuteye.errors import EngineDead

    engine = make_engine(script=["Rome"], breakage=EngineDead("gone"))
    found = events(client_of(engine).post("/v1/responses", json={"input": "hi", "stream": True}))
    assert found[-1].type == "response.failed"
    assert (found[-1].response.status, found[-1].response.error.message) == ("failed", "gone")


def test_a_conversation_becomes_messages(ask):
    """Items lost, in the wrong order, or an answer torn into several messages."""
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
            "content": [{"type": "output_text", "text": "Look.", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]  # fmt: skip
    engine, answer = ask("ok", input=items)
    assert answer.status_code == 200, answer.text
    assert prompt_of(engine) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        '<|im_start|>assistant\nLook.\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_format_and_tool_choice_become_grammars(ask):
    schema = {"type": "object"}
    engine, _answer = ask("{}", text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}})
    assert engine.seen[-1][1].structured_outputs.json == schema
    engine, _answer = ask(CALL, tools=TOOLS, tool_choice={"type": "function", "name": "weather"})
    assert "weather" in engine.seen[-1][1].structured_outputs.grammar


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"temperature": 101}, "temperature"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_is_wrong_or_unsupported_is_refused_by_name(ask, fields, param):
    """A field silently ignored, a 422, or an error that does not say which field."""
    engine, answer = ask(**fields)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param
    assert engine.seen == []


def test_asleep_it_answers_by_policy_before_any_byte(make_engine, client_of):
    engine = make_engine()
    client = client_of(engine)
    client.post("/sleep")
    for stream in (False, True):
        answer = client.post("/v1/responses", json={"input": "hi", "stream": stream})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "ModelSleepingError")
