"""The OpenAPI document: FastAPI's, with the answers, errors and keys that routes really have.

A route that is not listed here keeps what FastAPI says of its answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import iter_route_contexts

from shuteye.server.anthropic import message_events, messages
from shuteye.server.anthropic.errors import MessageError
from shuteye.server.config import ServerConfig
from shuteye.server.context import contexts_of
from shuteye.server.control import health, operations, routes
from shuteye.server.http.admission import ModelRoute
from shuteye.server.http.answers import ErrorAnswer
from shuteye.server.http.auth import ControlRoute, InferenceRoute
from shuteye.server.openai import (
    chat_answers,
    classify,
    cohere,
    completions,
    embeddings,
    models,
    render,
    response_events,
    scores,
    transcripts,
)
from shuteye.state import TAGS, DrainMode, UpdateReport

ANSWERS: Mapping[str, type] = {
    "POST /v1/chat/completions": chat_answers.ChatAnswer,
    "POST /v1/completions": completions.CompletionAnswer,
    "POST /v1/responses": response_events.ResponseAnswer,
    "POST /v1/messages": message_events.MessageAnswer,
    "POST /v1/messages/count_tokens": messages.CountAnswer,
    "POST /v1/messages/render": render.RenderAnswer,
    "POST /v1/chat/completions/render": render.RenderAnswer,
    "POST /v1/responses/render": render.RenderAnswer,
    "POST /v1/embeddings": embeddings.EmbeddingAnswer,
    "POST /pooling": embeddings.PoolingAnswer,
    "POST /v2/embed": cohere.CohereAnswer,
    "POST /classify": classify.ClassificationAnswer,
    "POST /score": scores.ScoreAnswer,
    "POST /v1/score": scores.ScoreAnswer,
    "POST /rerank": scores.RerankAnswer,
    "POST /v1/rerank": scores.RerankAnswer,
    "POST /v2/rerank": scores.RerankAnswer,
    "POST /v1/audio/transcriptions": transcripts.TranscriptionAnswer,
    "POST /v1/audio/translations": transcripts.TranscriptionAnswer,
    "GET /v1/models": models.ModelsAnswer,
    "GET /v1/models/{name}": models.ModelAnswer,
    "POST /tokenize": models.TokensAnswer,
    "POST /detokenize": models.TextAnswer,
    "GET /tokenizer_info": models.TokenizerAnswer,
    "GET /health": health.AliveAnswer,
    "GET /ping": health.AliveAnswer,
    "GET /version": health.VersionAnswer,
    "GET /ready": health.ReadyAnswer,
    "GET /load": health.LoadAnswer,
    "GET /state": health.StateAnswer,
    "POST /sleep": routes.SleepAnswer,
    "POST /wake_up": routes.WakeAnswer,
    "POST /unload": routes.SleepAnswer,
    "GET /is_sleeping": routes.SleepingAnswer,
    "POST /pause": routes.DoneAnswer,
    "POST /resume": routes.DoneAnswer,
    "GET /is_paused": routes.PausedAnswer,
    "POST /update_weights": UpdateReport,
    "POST /reload_weights": UpdateReport,
    "POST /collective_rpc": routes.RpcAnswer,
    "POST /restart_engine": routes.RestartAnswer,
    "POST /abort_requests": operations.AbortAnswer,
    "GET /server_info": operations.ServerInfoAnswer,
    "POST /shutdown": operations.ShutdownAnswer,
    "GET /get_world_size": routes.WorldSizeAnswer,
    "POST /release_kv_cache_memory": routes.DoneAnswer,
    "POST /reset_prefix_cache": routes.DoneAnswer,
}
"""What each route answers with 200, in JSON."""

STREAMED = frozenset(
    {
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
        "POST /v1/messages",
        "POST /v1/audio/transcriptions",
        "POST /v1/audio/translations",
        "POST /invocations",
    }
)
"""Routes that answer with server-sent events instead when asked to."""

TEXT: Mapping[str, tuple[str, ...]] = {
    "GET /metrics": ("text/plain",),
    "POST /v1/audio/transcriptions": ("text/plain", "text/vtt"),
    "POST /v1/audio/translations": ("text/plain", "text/vtt"),
    "POST /invocations": ("text/plain", "text/vtt"),
}
"""Media types of routes that answer with text, or can be asked to."""

BINARY = frozenset({"POST /v1/embeddings", "POST /pooling"})
"""Routes that answer with bytes instead when asked to."""

_MEANINGS: Mapping[int, str] = {
    400: "A bad value, a missing or unknown field, or a request that does not fit.",
    401: "No key, or a wrong one.",
    403: "The key is for inference; or without keys, a web page of another origin asked, or one of a strange name.",
    404: "No model of this name.",
    408: "The body did not come in time.",
    409: "The transition table forbids this move.",
    413: "The body is too large.",
    431: "The headers are too many, or too large.",
    500: "Sleeping failed and was rolled back; the model is awake.",
    503: "The model sleeps, loads, or cannot be had; Retry-After says when it is worth asking again.",
}
_STATUSES: Mapping[type, tuple[int, ...]] = {
    ModelRoute: (400, 401, 404, 408, 413, 431, 503),
    InferenceRoute: (400, 401, 404, 408, 413, 431, 503),
    ControlRoute: (400, 401, 403, 404, 408, 409, 413, 431, 500, 503),
}
"""Errors by class of route; other routes (liveness) answer 431 and 503 alone."""

_OWN_503: Mapping[str, type] = {"GET /ready": health.ReadyAnswer, "GET /health": health.UnhealthyAnswer}
"""Routes whose 503 is no error, or more than one."""

_OWN_ERRORS: Mapping[str, type] = {
    "POST /v1/messages": MessageError,
    "POST /v1/messages/count_tokens": MessageError,
    "POST /v1/messages/render": MessageError,
}
"""Routes whose errors are not of OpenAI's shape."""

