"""POST /v1/completions."""

from __future__ import annotations

import pytest
from http_answers import error, events
from openai.types import Completion

from shuteye.tasks.generate.requests import StructuredOutputsParams, TokenLogprobs


def post(client, **fields):
    response = client.post("/v1/completions", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_answer_has_openais_shape(client):
    """A field that OpenAI's types do not accept, or a wrong count, would break every client."""
    body = post(client, prompt="abc", max_tokens=5)
    parsed = Completion.model_validate(body)
    assert parsed.id.startswith("cmpl-")
    assert (parsed.object, parsed.model) == ("text_completion", "tiny")
    assert (parsed.choices[0].text, parsed.choices[0].finish_reason) == ("abcab", "length")
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens, parsed.usage.total_tokens) == (3, 5, 8)


def test_default_length_is_16_or_what_fits(client, engine):
    """OpenAI's default, but not a refusal when the context has less room."""
    assert post(client, prompt="abc")["usage"]["completion_tokens"] == 16
    long = "x" * (engine.info.max_model_len - 3)
    assert post(client, prompt=long)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("form", ["text", "texts", "ids", "id lists"])
def test_every_form_of_prompt(client, engine, form):
    """A list of ids taken for a list of prompts, or the reverse."""
    first, second = engine.tokenizer_.encode("abc"), engine.tokenizer_.encode("xy")
    forms = {"text": "abc", "texts": ["abc", "xy"], "ids": first, "id lists": [first, second]}
    choices = post(client, prompt=forms[form], max_tokens=4)["choices"]
    expected = ["abca", "xyxy"] if form in ("texts", "id lists") else ["abca"]
    assert [choice["text"] for choice in choices] == expected
    assert [choice["index"] for choice in choices] == list(range(len(expected)))


def test_choices_are_numbered_over_prompts(client):
    """n > 1 with several prompts: OpenAI orders all of the first prompt's choices before the second's."""
    body = post(client, prompt=["abc", "xyz"], n=2, max_tokens=2)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "ab"), (1, "bc"), (2, "xy"), (3, "yz"),
    ]  # fmt: skip
    assert body["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 8,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_stream_of_several_prompts_says_the_same_as_the_whole_answer(client):
    """Lost, doubled or mixed-up text when streams are merged."""
    ask = {"prompt": ["abc", "xyz", "12345"], "n": 2, "max_tokens": 20, "echo": True}
    whole = {choice["index"]: choice for choice in post(client, **ask)["choices"]}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(client.post("/v1/completions", json=ask | options))
    texts = dict.fromkeys(whole, "")
    reasons: dict[int, list[str]] = {index: [] for index in whole}
    for chunk in chunks[:-1]:
        Completion.model_validate(chunk | {"choices": []})
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert texts == {index: choice["text"] for index, choice in whole.items()}
    assert all(found == ["length"] for found in reasons.values())
    assert chunks[-1]["usage"]["completion_tokens"] == 6 * 20


def test_echo_repeats_the_prompt_also_when_it_came_as_ids(client, engine):
    """Echo dropped, or ids echoed as numbers."""
    ids = engine.tokenizer_.encode("<|im_start|>é")
    assert post(client, prompt="abc", echo=True, max_tokens=2)["choices"][0]["text"] == "abcab"
    assert post(client, prompt=ids, echo=True, max_tokens=2)["choices"][0]["text"].startswith("<|im_start|>é")


def test_logprobs_have_openais_completions_shape(client):
    """Offsets that do not point at the tokens, or the chosen token missing from top_logprobs."""
    body = post(client, prompt="abc", max_tokens=4, logprobs=2)
    logprobs = Completion.model_validate(body).choices[0].logprobs
    assert logprobs.tokens == ["a", "b", "c", "a"]
    assert logprobs.text_offset == [0, 1, 2, 3]
    assert logprobs.token_logprobs == [-1.0] * 4
    for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert top[token] == -1.0
        assert len(top) == 2
    assert [len(top) for top in post(client, prompt="a", logprobs=0)["choices"][0]["logprobs"]["top_logprobs"]] == [
        1
    ] * 16


def test_streamed_logprobs_are_those_of_the_whole_answer(client):
    """Offsets that begin anew with every chunk."""
    ask = {"prompt": "aé", "max_tokens": 7, "logprobs": 1}
    whole = post(client, **ask)["choices"][0]["logprobs"]
    streamed = {name: [] for name in whole}
    for chunk in events(client.post("/v1/completions", json=ask | {"stream": True})):
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert streamed == whole


def test_stop_token_and_minimum_reach_the_engine(client, engine):
    """`stop_token_ids` and `min_tokens` dropped."""
    stop = engine.tokenizer_.encode("b")
    choice = post(client, prompt="abc", stop_token_ids=stop, min_tokens=3)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop[0])
    assert choice["text"].startswith("abca")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ],
)
def test_what_is_wrong_or_unsupported_is_refused_by_name(client, engine, fields, param):
    """A field silently ignored, a 422, or an error that does not say which field."""
    found = error(client.post("/v1/completions", json={"prompt": "abc"} | fields))
    assert (found["code"], found["type"], found["param"]) == (400, "BadRequestError", param)
    assert engine.seen == []


