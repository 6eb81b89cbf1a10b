"""Which log-probabilities HTTP requests may ask for, and are shown: the whole vocabulary, or tokens that they name."""

import pytest
from http_answers import error, events

from shuteye.tasks.generate.logprob_limits import MAX_WIDE_LOGPROBS

CHAT = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 2, "logprobs": True}
TEXT = {"prompt": "abc", "max_tokens": 2, "logprobs": 1}


@pytest.fixture
def open_client(make_engine, client_of):
    engine = make_engine(max_logprobs=-1)
    return client_of(engine), engine


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", TEXT | {"logprobs": -1}, "logprobs"),
        ("/v1/completions", TEXT | {"prompt_logprobs": -1}, "prompt_logprobs"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": -1}, "top_logprobs"),
        ("/v1/chat/completions", CHAT | {"prompt_logprobs": -1}, "prompt_logprobs"),
    ],
)
def test_the_whole_vocabulary_is_asked_for_by_minus_one_where_it_is_allowed(client, open_client, path, body, param):
    """-1 taken for none or for 20, given by a server that was not told to, or refused without the flag's name."""
    refused = error(client.post(path, json=body))
    assert (refused["code"], refused["param"]) == (400, param)
    assert "--max-logprobs" in refused["message"]
    allowing, engine = open_client
    assert allowing.post(path, json=body).status_code == 200
    params = engine.seen[-1][1]
    wide = params.prompt_logprobs if param == "prompt_logprobs" else params.logprobs
    assert wide == engine.info.vocab_size


def test_all_prompts_of_a_request_count_together(open_client):
    """A thousand prompts in one body, each of which is within the bound."""
    client, engine = open_client
    most = MAX_WIDE_LOGPROBS // (engine.info.vocab_size + 1)
    body = {"prompt": ["abcd"] * (most // 4 + 1), "max_tokens": 1, "prompt_logprobs": -1}
    assert error(client.post("/v1/completions", json=body))["param"] == "prompt_logprobs"
    body["prompt"] = body["prompt"][:10]
    assert client.post("/v1/completions", json=body).status_code == 200


def test_wide_answers_are_shown_in_full(open_client):
    """Alternatives cut off at twenty, or an answer made elsewhere that lost its request id."""
    client, _engine = open_client
    answer = client.post("/v1/chat/completions", json=CHAT | {"top_logprobs": 30}, headers={"X-Request-Id": "wide"})
    assert answer.headers["X-Request-Id"] == "wide"
    content = answer.json()["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [30, 30]


@pytest.mark.parametrize("stream", [False, True])
def test_named_tokens_are_told_beside_the_chosen_one(client, stream):
    """The likeliest in place of those that were named, as a caller who scores labels would not notice."""
    fields = {"logprob_token_ids": [7, 9], "return_tokens_as_token_ids": True, "stream": stream}
    response = client.post("/v1/chat/completions", json=CHAT | fields)
    bodies = events(response) if stream else [response.json()]
    found = [
        entry for body in bodies for one in body["choices"] if one["logprobs"] for entry in one["logprobs"]["content"]
    ]
    assert len(found) == 2
    for entry in found:
        assert {top["token"] for top in entry["top_logprobs"]} == {entry["token"], "token_id:7", "token_id:9"}
    whole = client.post("/v1/completions", json=TEXT | fields | {"stream": False}).json()
    for token, tops in zip(*(whole["choices"][0]["logprobs"][key] for key in ("tokens", "top_logprobs")), strict=True):
        assert set(tops) == {token, "token_id:7", "token_id:9"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"logprobs": False}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", TEXT | {"echo": True, "max_tokens": 0}),
        ("/v1/completions", TEXT | {"logprob_token_ids": []}),
        ("/v1/completions", TEXT | {"logprob_token_ids": [10**6]}),
        ("/v1/completions", TEXT | {"logprob_token_ids": [-1]}),
        ("/v1/completions", TEXT | {"logprob_token_ids": list(range(129))}),
        ("/v1/completions", TEXT | {"logprob_token_ids": ["a"]}),
    ],
)
def test_named_tokens_that_cannot_be_told_are_refused_by_name(client, path, body):
    """A crash in the engine over an unknown id, or names that nobody looks at."""
    found = error(client.post(path, json={"logprob_token_ids": [7]} | body))
    assert found["code"] == 400
    assert found["param"].startswith("logprob_token_ids")
