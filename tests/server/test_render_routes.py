"""POST …/render: what a request becomes, beside what the engine is really asked."""

from __future__ import annotations

import pytest

HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
BODIES = {
    "/v1/chat/completions": {"messages": HI, "tools": TOOLS, "max_tokens": 7, "temperature": 0.5, "stop": ["x"]},
    "/v1/completions": {"prompt": ["abc", "de"], "max_tokens": 7, "temperature": 0.5, "stop": ["x"]},
    "/v1/responses": {"input": "hi", "max_output_tokens": 7, "temperature": 0.5, "stop": ["x"]},
    "/v1/messages": {"messages": HI, "max_tokens": 7, "temperature": 0.5, "stop_sequences": ["x"]},
}


@pytest.mark.parametrize("path", BODIES)
def test_what_is_rendered_is_what_the_engine_gets(make_engine, client_of, path):
    """A prompt, or a way to choose tokens, that is not the one that generates."""
    engine = make_engine(max_model_len=2048)
    client = client_of(engine)
    body = BODIES[path] | {"cache_salt": "salt", "priority": 3}
    assert client.post(path, json=body).status_code == 200
    asked = list(engine.seen)
    client.post("/sleep")
    answer = client.post(f"{path}/render", json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    prompts = found if isinstance(found, list) else [found]
    assert isinstance(found, list) == (path == "/v1/completions")
    assert len(engine.seen) == len(asked)
    assert sorted(tuple(one["token_ids"]) for one in prompts) == sorted(prompt for prompt, _params in asked)
    for one in prompts:
        assert one["text"] == engine.tokenizer.decode(one["token_ids"], skip_special_tokens=False)
        assert (one["model"], one["stream"], one["cache_salt"], one["priority"]) == ("tiny", True, "salt", 3)
        params = asked[0][1]
        told = one["sampling_params"]
        assert (told["temperature"], told["max_tokens"], told["stop"]) == (params.temperature, 7, ["x"])
        assert params.max_tokens == 7


def test_without_a_limit_it_is_what_the_context_leaves(client):
    """A request that cannot be sent on, as it does not say how long the answer may be."""
    found = client.post("/v1/chat/completions/render", json={"messages": HI}).json()
    assert found["sampling_params"]["max_tokens"] == 512 - len(found["token_ids"])


def test_what_would_be_refused_is_refused(client):
    """A prompt that is told as if it would be taken."""
    for path, body, status in (
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/completions", {"prompt": "a" * 600}, 400),
        ("/v1/responses", {"input": "hi", "previous_response_id": "resp_1"}, 400),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404),
    ):
        assert client.post(f"{path}/render", json=body).status_code == status
    refused = client.post("/v1/messages/render", json={"messages": HI})
    assert (refused.status_code, refused.json()["type"]) == (400, "error")
