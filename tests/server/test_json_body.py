"""JSON bodies that are too much, or that are not quite JSON: 400 or 413, in OpenAI's shape, and never a 500."""

from __future__ import annotations

import json

import pytest
from http_answers import error

from shuteye.errors import InvalidRequest
from shuteye.server.http.bodies import MAX_CONTAINERS, MAX_DEPTH, parsed

DEEP = "[" * 100_000
BODIES = {
    "deep": ('{"prompt": "a", "seed": ' + DEEP + "}", "arrays and objects"),
    "deep, closed": ('{"a": ' * 5_000 + "1" + "}" * 5_000, "nested"),
    "many": ("[" + "[]," * MAX_CONTAINERS + "[]]", "arrays and objects"),
    "NaN": ('{"prompt": "a", "temperature": NaN}', "NaN"),
    "Infinity": ('{"prompt": "a", "temperature": -Infinity}', "Infinity"),
    "huge integer": ('{"prompt": "a", "seed": ' + "9" * 5_000 + "}", "JSON"),
    "surrogate": ('{"prompt": "a\\ud800"}', "surrogate"),
    "surrogate in a name": ('{"prompt": "a", "\\udfff": 1}', "surrogate"),
    "not UTF-8": (b'{"prompt": "\xff"}', "JSON"),
    "raw surrogate": (b'{"prompt": "\xed\xa0\x80"}', "JSON"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "JSON"),
}


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/invocations"]
)
@pytest.mark.parametrize("name", BODIES)
def test_strange_bodies_are_refused(client, path, name):
    """A body that no parser, or nothing behind it, was made for: 500, or an answer to half of it."""
    body, word = BODIES[name]
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert word in error(response)["message"]


def test_structure_within_strings_does_not_count(client):
    """Code, or JSON as text, refused for its brackets; an escaped quote taken for a string's end."""
    text = '{"[' * MAX_CONTAINERS + '\\"' + "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")
    assert parsed(json.dumps({"text": text}).encode()) == {"text": text}
    response = client.post("/tokenize", json={"prompt": text[:20_000]})
    assert response.status_code == 200


@pytest.mark.parametrize("body", [b'"' * 100_001 + b"[" * 200, b'"\\' * 50_000 + b"[" * 200, b"]" * 200 + b"[" * 200])
def test_what_is_no_json_is_refused_as_fast(body):
    """A pattern that backtracks over strings that never end."""
    with pytest.raises(InvalidRequest):
        parsed(body)


def test_depth_is_counted(client):
    """A limit that is off, or that counts what stands beside each other."""
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    parsed(deep.encode())
    parsed(("[" + "[]," * 1000 + "[]]").encode())
    with pytest.raises(InvalidRequest):
        parsed(f"[{deep}]".encode())


def test_json_larger_than_the_limit_is_413(make_engine, client_of):
    """An event loop that validates megabytes while nobody else is served."""
    client = client_of(make_engine(), max_json_bytes=2000)
    assert client.post("/v1/completions", json={"prompt": "a" * 100, "max_tokens": 1}).status_code == 200
    for path in ("/v1/completions", "/invocations", "/reload_weights"):
        response = client.post(path, json={"prompt": "a" * 2000})
        assert response.status_code == 413
        assert "2,000 bytes" in error(response)["message"]


def test_a_strange_value_is_shown_in_part(client):
    """A complaint that repeats megabytes, or that recurses over them."""
    value = [[[[[["x" * 1000] * 1000]]]]]
    response = client.post("/v1/completions", json={"prompt": "a", "temperature": value})
    assert response.status_code == 400
    assert len(response.content) < 1000


@pytest.mark.parametrize(
    "name", ["self", "tokenizer", "conversation", "template", "func", "args", "variables", "context"]
)
def test_a_template_variable_may_have_any_name(client, name):
    """A variable that is taken for an argument of one of our functions: 500."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "chat_template_kwargs": {name: 1}}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    long = body | {"messages": [{"role": "user", "content": "hi" * 5000}]}
    assert client.post("/v1/chat/completions", json=long).status_code in {200, 400}


@pytest.mark.parametrize("arguments", [DEEP, '{"a":' * 900 + "1" + "}" * 900, "NaN", '"\\ud800"'])
def test_a_calls_arguments_are_refused_like_a_body(client, arguments):
    """Arguments are JSON within JSON: as deep, and as strange."""
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    response = client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400, response.text
    assert error(response)["param"] == "messages"