def test_neutral_values_of_unsupported_fields_are_accepted(client):
    """Clients that send every field with its default locked out."""
    post(client, prompt="a", suffix=None, best_of=1, logit_bias={}, user="me", use_beam_search=False)
    post(client, prompt="a", n=2, best_of=2)


def test_one_prompt_of_many_that_cannot_fit_refuses_all(client, engine):
    """An error only after the first prompts were streamed."""
    prompts = ["ok", "x" * (engine.info.max_model_len + 1)]
    found = error(client.post("/v1/completions", json={"prompt": prompts, "stream": True}))
    assert (found["code"], found["type"]) == ("context_length_exceeded", "BadRequestError")
    assert engine.seen == []


def test_a_long_prompt_is_encoded_off_the_event_loop(make_engine, client_of, monkeypatch):
    """Encoding a long text on the event loop holds up every other stream."""
    import threading

    engine = make_engine(max_model_len=100_000)
    client = client_of(engine)
    threads: list[str] = []
    encode = engine.tokenizer_.encode

    def spy(text, **options):
        threads.append(threading.current_thread().name)
        return encode(text, **options)

    monkeypatch.setattr(engine.tokenizer_, "encode", spy)
    post(client, prompt="x", max_tokens=1)
    post(client, prompt="x" * 50_000, max_tokens=1)
    on_loop, off_loop = threads
    assert on_loop != off_loop


def test_echoed_prompts_bring_their_log_probabilities(client, engine):
    """What those read who score texts: shifted by one, without the prompt, or with offsets that start anew."""
    ask = {"prompt": ["abc", "de"], "max_tokens": 2, "echo": True, "logprobs": 1}
    first, second = post(client, **ask)["choices"]
    assert first["text"] == "abcab"
    assert first["logprobs"]["tokens"] == list("abcab")
    assert first["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -1.0, -1.0]
    assert first["logprobs"]["top_logprobs"][:2] == [None, {"b": -1.0, "!": -0.1}]
    assert first["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert second["logprobs"]["tokens"] == list("dede")
    assert engine.seen[0][1].prompt_logprobs == 1


def test_streamed_echo_says_the_same(client):
    """Log-probabilities of the prompt missing from a stream, or told once per chunk."""
    ask = {"prompt": "abc", "max_tokens": 2, "echo": True, "logprobs": 1, "n": 2}
    whole = post(client, **ask)["choices"]
    chunks = events(client.post("/v1/completions", json=ask | {"stream": True}))
    for index, choice in enumerate(whole):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for chunk in mine for value in (chunk["logprobs"] or {}).get(name, [])] == values


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_generates_nothing_that_is_seen(client, stream):
    """`max_tokens=0` refused, or a token shown that nobody asked for."""
    ask = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0}
    if stream:
        chunks = events(client.post("/v1/completions", json=ask | {"stream": True}))
        choices = [chunk["choices"][0] for chunk in chunks]
        assert [choice["text"] for choice in choices] == ["abc", ""]
        assert choices[-1]["finish_reason"] == "length"
        assert choices[0]["logprobs"]["tokens"] == list("abc")
    else:
        body = post(client, **ask)
        assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("abc", "length")
        assert body["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
        assert body["usage"]["completion_tokens"] == 0


def test_the_best_of_several_are_the_likeliest(client, engine, monkeypatch):
    """Any completions returned instead of the best, or log-probabilities that were not asked for."""
    scored = {0: -2.0, 1: -1.0, 2: 0.0, 3: -1.0}
    monkeypatch.setattr("fake_model.logprobs_of", lambda i, token, _num: TokenLogprobs((token,), (scored[i],), (1,)))
    body = post(client, prompt="abcd", n=2, best_of=4, max_tokens=1)
    assert [choice["text"] for choice in body["choices"]] == ["c", "b"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 4
    assert engine.seen[-1][1].n == 4


def test_token_ids_are_shown_if_asked_for(client, engine):
    """`return_token_ids` and `return_tokens_as_token_ids` ignored."""
    ids = engine.tokenizer_.encode("aé")
    ask = {"prompt": "aé", "max_tokens": 3, "return_token_ids": True, "logprobs": 0, "return_tokens_as_token_ids": True}
    choice = post(client, **ask)["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, ids)
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    chunks = [c["choices"][0] for c in events(client.post("/v1/completions", json=ask | {"stream": True}))]
    assert [chunk["prompt_token_ids"] for chunk in chunks if chunk["prompt_token_ids"]] == [ids]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == ids


def test_prompt_logprobs_have_vllms_shape(client):
    choice = post(client, prompt="ab", prompt_logprobs=1, max_tokens=1)["choices"][0]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert {"logprob": -1.0, "rank": 2, "decoded_token": "b"} in second.values()
    assert len(second) == 2


def test_usage_can_come_with_every_chunk(client):
    """`continuous_usage_stats` refused or ignored."""
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = events(client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3} | options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]
    assert chunks[-1]["choices"] == []


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 2}, "de"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, "ab"),
        ({"truncate_prompt_tokens": 9}, "abcde"),
        ({"truncate_prompt_tokens": -1}, "abcde"),
    ],
)
def test_prompts_are_cut_where_asked(client, fields, kept):
    """The wrong end of a prompt cut off."""
    assert post(client, prompt="abcde", echo=True, max_tokens=1, **fields)["choices"][0]["text"][:-1] == kept


