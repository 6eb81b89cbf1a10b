"""POST /v1/messages, with an engine that says what a script says."""

from __future__ import annotations

import json

import pytest
from fake_model import byte_tokenizer

TOOLS = [{"name": "weather", "description": "Tells.", "input_schema": {"type": "object", "properties": {}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"a": 1}}\n</tool_call>'
HI = [{"role": "user", "content": "hi"}]
THINKS = {"reasoning_parser": "deepseek_r1"}


@pytest.fixture
def ask(make_engine, client_of):
    """Asks a server whose model says `script`; gives the engine too."""

    def send(script="", *, server=None, engine=None, **fields):
        made = make_engine(script=[script] if script else (), max_model_len=4096, **(engine or {}))
        client = client_of(made, **(server or {}))
        return made, client.post("/v1/messages", json={"messages": HI, "max_tokens": 500} | fields)

    return send


def whole(response):
    assert response.status_code == 200, response.text
    return response.json()


def events(response):
    """The data of every event, whose name must be its type."""
    assert response.status_code == 200, response.text
    found = []
    for frame in response.text.strip().split("\n\n"):
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def prompt_of(engine):
    return engine.tokenizer.decode(engine.seen[-1][0], skip_special_tokens=False)


def test_an_answer_is_a_message(ask):
    """A key that Anthropic's clients read and miss, or tokens counted twice."""
    engine, answer = ask("Rome", system="Be brief.", temperature=0.5, top_k=3, top_p=0.5, metadata={"user_id": "u"})
    message = whole(answer)
    assert message["id"].startswith("msg")
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "tiny")
    assert message["content"] == [{"type": "text", "text": "Rome", "citations": None}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    usage, (prompt, params) = message["usage"], engine.seen[-1]
    assert (usage["output_tokens"], usage["cache_read_input_tokens"]) == (4, 1)
    assert usage["cache_creation_input_tokens"] == len(prompt) // 16 * 16 - 1
    assert sum(count for name, count in usage.items() if "input" in name) == len(prompt)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.5, 3, 0.5, 500)
    assert prompt_of(engine).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi")
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


def test_without_a_prefix_cache_nothing_is_kept_in_one(ask):
    """Tokens told as kept for later that are computed again."""
    usage = whole(ask("Rome", engine={"enable_prefix_caching": False})[1])["usage"]
    assert usage["cache_creation_input_tokens"] == 0


def test_the_order_of_events_is_anthropics(ask):
    """Clients build the message from events, and fail on one that comes too early or not at all."""
    found = events(ask("Rom", stream=True)[1])
    assert [event["type"] for event in found] == [
        "message_start", "ping", "content_block_start", *["content_block_delta"] * 3, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    start = found[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert found[2] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": "", "citations": None},
    }
    assert [event["delta"] for event in found[3:6]] == [{"type": "text_delta", "text": one} for one in "Rom"]
    assert found[7]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    usage = found[7]["usage"]
    assert usage["output_tokens"] == 3
    told = [usage[name] for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")]
    assert start["usage"]["input_tokens"] == sum(told)


def test_calls_are_blocks_of_their_own(ask):
    """Arguments lost or torn, or a call that does not look like one to an agent."""
    message = whole(ask(f"Look.\n{CALL}", tools=TOOLS)[1])
    words, call = message["content"]
    assert (words["type"], words["text"].strip()) == ("text", "Look.")
    assert (call["type"], call["name"], call["input"], call["id"][:6]) == ("tool_use", "weather", {"a": 1}, "toolu_")
    assert message["stop_reason"] == "tool_use"
    found = events(ask(f"Look.\n{CALL}", tools=TOOLS, stream=True)[1])
    starts = [event for event in found if event["type"] == "content_block_start"]
    assert [(one["index"], one["content_block"]["type"]) for one in starts] == [(0, "text"), (1, "tool_use")]
    assert starts[1]["content_block"]["input"] == {}
    deltas = [event["delta"] for event in found if event["type"] == "content_block_delta" and event["index"] == 1]
    assert {delta["type"] for delta in deltas} == {"input_json_delta"}
    assert "".join(delta["partial_json"] for delta in deltas) == '{"a": 1}'
    assert [event["index"] for event in found if event["type"] == "content_block_stop"] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "max_tokens", "told"),
    [
        ('{"a": "Rome and more"}', 60, {"a": "Rome"}),
        ("5", 500, {"malformed_arguments": "5"}),
    ],
)
def test_what_is_no_object_is_told_as_far_as_it_goes(ask, arguments, max_tokens, told):
    """A call that was cut off, or that is nonsense, told as if it were one without arguments."""
    said = f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'
    if max_tokens < 500:
        max_tokens = said.index(" and more")
    message = whole(ask(said, tools=TOOLS, max_tokens=max_tokens)[1])
    assert message["content"][-1]["input"] == told
    assert message["stop_reason"] == ("max_tokens" if max_tokens < 500 else "tool_use")


