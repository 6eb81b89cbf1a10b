"""POST /v1/chat/completions."""

from __future__ import annotations

import pytest
from http_answers import error, events
from openai.types.chat import ChatCompletion, ChatCompletionChunk

ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
PROPERTIES = "structured_outputs.disable_additional_properties"


def test_answer_has_openais_shape(client):
    """A field that OpenAI's types do not accept, or a wrong count, would break every client."""
    body = client.post("/v1/chat/completions", json=ASK).json()
    parsed = ChatCompletion.model_validate(body)
    assert parsed.id.startswith("chatcmpl-")
    assert parsed.model == "tiny"
    assert parsed.object == "chat.completion"
    choice = parsed.choices[0]
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.message.content == "use"
    assert choice.logprobs is None
    assert parsed.usage.prompt_tokens == len("user\nhi\nassistant\n") + 3
    assert (parsed.usage.completion_tokens, parsed.usage.total_tokens) == (4, parsed.usage.prompt_tokens + 4)
    assert parsed.usage.prompt_tokens_details.cached_tokens == 1


def test_keys_that_vllm_always_sends_are_there(client):
    """Clients that read them as attributes, and fail where they are missing."""
    body = client.post("/v1/chat/completions", json=ASK).json()
    for name in ("prompt_logprobs", "prompt_token_ids", "service_tier", "system_fingerprint", "kv_transfer_params"):
        assert body[name] is None
    choice = body["choices"][0]
    assert (choice["token_ids"], choice["stop_reason"]) == (None, None)
    for name in ("refusal", "annotations", "audio", "function_call", "reasoning"):
        assert choice["message"][name] is None
    assert "tool_calls" not in choice["message"]  # nor with vLLM
    choice = client.post("/v1/completions", json={"prompt": "abc"}).json()["choices"][0]
    assert [choice[name] for name in ("prompt_logprobs", "prompt_token_ids", "token_ids")] == [None] * 3


