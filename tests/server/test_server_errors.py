"""Every error has OpenAI's shape, whoever raised it."""

from __future__ import annotations

import pytest
from http_answers import error, events

from shuteye.errors import EngineDead, QueueFull, ShuteyeError, WakeFailed, _all_errors
from shuteye.server.http.errors import error_body, error_response

COMPLETION = {"prompt": "abcdef", "max_tokens": 5}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("kind", sorted(_all_errors(ShuteyeError)))
def test_every_error_of_ours_has_the_shape_and_its_status(kind):
    """A new error class that answers with another shape."""
    raised = _all_errors(ShuteyeError)[kind]("what happened", param="field")
    body = error_body(raised)
    keys = ["message", "type", "code"] if kind == "ModelSleeping" else ["message", "type", "param", "code"]
    assert list(body["error"]) == keys
    named = {"PromptTooLong": "context_length_exceeded"}
    assert body["error"]["code"] == named.get(kind, raised.status_code)
    assert error_response(raised).status_code == raised.status_code


@pytest.mark.parametrize(
    ("request_", "headers", "code", "kind"),
    [
        (("GET", "/nowhere", b""), {}, 404, "NotFoundError"),
        (("POST", "/v1/chat/completion", b"{}"), JSON, 404, "NotFoundError"),
        (("POST", "/v1/completions/", b"{}"), JSON, 404, "NotFoundError"),
        (("GET", "/v1/completions", b""), {}, 405, "MethodNotAllowedError"),
        (("GET", "/sleep", b""), {}, 405, "MethodNotAllowedError"),
        (("POST", "/v1/completions", b"{"), JSON, 400, "BadRequestError"),
        (("POST", "/v1/completions", b""), JSON, 400, "BadRequestError"),
        (("POST", "/v1/completions", b"[]"), JSON, 400, "BadRequestError"),
        (("POST", "/v1/completions", b"null"), JSON, 400, "BadRequestError"),
        (("POST", "/v1/completions", b'"x"'), JSON, 400, "BadRequestError"),
        (("POST", "/v1/completions", b"{}"), JSON, 400, "BadRequestError"),
        (("POST", "/v1/completions", b"\xff\xfe"), JSON, 400, "BadRequestError"),
        (("POST", "/v1/completions", b'{"prompt": "a"}'), {"content-type": "text/plain"}, 400, "BadRequestError"),
        (("POST", "/v1/completions", b"x" * 2000), JSON, 413, "RequestTooLargeError"),
        (("POST", "/tokenize", b"{}"), JSON, 400, "BadRequestError"),
        (("POST", "/tokenize", b'{"prompt": "a", "messages": []}'), JSON, 400, "BadRequestError"),
        (("POST", "/detokenize", b'{"tokens": [1e9]}'), JSON, 400, "BadRequestError"),
        (("POST", "/detokenize", b'{"tokens": [999999]}'), JSON, 400, "BadRequestError"),
        (("GET", "/v1/models/other", b""), {}, 404, "NotFoundError"),
        (("POST", "/reload_weights", b"[1]"), JSON, 400, "BadRequestError"),
    ],
)
def test_the_frameworks_errors_too(client_of, request_, headers, code, kind, *, engine):
    """starlette's {"detail": …}, plain text, or a 422."""
    method, path, content = request_
    response = client_of(engine, max_body_bytes=1000).request(method, path, content=content, headers=headers)
    found = error(response)
    assert found.keys() == {"message", "type", "param", "code"}
    assert (response.status_code, found["code"], found["type"]) == (code, code, kind)
    assert found["message"]


def test_a_body_without_a_declared_length_is_limited_too(engine, client_of):
    """Chunked bodies filling the memory."""
    client = client_of(engine, max_body_bytes=1000)
    response = client.post("/v1/completions", content=iter([b"x" * 600, b"x" * 600]), headers=JSON)
    assert error(response)["code"] == 413


def test_a_bug_is_500_without_its_details(make_engine, client_of):
    """Internals shown to callers."""
    engine = make_engine(breakage=ZeroDivisionError("secret"), break_after=0)
    client = client_of(engine)
    for stream in (False, True):
        response = client.post("/v1/completions", json=COMPLETION | {"stream": stream})
        assert response.status_code == 500
        assert error(response)["type"] == "InternalServerError"
        assert "secret" not in response.text


def test_a_bug_is_logged_with_its_traceback(make_engine, live, caplog):
    """A 500 that leaves no trace in the log."""
    import httpx2

    server = live(make_engine(breakage=ZeroDivisionError("secret"), break_after=0))
    assert httpx2.post(f"{server.url}/v1/completions", json=COMPLETION).status_code == 500
    server.stop()  # the traceback is logged after the answer was sent
    assert any(record.exc_info and "secret" in str(record.exc_info[1]) for record in caplog.records)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("prompts", [1, 3])
def test_an_error_within_a_stream_is_an_event(make_engine, client_of, path, prompts):
    """A stream that just stops: the client takes half an answer for a whole one."""
    engine = make_engine(breakage=EngineDead("the engine process ended"))
    ask = {"max_tokens": 9, "stream": True}
    if path == "/v1/completions":
        ask["prompt"] = ["abc"] * prompts
    else:
        ask["messages"] = [{"role": "user", "content": "x"}]
    found = events(client_of(engine).post(path, json=ask))
    assert found[-1] == {
        "error": {"message": "the engine process ended", "type": "EngineDeadError", "param": None, "code": 503}
    }
    assert all("choices" in chunk for chunk in found[:-1])
    assert len(found) > 1
    assert engine.running == {}


def test_an_error_of_one_of_many_prompts_fails_the_whole_answer(make_engine, client_of):
    """Half of the choices returned as if they were all; the rest left running."""
    engine = make_engine(breakage=EngineDead("gone"))
    response = client_of(engine).post("/v1/completions", json={"prompt": ["abc", "def"], "max_tokens": 9})
    assert (response.status_code, error(response)["type"]) == (503, "EngineDeadError")
    assert engine.running == {}


@pytest.mark.parametrize("kind", [QueueFull, WakeFailed])
def test_errors_that_allow_a_retry_have_retry_after(make_engine, client_of, kind):
    """Clients that hammer, or give up, for want of Retry-After."""
    engine = make_engine(breakage=kind("busy"), break_after=0)
    response = client_of(engine).post("/v1/completions", json=COMPLETION)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