def test_one_call_at_a_time(ask):
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = whole(ask(f"{CALL}\n{CALL}", tools=TOOLS, tool_choice=choice)[1])
    assert [block["type"] for block in message["content"]] == ["tool_use"]


@pytest.mark.parametrize(
    ("choice", "forced"),
    [({"type": "any"}, True), ({"type": "tool", "name": "weather"}, True), ({"type": "auto"}, False)],
)
def test_a_choice_of_tools_becomes_a_grammar(ask, choice, forced):
    """A call that was to be forced left to the model's mood."""
    engine, _answer = ask(CALL, tools=TOOLS, tool_choice=choice)
    structure = engine.seen[-1][1].structured_outputs
    assert (structure is not None and "weather" in structure.grammar) == forced
    if choice["type"] == "any":
        assert "{0,15}" in structure.grammar
        engine, _answer = ask(CALL, tools=TOOLS, tool_choice=choice | {"disable_parallel_tool_use": True})
        assert "{0,15}" not in engine.seen[-1][1].structured_outputs.grammar
    engine, _answer = ask("Rome", tools=TOOLS, tool_choice={"type": "none"})
    assert "weather" not in prompt_of(engine)


def test_thinking_is_a_block_before_the_words(ask):
    """Thoughts told as words, or told though the caller wants none."""
    message = whole(ask("hm</think>Rome", server=THINKS, thinking={"type": "enabled", "budget_tokens": 1024})[1])
    assert message["content"][0] == {"type": "thinking", "thinking": "hm", "signature": ""}
    assert message["content"][1]["text"] == "Rome"
    found = events(ask("hm</think>Rome", server=THINKS, stream=True)[1])
    assert "".join(event["delta"].get("thinking", "") for event in found if "delta" in event) == "hm"
    message = whole(ask("hm</think>Rome", server=THINKS, thinking={"type": "disabled"})[1])
    assert [block["type"] for block in message["content"]] == ["text"]
    _engine, answer = ask(thinking={"type": "enabled", "budget_tokens": 1024})
    assert (answer.status_code, "reasoning-parser" in answer.json()["error"]["message"]) == (400, True)


SWITCH = "{% for m in messages %}{{ m.content }}{% endfor %}[{{ enable_thinking }}]"


@pytest.mark.parametrize(("kind", "told"), [("adaptive", "True"), ("disabled", "False")])
def test_the_template_is_told_whether_to_think(make_engine, client_of, kind, told):
    engine = make_engine(tokenizer_=byte_tokenizer(chat_template=SWITCH))
    body = {"messages": HI, "max_tokens": 1, "thinking": {"type": kind}}
    assert client_of(engine).post("/v1/messages", json=body).status_code == 200
    assert prompt_of(engine) == f"hi[{told}]"


def test_stops_are_told_by_their_reason(ask):
    """An agent that takes a cut answer for a whole one."""
    message = whole(ask("Rome and more", stop_sequences=[" and"])[1])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", " and")
    assert message["content"][0]["text"] == "Rome"
    assert whole(ask("Rome", max_tokens=2)[1])["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(("stop", "reason"), [("Then", "tool_use"), ("1}", "stop_sequence")])