def test_the_chunk_that_tells_the_role_counts_no_tokens(client):
    """Usage that runs ahead of what was sent."""
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = events(client.post("/v1/chat/completions", json=ASK | options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0
    assert counts[-1] == 4
    assert counts == sorted(counts)


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": True}])
def test_usage_is_forced_into_every_chunk(engine, client_of, options):
    """A gateway that counts tokens by chunks, as with vLLM's flag, and finds none in some."""
    client = client_of(engine, enable_force_include_usage=True)
    chunks = events(client.post("/v1/chat/completions", json=ASK | {"stream": True, "stream_options": options}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-2:], chunks[-1]["choices"]) == (0, [4, 4], [])


def test_stream_says_the_same_as_the_whole_answer(client):
    """Lost or doubled text in a stream."""
    ask = ASK | {"max_tokens": 30}
    whole = client.post("/v1/chat/completions", json=ask).json()["choices"][0]
    chunks = events(client.post("/v1/chat/completions", json=ask | {"stream": True}))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "length"
    assert all("usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_stream_begins_with_the_role(client):
    """Clients build the message from the first delta's role."""
    chunks = events(client.post("/v1/chat/completions", json=ASK | {"stream": True}))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])


def test_usage_comes_last_if_asked_for(client):
    """The usage chunk must be the last, have no choices, and all others say null."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(client.post("/v1/chat/completions", json=ASK | options))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_every_choice_opens_and_finishes_once(client):
    """Mixed-up indexes with n > 1."""
    chunks = events(client.post("/v1/chat/completions", json=ASK | {"stream": True, "n": 3}))
    by_index: dict[int, list[dict]] = {}
    for chunk in chunks:
        by_index.setdefault(chunk["choices"][0]["index"], []).append(chunk["choices"][0])
    whole = client.post("/v1/chat/completions", json=ASK | {"n": 3}).json()["choices"]
    assert sorted(by_index) == [choice["index"] for choice in whole] == [0, 1, 2]
    for index, choices in by_index.items():
        assert choices[0]["delta"]["role"] == "assistant"
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole[index]["message"]["content"]


def test_a_character_of_several_tokens_is_never_split(client):
    """Half a character in a delta reaches clients as U+FFFD."""
    ask = {"messages": [{"role": "user", "content": "é🙂"}], "max_tokens": 25}
    chunks = events(client.post("/v1/chat/completions", json=ask | {"stream": True}))
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "é" in deltas
    assert "🙂" in deltas
    assert all("\ufffd" not in delta for delta in deltas)


def test_logprobs_have_openais_chat_shape(client):
    """Chosen token first, the likeliest ones sorted, bytes that are right even within a character."""
    ask = {"messages": [{"role": "user", "content": "é"}], "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    body = client.post("/v1/chat/completions", json=ask).json()
    content = ChatCompletion.model_validate(body).choices[0].logprobs.content
    assert [entry.token for entry in content[:6]] == ["<|im_start|>", "u", "s", "e", "r", "\n"]
    assert [entry.token for entry in content[6:]] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert bytes(byte for entry in content[6:] for byte in entry.bytes).decode() == "é"
    for entry in content:
        ranked = [top.logprob for top in entry.top_logprobs]
        assert len(ranked) == 2
        assert ranked == sorted(ranked, reverse=True)


def test_logprobs_without_top_report_only_the_chosen(client):
    """`logprobs: true` alone must not be refused, nor report alternatives."""
    body = client.post("/v1/chat/completions", json=ASK | {"logprobs": True}).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    assert all(entry["top_logprobs"] == [] for entry in content)


def test_streamed_logprobs_are_those_of_the_whole_answer(client):
    """Log-probabilities lost with tokens that complete no text."""
    ask = {"messages": [{"role": "user", "content": "é"}], "max_tokens": 12, "logprobs": True, "top_logprobs": 1}
    whole = client.post("/v1/chat/completions", json=ask).json()["choices"][0]["logprobs"]["content"]
    chunks = events(client.post("/v1/chat/completions", json=ask | {"stream": True}))
    streamed = [entry for chunk in chunks if (got := chunk["choices"][0]["logprobs"]) for entry in got["content"]]
    assert streamed == whole


@pytest.mark.parametrize("role", ["system", "developer"])
def test_text_parts_and_developer_messages_are_rendered(client, engine, role):
    """Parts joined wrongly, or a role that the template does not know."""
    messages = [
        {"role": role, "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None, "annotations": []},
        {"role": "user", "content": "d"},
    ]
    assert client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).status_code == 200
    prompt = engine.tokenizer.decode(engine.seen[-1][0], skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_options_reach_the_template(client, engine):
    """`add_generation_prompt` and `chat_template_kwargs` dropped on the way."""
    extra = {"add_generation_prompt": False, "chat_template_kwargs": {"suffix": "END"}}
    assert client.post("/v1/chat/completions", json=ASK | extra).status_code == 200
    prompt = engine.tokenizer.decode(engine.seen[-1][0], skip_special_tokens=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\nEND"


def test_a_model_without_a_template_says_so(make_engine, client_of):
    """A crash, or an invented prompt format."""
    from fake_model import byte_tokenizer

    client = client_of(make_engine(tokenizer_=byte_tokenizer(chat_template=None)))
    found = error(client.post("/v1/chat/completions", json=ASK))
    assert (found["code"], found["param"]) == (400, "messages")


def test_sampling_fields_reach_the_engine(client, engine):
    """A field accepted and then forgotten."""
    said = {
        "temperature": 0.3, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 7, "stop": ["x", "y"], "stop_token_ids": [3],
        "ignore_eos": True, "include_stop_str_in_output": True, "min_tokens": 1, "skip_special_tokens": False, "n": 2,
    }  # fmt: skip
    assert client.post("/v1/chat/completions", json=ASK | said).status_code == 200
    params = engine.seen[-1][1]
    assert {name: getattr(params, name) for name in said} == said
    assert params.max_tokens == 4
    assert params.logprobs is None


def test_defaults_are_the_checkpoints_then_openais(make_engine, client_of):
    """Recommended sampling of the checkpoint ignored, or winning over the caller's."""
    engine = make_engine(default_sampling={"temperature": 0.2, "top_k": 40.0, "unknown": 1.0})
    client = client_of(engine)
    client.post("/v1/chat/completions", json=ASK)
    client.post("/v1/chat/completions", json=ASK | {"temperature": 0, "top_k": 1})
    (_, defaulted), (_, said) = engine.seen
    assert (defaulted.temperature, defaulted.top_k, defaulted.top_p) == (0.2, 40, 1.0)
    assert (said.temperature, said.top_k) == (0, 1)


def test_default_length_is_what_is_left_of_the_context(client, engine):
    """A chat cut at 16 tokens."""
    ask = {"messages": ASK["messages"]}
    body = client.post("/v1/chat/completions", json=ask).json()
    assert body["usage"]["total_tokens"] == engine.info.max_model_len
    client.post("/v1/chat/completions", json=ask | {"max_completion_tokens": 5, "max_tokens": None})
    assert engine.seen[-1][1].max_tokens == 5


def test_stop_string_ends_the_answer(client):
    """Text of, or after, the stop string shown; finish reason wrong."""
    choice = client.post("/v1/chat/completions", json=ASK | {"max_tokens": 50, "stop": "r\nh"}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("use", "stop")
    assert choice["stop_reason"] == "r\nh"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL], "structured_outputs": {"grammar": 'start: "a"'}}, "structured_outputs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_json"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"disable_additional_properties": True}}, PROPERTIES),
        ({"guided_choice": []}, "guided_choice"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"priority": 0.5}, "priority"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"documents": [{"title": "a", "text": "b"}]}, "documents"),
        ({"chat_template": "x"}, "chat_template"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"repetition_detection": {}}, "repetition_detection"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"spaces_between_special_tokens": False, "skip_special_tokens": False}, "spaces_between_special_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"reasoning_effort": 1}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}]}, "messages"),
    ],
)
def test_what_is_wrong_or_unsupported_is_refused_by_name(client, engine, fields, param):
    """A field silently ignored, a 422, or an error that does not say which field."""
    found = error(client.post("/v1/chat/completions", json=ASK | fields))
    assert found.keys() == {"message", "type", "param", "code"}
    assert (found["code"], found["type"], found["param"]) == (400, "BadRequestError", param)
    assert param.split(".")[-1].split("[")[0] in found["message"] or "messages" in param
    assert engine.seen == []


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True},
        {"tools": [], "tool_choice": "auto", "functions": None, "response_format": {"type": "text"}, "logit_bias": {}},
        {
            "tool_choice": "none",
            "reasoning_effort": "none",
            "documents": [],
            "bad_words": [],
            "priority": 0,
            "echo": False,
        },
        {"request_id": "r", "session_id": "s", "include_reasoning": True, "return_token_ids": False},
        {
            "watermarking": False,
            "stream_interval": 1,
            "thinking_token_budget": -1,
            "spaces_between_special_tokens": False,
        },
        {"logit_bias": None, "stop": None, "seed": None, "n": None, "temperature": None, "stream": False},
        {"prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "medium", "modalities": ["text"]},
    ],
)
def test_harmless_and_neutral_fields_are_accepted(client, fields):
    """Common clients locked out over fields that change nothing."""
    assert client.post("/v1/chat/completions", json=ASK | fields).status_code == 200


