"""What routes answer against the Structs that the OpenAPI document shows for them."""

from __future__ import annotations

import json

import msgspec
import pytest
from route_table import ROUTES

from shuteye.server.http.answers import ErrorAnswer
from shuteye.server.openapi import ANSWERS


def says_the_same(content, kind):
    """Whether all of a JSON answer is known to `kind`, and nothing that `kind` needs is missing."""
    return json.loads(msgspec.json.encode(msgspec.json.decode(content, type=kind))) == json.loads(content)


DOCUMENTED = [row for row in ROUTES if row.name.replace(":path", "") in ANSWERS]


@pytest.mark.parametrize("row", DOCUMENTED, ids=lambda row: row.name)
def test_a_route_answers_with_the_documented_struct(client_of, make_engine, row):
    """A key that the document does not have, or one that it promises in vain."""
    engine = make_engine(task=row.task or "generate")
    client = client_of(engine)
    client.app.state.contexts.default.stopping.begin = lambda _reason: None  # what serves, on which /shutdown acts
    if row.path == "/restart_engine":
        engine.hang = "it gives no sign of life"
    if row.path == "/release_kv_cache_memory":
        client.post("/pause")
    response = client.request(row.method, row.url or row.path, **row.request)
    kind = ErrorAnswer if row.path == "/update_weights" else ANSWERS[row.name.replace(":path", "")]
    assert says_the_same(response.content, kind), response.text


def test_the_document_knows_every_table_row():
    """A route that is documented by a name that no route has."""
    assert len(DOCUMENTED) == len(ANSWERS)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
        ("/v1/chat/completions", {"prompt_logprobs": 1}),
        ("/v1/completions", {"logprobs": 1, "echo": True, "return_token_ids": True}),
        ("/v1/completions", {"prompt_logprobs": 1}),
        ("/v1/responses", {"include": ["message.output_text.logprobs"], "enable_response_messages": True}),
        ("/v1/messages", {"system": "Be brief.", "stop_sequences": ["use"]}),
        ("/tokenize", {"return_token_strs": True}),
    ],
)
def test_an_answer_with_all_that_can_be_asked_for_is_documented(client, path, fields):
    """Optional keys that the document forgot."""
    row = next(row for row in ROUTES if row.path == path)
    response = client.post(path, json=row.request["json"] | fields)
    assert response.status_code == 200, response.text
    assert says_the_same(response.content, ANSWERS[f"POST {path}"]), response.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/ready", "/no/such/route"])
def test_an_error_is_the_documented_one(client, path):
    """A refusal in a shape of its own: asleep, by a wrong method, and without a route."""
    assert client.post("/sleep").status_code == 200
    response = client.post(path, json={})
    assert response.status_code >= 400
    assert says_the_same(response.content, ErrorAnswer), response.text