_LIMITS: Mapping[str, Mapping[str, Any]] = {
    "n": {"minimum": 1, "maximum": 128},
    "best_of": {"minimum": 1, "maximum": 128},
    "temperature": {"minimum": 0, "maximum": 100},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 10},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "max_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
}
"""Fields of generation bodies whose range `SamplingParams` checks."""

_CHOICES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "level": ("integer", {"enum": [0, 1, 2]}),
    "mode": ("string", {"enum": list(get_args(DrainMode))}),
    "tags": ("array", {"items": {"enum": list(TAGS)}, "minItems": 1}),
}
"""Parameters of control calls whose values the engine checks, by name: their type, and what it may be."""

_EVENT: Mapping[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "description": "A chunk in JSON, an error in JSON, or [DONE] at the end."},
    },
}
_REFS = "#/components/schemas/{name}"


def install_openapi(app: FastAPI) -> None:
    """Make `app` serve the document of this module."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = openapi_document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign] # FastAPI's documented way


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """The whole document, rebuilt."""
    context = contexts_of(app).default
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    _add_schemas((ErrorAnswer, *ANSWERS.values(), *_OWN_503.values(), *_OWN_ERRORS.values()), schemas)
    document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for schema in schemas.values():
        _narrow_fields(schema.get("properties", {}))
    for name, route_class, operation in _operations(app, document):
        _narrow_parameters(operation)
        responses = operation["responses"]
        responses.pop("422", None)  # never: a bad value is 400
        responses["200"] |= _success(name, responses["200"])
        responses |= _errors(name, route_class)
        if _needs_key(route_class, context.config):
            operation["security"] = [{"bearer": []}]
    return document


def _operations(app: FastAPI, document: Mapping[str, Any]) -> Iterator[tuple[str, type, dict[str, Any]]]:
    """(`METHOD /path`, class of its route, operation) of everything documented."""
    classes = {
        (method.lower(), route.path_format): type(route.original_route)
        for route in iter_route_contexts(app.routes)
        for method in route.methods or ()
    }
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", classes[method, path], operation


def _narrow_fields(properties: Mapping[str, Any]) -> None:
    if "temperature" not in properties:
        return
    for name in _LIMITS.keys() & properties.keys():
        for kind in ("number", "integer"):
            _narrow(properties[name], kind, _LIMITS[name])
    if "prompt" in properties:
        _refuse_empty(properties["prompt"])


def _refuse_empty(prompt: dict[str, Any]) -> None:
    for alternative in prompt.get("anyOf", [prompt]):
        match alternative.get("type"):
            case "string":
                alternative["minLength"] = 1
            case "integer":
                alternative["minimum"] = 0
            case "array":
                alternative["minItems"] = 1
                _refuse_empty(alternative["items"])


def _narrow_parameters(operation: Mapping[str, Any]) -> None:
    """Of the query, and of a body that may take its place."""
    schemas = {parameter["name"]: parameter["schema"] for parameter in operation.get("parameters", ())}
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    fields = body.get("properties", {})
    for name in _CHOICES.keys() & schemas.keys():
        for schema in (schemas[name], fields.get(name, {})):
            _narrow(schema, *_CHOICES[name])


def _narrow(schema: dict[str, Any], kind: str, limits: Mapping[str, Any]) -> None:
    """Add `limits` to the alternative of this type, if there is one."""
    for alternative in schema.get("anyOf", [schema]):
        if alternative.get("type") == kind:
            alternative.update(limits)


def _success(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    content = dict(given.get("content", {}))
    if name in ANSWERS:
        content["application/json"] = {"schema": {"$ref": _REFS.format(name=ANSWERS[name].__name__)}}
    if name in STREAMED:
        content["text/event-stream"] = {"itemSchema": _EVENT}
    if name in TEXT and name not in STREAMED:
        content = {}  # never JSON
    if name in BINARY:
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    content |= {kind: {"schema": {"type": "string"}} for kind in TEXT.get(name, ())}
    return {"content": content}


def _add_schemas(answers: Iterable[type], schemas: dict[str, Any]) -> None:
    """Add the schemas of `answers`, and of all that they refer to; a field with a default is always written."""
    _references, components = msgspec.json.schema_components(answers, ref_template=_REFS)
    for component in components.values():
        required = component.get("required", [])
        component["required"] = [
            name for name, field in component["properties"].items() if name in required or "default" in field
        ]
    schemas |= components


def _errors(name: str, route_class: type) -> dict[str, Any]:
    statuses = next((found for kind, found in _STATUSES.items() if issubclass(route_class, kind)), (431, 503))
    shape = _OWN_ERRORS.get(name, ErrorAnswer)
    errors = {str(status): _error(status, shape) for status in statuses}
    if name in _OWN_503:
        errors["503"]["content"]["application/json"]["schema"] = {"$ref": _REFS.format(name=_OWN_503[name].__name__)}
    return errors


def _error(status: int, shape: type) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": _MEANINGS[status],
        "content": {"application/json": {"schema": {"$ref": _REFS.format(name=shape.__name__)}}},
    }
    if status == 503:
        answer["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}
    return answer


def _needs_key(route_class: type, config: ServerConfig) -> bool:
    if issubclass(route_class, ControlRoute):
        return config.admin_api_key is not None
    return issubclass(route_class, ModelRoute | InferenceRoute) and config.api_key is not None
