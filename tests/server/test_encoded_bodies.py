"""Bodies with a Content-Encoding: what is inflated, to how much at most, and what is refused."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc

import pytest
from http_answers import error
from starlette.exceptions import HTTPException

from shuteye.server.http.encoded_bodies import SLICE_BYTES, EncodedBodies

PLAIN = {"content-type": "application/json"}
GZIP = PLAIN | {"Content-Encoding": "gzip"}
BODY = json.dumps({"prompt": "abc", "max_tokens": 2}).encode()
ROUTES = ["/v1/completions", "/invocations", "/tokenize", "/sleep", "/v1/embeddings"]


def slices_of(parts, *, max_bytes=10 * SLICE_BYTES):
    """What a route reads of a gzipped body that comes in `parts`."""
    coming = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    coming[-1]["more_body"] = False
    read = []

    async def receive():
        return coming.pop(0)

    async def app(scope, receive, _send):
        assert not {b"content-encoding", b"content-length"} & {name for name, _ in scope["headers"]}
        message = {"more_body": True}
        while message["more_body"]:
            message = await receive()
            read.append(message["body"])

    headers = [(b"content-encoding", b"gzip"), (b"content-length", b"9"), (b"content-type", b"application/json")]
    scope = {"type": "http", "path": "/", "headers": headers}
    try:
        asyncio.run(EncodedBodies(app, max_bytes=max_bytes, shapes={})(scope, receive, None))
    except HTTPException as refused:
        return read, refused.status_code
    return read, 200


@pytest.mark.parametrize("coding", ["gzip", "GZip", "x-gzip", "identity, gzip"])
def test_a_gzipped_body_says_what_it_says_inflated(client, coding):
    """A client that compresses and is told that its JSON is not valid."""
    plain = client.post("/v1/completions", content=BODY, headers=PLAIN).json()
    answer = client.post("/v1/completions", content=gzip.compress(BODY), headers=PLAIN | {"Content-Encoding": coding})
    assert (answer.status_code, answer.json()["choices"]) == (200, plain["choices"])


def test_control_calls_are_inflated_too(client, engine):
    """A level that is read as none, as the route reads its body by itself."""
    answer = client.post("/sleep", content=gzip.compress(b'{"level": 2}'), headers=GZIP)
    assert (answer.status_code, answer.json()["level"], engine.is_sleeping) == (200, 2, True)


@pytest.mark.parametrize("cut", [1, 7, 100, 1 << 20])
def test_slices_are_small_and_together_the_body(cut):
    """A part that is lost where one ends, or one that inflates to all of the body at once."""
    body = json.dumps({"prompt": list(range(150_000))}).encode()
    gzipped = gzip.compress(body)
    parts = [gzipped[at : at + cut] for at in range(0, min(len(gzipped), 3000) if cut == 1 else len(gzipped), cut)]
    if cut == 1:
        parts.append(gzipped[3000:])
    read, status = slices_of(parts)
    assert (status, b"".join(read)) == (200, body)
    assert max(map(len, read)) <= SLICE_BYTES


def test_a_bomb_is_inflated_to_the_limit_and_no_further():
    """A gigabyte of memory for a megabyte that was sent."""
    bomb = gzip.compress(bytes(64 << 20), 1)
    tracemalloc.start()
    read, status = slices_of([bomb], max_bytes=2 * SLICE_BYTES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert status == 413
    assert sum(map(len, read)) <= 2 * SLICE_BYTES
    assert peak < 8 * SLICE_BYTES + 2 * len(bomb)


def test_the_limit_of_json_is_that_of_inflated_json(make_engine, client_of):
    """A limit that holds for what was sent, a thousandth of what the server then has to parse."""
    client = client_of(make_engine(), max_json_bytes=1000)
    fits, over = (json.dumps({"prompt": "a", "user": "b" * count}).encode() for count in (900, 1100))
    assert client.post("/tokenize", content=gzip.compress(fits), headers=GZIP).status_code == 200
    refused = client.post("/tokenize", content=gzip.compress(over), headers=GZIP)
    assert refused.status_code == 413
    assert "1,000 bytes, once it is inflated" in error(refused)["message"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (BODY, "is not gzip"),
        (gzip.compress(BODY)[:-1], "ends early"),
        (gzip.compress(BODY)[:9], "ends early"),
        (b"", "ends early"),
        (gzip.compress(BODY) + b"x", "goes on behind the end"),
        (gzip.compress(BODY) * 2, "goes on behind the end"),
        (gzip.compress(BODY)[:-8] + bytes(8), "is not gzip"),
    ],
    ids=["plain", "all but its last byte", "half of its head", "nothing", "one byte more", "twice", "another checksum"],
)
def test_what_is_not_one_whole_gzip_is_400(client, content, says):
    """Half a body that is taken for a whole one, a checksum that nobody looked at, or 500."""
    refused = client.post("/v1/completions", content=content, headers=GZIP)
    assert refused.status_code == 400
    assert says in error(refused)["message"]


@pytest.mark.parametrize("coding", ["br", "gzip, br", "gzip, gzip", "nonsense", "deflate"])
@pytest.mark.parametrize("path", ROUTES)
def test_another_encoding_is_415_naming_the_header(client, engine, path, coding):
    """A client that compresses, and is told that its JSON is not valid."""
    response = client.post(path, content=gzip.compress(BODY), headers=PLAIN | {"Content-Encoding": coding})
    assert response.status_code == 415
    assert "Content-Encoding" in error(response)["message"]
    assert error(response)["type"] == "UnsupportedMediaTypeError"
    assert response.headers["accept-encoding"] == "gzip, identity"
    assert not engine.is_sleeping


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/octet-stream", "audio/wav"])
@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/update_weights", "/v1/completions"])
def test_files_are_not_inflated(client, path, kind):
    """Uploads, whose limit is thirty times as large, or that of a model, from a thousandth of their bytes."""
    headers = {"content-type": kind, "Content-Encoding": "gzip"}
    response = client.post(path, content=gzip.compress(BODY), headers=headers)
    assert response.status_code == 415
    assert "is supported for JSON" in error(response)["message"]


def test_below_v1_messages_refusals_are_anthropics(make_engine, client_of):
    """Anthropic's client, which reads `error.type` of its own shape, told nothing."""
    client = client_of(make_engine(), max_header_count=30)
    encoded = client.post("/v1/messages", content=BODY, headers=PLAIN | {"Content-Encoding": "br"})
    headers = {f"x-{number}": "1" for number in range(40)}
    heavy = client.post("/v1/messages/count_tokens", content=BODY, headers=PLAIN | headers)
    for answer, status in ((encoded, 415), (heavy, 431)):
        assert answer.status_code == status
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        assert int(answer.headers["content-length"]) == len(answer.content)
