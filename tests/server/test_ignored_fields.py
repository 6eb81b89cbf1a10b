"""Fields of bodies that nobody here knows (ADR 28)."""

from __future__ import annotations

import pytest
from http_answers import error

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/v1/completions", {"prompt": "abc", "max_tokens": 2}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 2}),
        ("/tokenize", {"prompt": "abc"}),
    ],
)
def test_unknown_fields_are_left_out_and_named(client, path, body):
    """A client refused because of a field of its own; or one that is never told of its typing error."""
    response = client.post(path, json=body | {"temprature": 0.5, "colour": "red", "x\r\ny": 1})
    assert response.status_code == 200, response.text
    assert response.headers["x-ignored-fields"] == "colour, temprature"
    assert "x-ignored-fields" not in client.post(path, json=body).headers


def test_what_would_change_the_answer_is_refused_all_the_same(client):
    """A field that asks for something, dropped in silence together with the unknown ones."""
    response = client.post("/v1/chat/completions", json=CHAT | {"colour": 1, "prompt_embeds": "AAAA"})
    assert (response.status_code, error(response)["param"]) == (400, "prompt_embeds")
    response = client.post("/sleep", json={"level": 1, "colour": 1})
    assert (response.status_code, error(response)["param"]) == (400, "colour")


def test_strict_fields_refuses_them(engine, client_of):
    """A flag that does nothing."""
    response = client_of(engine, strict_fields=True).post("/v1/chat/completions", json=CHAT | {"colour": 1})
    assert (response.status_code, error(response)["param"]) == (400, "colour")
