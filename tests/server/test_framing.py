"""Requests as they lie on the wire: HEAD, targets, and lengths that contradict each other."""

from __future__ import annotations

import json
import socket

import pytest

PLAIN = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "path", ["/health", "/ping", "/ready", "/version", "/v1/models", "/v1/models/tiny", "/metrics"]
)
def test_head_is_get_without_a_body(client, path):
    """A load balancer that probes with HEAD and takes the server for dead."""
    asked, probed = client.get(path), client.head(path)
    assert probed.status_code == 200
    assert probed.content == b""
    assert probed.headers["content-type"] == asked.headers["content-type"]


def test_head_says_what_get_would(client):
    """A probe that is told 200 of what is not there, may not be asked, or is not ready."""
    client.post("/sleep").raise_for_status()
    assert client.head("/ready").status_code == 503
    assert client.head("/nowhere").status_code == 404
    answer = client.head("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_identity_is_no_encoding(client):
    """A refusal of a body that is as it should be."""
    body = json.dumps({"prompt": "abc", "max_tokens": 2})
    headers = PLAIN | {"Content-Encoding": "Identity"}
    assert client.post("/v1/completions", content=body, headers=headers).status_code == 200


def exchange(url, sent):
    """What comes back for raw bytes, until the server closes the connection; fails if it does not."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(sent)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


@pytest.mark.parametrize("length", [b"6", b"0", b"40"])
def test_both_lengths_are_refused_and_the_connection_is_closed(make_engine, live, length):
    """A request hidden in another one's body, seen only by us or only by the proxy before us (RFC 9112, 6.1)."""
    engine = make_engine()
    server = live(engine)
    hidden = b"POST /sleep HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    sent = (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: " + length
    ) + b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    received = exchange(server.url, sent + hidden)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"Transfer-Encoding" in received
    assert b"\r\nconnection: close\r\n" in received.lower()
    assert not engine.is_sleeping


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/v1/models", 200),
        ("HTTPS://somewhere.else:99/v1/models?x=1", 200),
        ("http://localhost", 404),
        ("http://localhost/nowhere", 404),
    ],
)
def test_a_target_may_name_its_host(make_engine, live, target, status):
    """404 for what a proxy sends (absolute-form, RFC 9112, 3.2.2), though the route is there."""
    server = live(make_engine())
    with socket.create_connection(server.listener.getsockname(), timeout=10) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = connection.makefile("rb").read()
    assert answer.split()[1] == str(status).encode()
