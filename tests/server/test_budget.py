"""What one request may cost: refused with 400 before anything of it is computed."""

from __future__ import annotations

import asyncio

import pytest
from http_answers import error

from shuteye.server.generation import run as generation
from shuteye.server.http import admission

CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ["a"] * 2048, "n": 128}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 2048, "best_of": 128}, "prompt"),
        ("/v1/completions", {"prompt": [[1]] * 2049}, "prompt"),
        ("/v1/completions", {"prompt": "a", "stop": ["x"] * 257}, "stop"),
        ("/v1/completions", {"prompt": "a", "stop": "x" * 20_000}, "stop"),
        ("/v1/completions", {"prompt": "a", "bad_words": ["x"] * 257}, "bad_words"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [1] * 5000}, "stop_token_ids"),
        ("/v1/completions", {"prompt": "a", "top_k": 2**63}, "top_k"),
        ("/v1/chat/completions", {"messages": CHAT, "stop": ["x"] * 1_000_000}, "stop"),
        ("/v1/responses", {"input": "hi", "stop": ["x"] * 1_000_000}, "stop"),
    ],
)
def test_generation(client, path, body, param):
    """A request of a few kilobytes that stalls everybody for seconds."""
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert error(response)["param"] == param
    assert len(response.content) < 1000


@pytest.mark.parametrize(
    ("task", "path", "body"),
    [
        ("embed", "/v1/embeddings", {"input": ["a"] * 5}),
        ("embed", "/pooling", {"input": [[1]] * 5}),
        ("score", "/score", {"text_1": "a", "text_2": ["a"] * 5}),
        ("score", "/rerank", {"query": "a", "documents": ["a"] * 5}),
        ("generate", "/v1/completions", {"prompt": "a", "n": 5}),
        ("generate", "/v1/chat/completions", {"messages": CHAT, "n": 5}),
    ],
)
def test_the_number_of_sequences_is_configured(make_engine, client_of, task, path, body):
    """A route that the limit does not reach."""
    client = client_of(make_engine(task=task), max_request_sequences=4)
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert "--max-request-sequences" in error(response)["message"]


def test_a_query_counts_once_for_every_document(make_engine, client_of, monkeypatch):
    """A long query that a cross-encoder reads thousands of times."""
    monkeypatch.setattr(admission, "MAX_CHARACTERS", 1000)
    body = {"query": "q" * 100, "documents": ["d"] * 20}
    response = client_of(make_engine(task="score")).post("/rerank", json=body)
    assert response.status_code == 400
    assert "2,020 characters" in error(response)["message"]
    assert client_of(make_engine(task="embed")).post("/rerank", json=body).status_code == 200


def test_prompt_tokens_count_for_every_sequence(client, monkeypatch):
    """Copies of a long prompt on their way to the engine."""
    monkeypatch.setattr(admission, "MAX_PROMPT_TOKENS", 100)
    for path, body in (("/v1/completions", {"prompt": "a" * 30}), ("/v1/chat/completions", {"messages": CHAT})):
        assert client.post(path, json=body | {"max_tokens": 1}).status_code == 200
        response = client.post(path, json=body | {"max_tokens": 1, "n": 10})
        assert response.status_code == 400
        assert "prompt tokens" in error(response)["message"]


def test_many_prompts_are_submitted_in_turns_with_others():
    """Thousands of prompts handed to the engine at once, while nobody else is answered."""
    order = []

    async def prompt(index):
        order.append(index)
        yield index, None

    async def other():
        for _ in range(3):
            order.append("other")
            await asyncio.sleep(0)

    async def scenario():
        asking = asyncio.create_task(other())
        async for _ in generation._merge([prompt(index) for index in range(200)]):
            pass
        await asking

    asyncio.run(scenario())
    assert order.index(199) > 2 + max(place for place, who in enumerate(order) if who == "other")
    assert sorted(one for one in order if one != "other") == list(range(200))
