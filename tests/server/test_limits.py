"""Limits on headers, and what web pages of other origins may do."""

from __future__ import annotations

import pytest
from http_answers import error

from shuteye.errors import InvalidRequest
from shuteye.server.config import ServerConfig

PAGE = "https://page.example"


@pytest.mark.parametrize(
    "headers", [{f"x-{index}": "1" for index in range(40)}, {"x-large": "y" * 3000}, {"y" * 3000: "x"}]
)
def test_too_many_or_too_large_headers_are_431(make_engine, client_of, headers):
    """Memory filled, or time spent, by a request that nobody asked for."""
    client = client_of(make_engine(), max_header_count=30, max_header_bytes=2000)
    response = client.get("/health", headers=headers)
    assert response.status_code == 431
    assert error(response)["type"] == "HeadersTooLargeError"
    assert "x-request-id" in response.headers
    assert client.get("/health", headers={"x-small": "y" * 500}).status_code == 200


@pytest.mark.parametrize("path", ["/" + "p" * 3000, "/health?" + "q" * 3000])
def test_the_request_line_counts_too(make_engine, client_of, path):
    """Kilobytes in the address, where none may be in a header."""
    client = client_of(make_engine(), max_header_bytes=2000)
    assert client.get(path).status_code == 431
    assert client.request("M" * 3000, "/health").status_code == 431
    assert client.get("/health?" + "q" * 500).status_code == 200


def test_no_origin_is_allowed_by_default(client):
    """Any web page talking to the server of whoever looks at it."""
    response = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"Origin": PAGE})
    assert not [name for name in response.headers if name.startswith("access-control-")]
    preflight = client.options("/v1/completions", headers={"Origin": PAGE, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 405


def test_allowed_origins(make_engine, client_of):
    """A page that cannot use the server although it was allowed to; errors that it may not read."""
    client = client_of(make_engine(), api_key="sk", allowed_origins=(PAGE,), allowed_methods=("POST",))
    ask = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = client.options("/v1/completions", headers=ask)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert client.options("/v1/completions", headers=ask | {"Origin": "https://other.example"}).status_code == 400
    assert client.options("/v1/models", headers=ask | {"Access-Control-Request-Method": "GET"}).status_code == 400
    refused = client.post("/v1/completions", json={}, headers={"Origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    keyed = {"Origin": PAGE, "Authorization": "Bearer sk"}
    body = {"prompt": "abc", "max_tokens": 2, "stream": True}
    served = client.post("/v1/completions", json=body, headers=keyed)
    assert served.content.endswith(b"data: [DONE]\n\n")
    assert served.headers["access-control-allow-origin"] == PAGE
    assert "X-Request-Id" in served.headers["access-control-expose-headers"]


def test_control_routes_stay_closed_to_other_origins(make_engine, client_of):
    """In development mode, without a key, an allowed page putting the model to sleep."""
    client = client_of(make_engine(), allowed_origins=("*",))
    assert client.post("/sleep", headers={"Origin": PAGE}).status_code == 403


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allow_credentials": True, "allowed_origins": ("*",)}, "allow_credentials"),
        ({"max_header_count": 0}, "max_header_count"),
        ({"max_header_bytes": 0}, "max_header_bytes"),
        ({"otlp_traces_endpoint": "localhost:4317"}, "otlp_traces_endpoint"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields, param):
    """A server that starts, and is open or useless."""
    with pytest.raises(InvalidRequest) as refused:
        ServerConfig(**fields)
    assert refused.value.param == param