def test_a_stop_after_a_whole_call_does_not_hide_it(ask, stop, reason):
    """A call that no agent answers, or one that is run though it was cut short."""
    message = whole(ask(f"{CALL}\nThen", tools=TOOLS, stop_sequences=[stop])[1])
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, stop if reason == "stop_sequence" else None)


def test_max_tokens_may_lie_beyond_the_context(ask):
    """Clients that always ask for 32,000 tokens refused by every model with a short context."""
    engine, answer = ask("Rome", max_tokens=32_000)
    assert whole(answer)["stop_reason"] == "end_turn"
    assert engine.seen[-1][1].max_tokens is None
    _engine, answer = ask("Rome", messages=[{"role": "user", "content": "." * 5000}])
    assert answer.status_code == 400
    assert "maximum context length is 4096 tokens" in answer.json()["error"]["message"]


def test_a_conversation_becomes_messages(ask):
    """Blocks lost, in the wrong order, or a turn torn into several."""
    cached = {"cache_control": {"type": "ephemeral"}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"} | cached, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "Look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]} | cached,
                {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
                {"type": "text", "text": "so?"},
            ],
        },
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be kind."} | cached, {"type": "text", "text": "Be brief."}]
    engine, answer = ask("ok", messages=turns, system=system, tools=[TOOLS[0] | cached | {"type": "custom"}])
    assert answer.status_code == 200, answer.text
    _system, _begin, rest = prompt_of(engine).partition("<|im_start|>user")
    assert prompt_of(engine).startswith("<|im_start|>system\nBe kind.\nBe brief.\n\nYou can call")
    assert rest == (
        "\na\nb\nc<|im_end|>\n"
        f"<|im_start|>assistant\nLook.\n{CALL}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nError: no\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_answer_goes_on_with_a_final_message_of_the_model(ask):
    """A prefilled answer that is begun anew, or told twice."""
    engine, answer = ask(" Rome", messages=[*HI, {"role": "assistant", "content": "It is"}])
    assert whole(answer)["content"][0]["text"] == " Rome"
    assert prompt_of(engine).endswith("<|im_start|>assistant\nIt is")


def test_a_format_becomes_a_schema(ask):
    schema = {"type": "object"}
    for fields in (
        {"output_config": {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}},
        {"output_format": {"type": "json_schema", "schema": schema}},
    ):
        engine, answer = ask("{}", **fields)
        assert whole(answer)
        assert engine.seen[-1][1].structured_outputs.json == schema
        assert answer.headers.get("x-ignored-fields") == ("output_config.effort" if "output_config" in fields else None)


def test_count_tokens_counts_the_prompt(make_engine, client_of):
    """A count that is not the prompt's, one that is refused while asleep, or for a prompt that is too long."""
    engine = make_engine()
    client = client_of(engine)
    body = {"messages": HI, "system": "Be brief.", "tools": TOOLS, "max_tokens": 1}
    usage = whole(client.post("/v1/messages", json=body))["usage"]
    client.post("/sleep")
    asked = {name: value for name, value in body.items() if name != "max_tokens"}
    counted = whole(client.post("/v1/messages/count_tokens", json=asked))
    assert counted == {"input_tokens": sum(count for name, count in usage.items() if "input" in name)}
    long = client.post("/v1/messages/count_tokens", json={"messages": [{"role": "user", "content": "." * 5000}]})
    assert whole(long)["input_tokens"] > 5000


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": 5}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "'document'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'text'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "", "name": "", "input": {}}]}]},
         "'tool_use'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t",
                                                    "content": [{"type": "image"}]}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        ({"system": [{"type": "image"}]}, "'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "'other'"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"temperature": 101}, "temperature"),
        ({"stop_sequences": "x"}, "stop_sequences"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_unsupported_is_refused_by_name(ask, fields, named):
    """A field silently ignored, a 422, or an error that does not say which field."""
    engine, answer = ask(**fields)
    error = answer.json()
    assert (answer.status_code, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error")
    assert named in error["error"]["message"]
    assert error["request_id"] == answer.headers["x-request-id"]
    assert engine.seen == []


def test_unknown_fields_are_left_out_and_named(ask):
    assert ask("ok", colour=1)[1].headers["x-ignored-fields"] == "colour"


def test_every_error_has_anthropics_shape(make_engine, client_of):
    """An error of keys, models, JSON or HTTP itself that Anthropic's clients cannot read."""
    client = client_of(make_engine(), api_key="secret", max_json_bytes=1000)
    key = {"x-api-key": "secret"}
    for headers, found in (
        ({}, (401, "authentication_error")),
        ({"x-api-key": "wrong"}, (401, "authentication_error")),
        ({"x-api-key": "\xe4"}, (401, "authentication_error")),
        (key, (404, "not_found_error")),
        ({"Authorization": "Bearer secret"}, (404, "not_found_error")),
    ):
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            body = {"model": "other", "messages": HI, "max_tokens": 1}
            answer = client.post(
                path, json=body, headers={name: one.encode("latin-1") for name, one in headers.items()}
            )
            assert (answer.status_code, answer.json()["error"]["type"]) == found
            assert int(answer.headers["content-length"]) == len(answer.content)
    assert client.post("/v1/messages", content=b"{", headers=key).json()["error"]["type"] == "invalid_request_error"
    large = client.post("/v1/messages", content=b" " * 2000, headers=key | {"content-type": "application/json"})
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
    assert client.get("/v1/messages", headers=key).json()["error"]["type"] == "invalid_request_error"
    assert client.post("/v1/messages/batches", headers=key).json()["error"]["type"] == "not_found_error"
    assert "type" not in client.post("/v1/chat/completions", json={}, headers=key).json()


def test_a_waking_transport_sees_that_the_model_sleeps(client):
    """Anthropic's client left with the 503 of a model that its transport is there to wake."""
    from shuteye.client.answers import is_sleeping

    body = {"messages": HI, "max_tokens": 1}
    client.post("/sleep")
    asleep = client.post("/v1/messages", json=body)
    assert is_sleeping(asleep.status_code, asleep.content)
    client.post("/wake_up")
    client.post("/pause?mode=abort")
    paused = client.post("/v1/messages", json=body)
    assert paused.status_code == 503
    assert not is_sleeping(paused.status_code, paused.content)


def test_a_key_in_anthropics_header_opens_no_other_route(make_engine, client_of):
    """A door of its own for each header that a proxy may forget to strip."""
    client = client_of(make_engine(), api_key="secret")
    body = {"messages": HI, "max_tokens": 1}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        assert client.post(path, json=body, headers={"x-api-key": "secret"}).status_code == 200
    assert client.post("/v1/chat/completions", json=body, headers={"x-api-key": "secret"}).status_code == 401


@pytest.mark.parametrize("stream", [False, True])
def test_what_ends_the_engine_ends_the_message_with_an_error(ask, stream):
    """A stream that just ends, so that half a message looks like a whole one."""
    from shuteye.errors import EngineDead

    _engine, answer = ask("Rome", stream=stream, engine={"breakage": EngineDead("gone")})
    if stream:
        found = events(answer)
        assert found[-1]["error"] == {"type": "overloaded_error", "message": "gone"}
        assert "message_stop" not in [event["type"] for event in found]
    else:
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "gone")


@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_message_is_an_error(ask, stream):
    """An answer that a sleep cut short, told as one that the model ended."""
    _engine, answer = ask("Rome", stream=stream, engine={"aborts": True})
    error = events(answer)[-1]["error"] if stream else answer.json()["error"]
    assert answer.status_code == (200 if stream else 503)
    assert (error["type"], "aborted" in error["message"]) == ("overloaded_error", True)


def test_a_bug_of_ours_is_told_in_the_stream(ask):
    _engine, answer = ask("Rome", stream=True, engine={"breakage": ValueError("ours")})
    assert events(answer)[-1]["error"]["type"] == "api_error"
