"""A schema for the answer and tools that may be called, together: what comes is one or the other, whole and valid."""

from __future__ import annotations

import json

import jsonschema
import pytest
from json_schemas import OBJECTS, SCHEMAS
from starlette.testclient import TestClient

from shuteye import AsyncEngine
from shuteye.config import EngineConfig
from shuteye.server.app import create_app
from shuteye.server.config import ServerConfig
from shuteye.testing import tiny_model

NUM_PAIRS = 100
PARAMETERS = [schema for schema in OBJECTS if schema.get("type") == "object"]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("structure")
    path = tiny_model(
        directory / "model", max_position_embeddings=8192
    )  # a token a byte: descriptions of tools are long
    config = EngineConfig(
        str(path), num_threads=1, dtype="float32", cache_dir=directory / "cache", kv_cache_memory=16 << 20
    )
    with TestClient(create_app(AsyncEngine(config, in_process=True), ServerConfig()), "http://localhost") as client:
        while client.get("/ready").status_code != 200:
            assert client.get("/health").json()["status"] in {"loading", "ok"}
        yield client


def tool(name, schema):
    return {"type": "function", "function": {"name": name, "description": "does it", "parameters": schema}}


def asked(index):
    """One pair: a schema, and one tool to three of which each has another schema."""
    tools = [
        tool(f"tool_{number}", PARAMETERS[(7 * index + number) % len(PARAMETERS)]) for number in range(index % 3 + 1)
    ]
    schema = SCHEMAS[index % len(SCHEMAS)]
    body = {
        "messages": [{"role": "user", "content": f"question {index}"}],
        "tools": tools,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        "temperature": 1.0,
        "seed": index,
        "max_tokens": 1000,
    }
    return body, schema, {each["function"]["name"]: each["function"]["parameters"] for each in tools}


def kind_of(message, schema, parameters):
    """What came, proven valid."""
    calls = message.get("tool_calls") or ()
    for call in calls:
        function = call["function"]
        jsonschema.validate(json.loads(function["arguments"]), parameters[function["name"]])
    if calls:
        return "call"
    jsonschema.validate(json.loads(message["content"]), schema)
    return "content"


@pytest.mark.slow
def test_a_hundred_pairs_of_schema_and_tools(client):
    """An answer that is neither, calls with arguments of another tool, or a grammar that lets one of both through."""
    seen = {}
    for index in range(NUM_PAIRS):
        body, schema, parameters = asked(index)
        response = client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, (index, response.text)
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] in {"stop", "tool_calls"}, (index, choice)
        kind = kind_of(choice["message"], schema, parameters)
        seen[kind] = seen.get(kind, 0) + 1
    assert seen.keys() == {"call", "content"}, seen


def test_a_forced_call_beside_a_schema(client):
    """The schema's alternative, where only the call was asked for."""
    body, schema, parameters = asked(5)
    name = next(iter(parameters))
    body["tool_choice"] = {"type": "function", "function": {"name": name}}
    (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert kind_of(choice["message"], schema, parameters) == "call"
