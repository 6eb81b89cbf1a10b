"""POST /tokenize, /detokenize and GET /v1/models."""

from __future__ import annotations


def test_tokenize_and_detokenize_are_inverse(client, engine):
    """Ids that do not give the text again, or a wrong count."""
    body = client.post("/tokenize", json={"prompt": "<|im_start|>é x"}).json()
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), engine.info.max_model_len)
    assert body["tokens"] == engine.tokenizer_.encode("<|im_start|>é x")
    assert client.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "<|im_start|>é x"}


def test_messages_are_rendered_as_for_a_chat(client, engine):
    """A count that differs from what the chat route then uses."""
    messages = [{"role": "user", "content": "hi"}]
    tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert tuple(tokens) == engine.seen[-1][0]


def test_token_strings_if_asked_for(client):
    """vLLM's `return_token_strs`."""
    assert client.post("/tokenize", json={"prompt": "ab"}).json()["token_strs"] is None
    assert client.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()["token_strs"] == ["a", "b"]


def test_models_lists_every_served_name(make_engine, client_of):
    """Clients that choose a model from the list and are refused."""
    client = client_of(make_engine(), served_model_name=("a", "org/b"))
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["a", "org/b"]
    assert {card["root"] for card in listed["data"]} == {"tiny"}
    assert client.get("/v1/models/org/b").json() == listed["data"][1]