def test_unknown_model_names_those_served(make_engine, client_of):
    """A request for another model answered by this one."""
    client = client_of(make_engine(), served_model_name=("a", "b/c"))
    assert client.post("/v1/chat/completions", json=ASK | {"model": "b/c"}).json()["model"] == "b/c"
    assert client.post("/v1/chat/completions", json=ASK).json()["model"] == "a"
    found = error(client.post("/v1/chat/completions", json=ASK | {"model": "tiny"}))
    assert (found["code"], found["type"], found["param"]) == (404, "NotFoundError", "model")
    assert "'a', 'b/c'" in found["message"]


def test_a_conversation_that_cannot_fit_is_refused(client, engine):
    """An engine error after the stream began, or a silent cut."""
    long = [{"role": "user", "content": "x" * engine.info.max_model_len}]
    found = error(client.post("/v1/chat/completions", json={"messages": long, "stream": True}))
    assert (found["code"], found["type"]) == ("context_length_exceeded", "BadRequestError")
    assert f"maximum context length is {engine.info.max_model_len} tokens" in found["message"]
    found = error(client.post("/v1/chat/completions", json=ASK | {"max_tokens": engine.info.max_model_len}))
    assert (found["code"], found["param"]) == ("context_length_exceeded", "max_tokens")
    assert engine.seen == []