def test_a_prompt_that_is_too_long_can_be_cut_to_fit(client, engine):
    body = post(client, prompt="x" * 2000, truncate_prompt_tokens=-1, max_tokens=5)
    assert body["usage"]["prompt_tokens"] == engine.info.max_model_len - 5


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"guided_regex": "a+"}, {"regex": "a+", "param": "guided_regex"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"], "param": "guided_choice"}),
        ({"guided_json": {"type": "object"}}, {"json": {"type": "object"}, "param": "guided_json"}),
        ({"guided_grammar": "start: x"}, {"grammar": "start: x", "param": "guided_grammar"}),
        ({"structured_outputs": {"regex": "a"}}, {"regex": "a"}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True, "param": "response_format"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}}},
            {"json": {"type": "null"}, "param": "response_format"},
        ),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_structure_reaches_the_engine(client, engine, fields, wanted):
    """A demand on the output dropped on the way; or an error that will name another field than the caller's."""
    post(client, prompt="abc", **fields)
    expected = None if wanted is None else StructuredOutputsParams(**wanted)
    assert engine.seen[-1][1].structured_outputs == expected


def test_rules_of_tokens_reach_the_engine(client, engine):
    """`logit_bias` with its ids as text, or any other rule, dropped on the way."""
    post(client, prompt="a", logit_bias={"5": -1.5}, bad_words=["x"], priority=-3)
    params = engine.seen[-1][1]
    assert (params.logit_bias, params.bad_words, params.priority) == ({5: -1.5}, ["x"], -3)
    post(client, prompt="a", allowed_token_ids=[3, 4])
    assert engine.seen[-1][1].allowed_token_ids == [3, 4]


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True, "logprobs": 1},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "logprobs": 1, "n": 2},
        {"echo": True, "logprobs": 1, "stream": True},
        {"echo": True, "logprobs": 1, "max_tokens": 0, "stream": True},
        {"prompt_logprobs": 1},
        {"logprobs": 1},
    ],
)
def test_aborted_before_its_prompt_was_scored(make_engine, client_of, fields):
    """A request that a sleep aborts while it waits, answered with a bug's 500: nothing is known of its prompt."""
    client = client_of(make_engine(aborts=True))
    response = client.post("/v1/completions", json={"prompt": "abc"} | fields)
    assert response.status_code == 200, response.text
    chunks = events(response) if fields.get("stream") else [response.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[-1]["finish_reason"] == "abort"
    assert "".join(choice["text"] for choice in choices) == "abc" * fields.get("n", 1) * fields.get("echo", 0)
    if "prompt_logprobs" in fields:
        assert choices[0]["prompt_logprobs"] is None
    if "echo" in fields:
        assert choices[0]["logprobs"]["tokens"] == ["a", "b", "c"]
        assert choices[0]["logprobs"]["token_logprobs"] == [None, None, None]
