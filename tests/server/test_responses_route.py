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
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"previous_response": {}}, "previous_response"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"truncation": "sometimes"}, "truncation"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"n": 2}, "n"),
        ({"input": "a" * 5000}, "input"),
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


def test_a_model_without_the_tokens_of_reasoning_has_its_structure_at_once(ask):
    """A schema refused because of a flag that is for other models; or one that a model which must think never meets."""
    fields = {"text": {"format": {"type": "json_object"}}}
    engine, answer = ask("{}", **fields, server={"reasoning_parser": "qwen3"})
    assert whole(answer).output_text == "{}"
    assert engine.seen[-1][1].structured_outputs.starts_after is None
    _engine, answer = ask("{}", **fields, server={"reasoning_parser": "deepseek_r1"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text")


INCLUDE = {"include": ["reasoning.encrypted_content", "message.output_text.logprobs"]}


@pytest.mark.parametrize("script", ["Röme", "hm</think>Röme"])
def test_logprobs_are_those_of_the_words(ask, script):
    """Log-probabilities of reasoning among those of the message, or some lost with a character of several tokens."""
    server = {"reasoning_parser": "deepseek_r1"} if "think" in script else {}
    part = whole(ask(script, **INCLUDE, top_logprobs=2, server=server)[1]).output[-1].content[0]
    assert bytes(byte for one in part.logprobs for byte in one.bytes).decode() == part.text == "Röme"
    assert {len(one.top_logprobs) for one in part.logprobs} == {2}
    found = events(ask(script, **INCLUDE, top_logprobs=2, server=server, stream=True)[1])
    deltas = [event for event in found if event.type == "response.output_text.delta"]
    assert [len(event.logprobs) for event in deltas] == [1, 2, 1, 1]
    done = next(event for event in found if event.type == "response.output_text.done")
    assert [one.logprob for one in done.logprobs] == [one.logprob for one in part.logprobs]


def test_without_include_there_are_no_logprobs(ask):
    """Work for nothing, and events several times their size."""
    engine, answer = ask("Rome", include=["reasoning.encrypted_content"])
    assert whole(answer).output[0].content[0].logprobs == []
    assert engine.seen[-1][1].logprobs is None


def test_calls_have_no_logprobs_of_words(ask):
    """Tokens of a call told as if they were those of the text before it."""
    words, _call = whole(ask(f"Look.\n{CALL}", tools=TOOLS, **INCLUDE)[1]).output
    assert bytes(byte for one in words.content[0].logprobs for byte in one.bytes).decode().strip() == "Look."


def test_what_asks_for_nothing_here_is_accepted_and_named(ask, make_engine, client_of):
    """Clients refused over fields that change no answer, or a caller who is not told that nothing is kept."""
    fields = {"store": True, "reasoning": {"summary": "auto", "effort": "low"}, "max_tool_calls": 3, "cache_salt": "s"}
    engine, answer = ask("Rome", **fields)
    response = whole(answer)
    assert answer.headers["x-ignored-fields"] == "reasoning.effort, reasoning.summary, store"
    assert (response.store, response.max_tool_calls) == (False, 3)
    assert engine.seen[-1][1].cache_salt == "s"
    strict = client_of(make_engine(), strict_fields=True)
    for name, value in (("store", True), ("reasoning", {"summary": "auto"}), ("reasoning", {"effort": "low"})):
        refused = strict.post("/v1/responses", json={"input": "hi", name: value})
        assert (refused.status_code, refused.json()["error"]["param"].split(".")[0]) == (400, name)


def test_raw_messages_are_told_when_asked_for(ask):
    """RL clients that train on these very tokens."""
    engine, answer = ask("hm</think>Rome", enable_response_messages=True, server={"reasoning_parser": "deepseek_r1"})
    (given,), (said,) = answer.json()["input_messages"], answer.json()["output_messages"]
    assert tuple(given["tokens"]) == engine.seen[-1][0]
    assert given["message"] == prompt_of(engine)
    assert (said["message"], said["type"]) == ("hm</think>Rome", "raw_message_tokens")
    assert engine.tokenizer.decode(said["tokens"]) == "hm</think>Rome"


THINKS = "{% for m in messages %}[{{ m.role }}:{{ m.reasoning_content }}:{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize(
    "thought",
    [
        {"content": [{"type": "reasoning_text", "text": "hm"}]},
        {"summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "x"},
    ],
)
def test_reasoning_goes_to_its_place_in_the_template(make_engine, client_of, thought):
    """Thoughts lost for templates that read the other of their two names, or told as words."""
    from fake_model import byte_tokenizer

    engine = make_engine(tokenizer_=byte_tokenizer(chat_template=THINKS))
    said = {"role": "assistant", "content": "Rome"}
    items = [{"role": "user", "content": "?"}, {"type": "reasoning", "id": "rs_1", "summary": []} | thought, said]
    alone = [*items, {"type": "reasoning", "id": "rs_2"} | thought]
    for given, wanted in ((items, ""), (alone, "[assistant:hm:]")):
        answer = client_of(engine).post("/v1/responses", json={"input": given, "max_output_tokens": 1})
        assert answer.status_code == 200, answer.text
        assert prompt_of(engine) == f"[user::?][assistant:hm:Rome]{wanted}"
    assert ("input.encrypted_content" in answer.headers.get("x-ignored-fields", "")) == ("summary" in thought)


def turns(count, length=100):
    return [{"role": ("user", "assistant")[at % 2], "content": f"{at}" + "." * length} for at in range(count)]


def test_the_oldest_items_are_dropped_when_they_may_be(ask):
    """A conversation refused though it may be cut, cut more than needed, or one that loses its instructions."""
    items = [{"role": "developer", "content": "Be kind."}, *turns(101)]
    assert ask("ok", input=items)[1].json()["error"]["code"] == "context_length_exceeded"
    engine, answer = ask("ok", input=items, truncation="auto", instructions="Be brief.", max_output_tokens=96)
    assert whole(answer).truncation == "auto"
    prompt = prompt_of(engine)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>system\nBe kind.<|im_end|>\n")
    assert prompt.endswith("<|im_start|>user\n100" + "." * 100 + "<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.split("<|im_start|>")[3].startswith("user")
    room = 4096 - 96 - len(engine.seen[-1][0])
    assert 0 <= room < 2 * 120


def test_a_result_is_not_left_without_its_call(ask):
    """A conversation that begins with the result of a call that the model never sees."""
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
    first = {"role": "user", "content": "." * 4000}
    engine, answer = ask("ok", input=[first, call, result], truncation="auto")
    assert answer.status_code == 200, answer.text
    assert prompt_of(engine).startswith("<|im_start|>assistant\n<tool_call>")
    long_result = result | {"output": "." * 5000}
    _engine, answer = ask("ok", input=[first, call, long_result], truncation="auto")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_no_response_is_kept(client):
    """A client that is left to guess why its id leads nowhere."""
    client.post("/sleep")
    for ask_for in (client.get, client.delete):
        answer = ask_for("/v1/responses/resp_1")
        assert answer.status_code == 404
        assert "Response with id 'resp_1' not found" in answer.json()["error"]["message"]
    assert client.post("/v1/responses/resp_1/cancel").status_code == 404


def test_asleep_it_answers_by_policy_before_any_byte(make_engine, client_of):
    engine = make_engine()
    client = client_of(engine)
    client.post("/sleep")
    for stream in (False, True):
        answer = client.post("/v1/responses", json={"input": "hi", "stream": stream})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "ModelSleepingError")
