"""POST /invocations: the same answers as the routes that it stands for."""

from __future__ import annotations

import re

import pytest
from http_answers import error
from route_table import _hears

MESSAGES = [{"role": "user", "content": "hi"}]
BODIES = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/completions": {"prompt": "abc", "max_tokens": 4},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", sorted(BODIES))
def test_generation(client, path, stream):
    """Another answer than the route's own: a chat taken for a completion, a stream that is collected."""
    body = BODIES[path] | {"stream": stream}
    headers = {"X-Request-Id": "one"}
    answers = [client.post(where, json=body, headers=headers) for where in ("/invocations", path)]
    assert answers[0].status_code == 200
    assert answers[0].headers["content-type"] == answers[1].headers["content-type"]
    texts = [answer.text.partition('"created":')[0] for answer in answers]
    assert texts[0] == texts[1]
    assert answers[0].text.count("data: ") == answers[1].text.count("data: ")


def test_errors_are_those_of_the_route(client):
    """A 500 because an error is raised where nobody expects it."""
    response = client.post("/invocations", json={"prompt": "abc", "temperature": -1})
    assert (response.status_code, error(response)["param"]) == (400, "temperature")


@pytest.mark.parametrize(
    "request_", [{"json": {"input": "x"}}, {"json": [1]}, {"content": b"{"}, {"content": b""}, {"json": {}}]
)
def test_what_fits_no_route_is_400_naming_what_would(client, request_):
    """SageMaker's health of an endpoint ruined by 500s."""
    response = client.post("/invocations", **request_)
    assert response.status_code == 400
    if "json" in request_ and isinstance(request_["json"], dict):
        assert "messages (/v1/chat/completions) or prompt (/v1/completions)" in error(response)["message"]


@pytest.mark.parametrize(
    ("task", "request_", "target"),
    [
        ("embed", {"json": {"input": "x"}}, "/v1/embeddings"),
        ("embed", {"json": {"text_1": "x", "text_2": "y"}}, "/score"),
        ("score", {"json": {"queries": "x", "documents": "y"}}, "/score"),
        ("score", {"json": {"query": "x", "documents": ["y"]}}, "/rerank"),
        ("transcribe", _hears("/").request, "/v1/audio/transcriptions"),
        ("transcribe", _hears("/").streamed, "/v1/audio/transcriptions"),
    ],
)
def test_other_tasks_reach_their_routes(make_engine, client_of, task, request_, target):
    """A task whose route is there, and not reached from here; a file that is lost on the way."""
    client = client_of(make_engine(task=task))
    answers = [client.post(path, **request_) for path in ("/invocations", target)]
    assert [answer.status_code for answer in answers] == [200, 200]
    texts = [re.sub(r'"(id|created)":[^,]*', "", answer.text) for answer in answers]
    assert texts[0] == texts[1]


def test_the_key_is_needed(make_engine, client_of):
    """A way around the key."""
    client = client_of(make_engine(), api_key="sk")
    assert client.post("/invocations", json=BODIES["/v1/completions"]).status_code == 401
    headers = {"Authorization": "Bearer sk"}
    assert client.post("/invocations", json=BODIES["/v1/completions"], headers=headers).status_code == 200
