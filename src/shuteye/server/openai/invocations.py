"""POST /invocations, as SageMaker calls a model: passed on to the route of the model's task that the body is meant for.

Knows the routes by path alone, and finds them in the app's own table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from shuteye.errors import InvalidRequest
from shuteye.server.context import Context
from shuteye.server.http.admission import ModelRoute
from shuteye.server.http.bodies import parsed

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

router = APIRouter(route_class=ModelRoute)

Targets = Sequence[tuple[frozenset[str], str]]

_RANKED = (frozenset({"query", "documents"}), "/rerank")
_SCORED = (
    (frozenset({"text_1"}), "/score"),
    (frozenset({"queries"}), "/score"),
    (frozenset({"data_1"}), "/score"),
)

_CLASSIFIED = ((frozenset({"input"}), "/classify"), (frozenset({"messages"}), "/classify"))

TARGETS: Mapping[str, Targets] = {
    "generate": ((frozenset({"messages"}), "/v1/chat/completions"), (frozenset({"prompt"}), "/v1/completions")),
    "embed": (
        (frozenset({"input"}), "/v1/embeddings"),
        (frozenset({"messages"}), "/v1/embeddings"),
        _RANKED,
        *_SCORED,
    ),
    "score": (_RANKED, *_SCORED, *_CLASSIFIED),
    "classify": _CLASSIFIED,
    "transcribe": ((frozenset(), "/v1/audio/transcriptions"),),
}
"""Task → (fields that a body must have, the route that it is then for); the first match wins."""


_DOCUMENTED = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}


@router.post("/invocations", response_model=None, openapi_extra=_DOCUMENTED)
async def invocations(request: Request, context: Context) -> Response:
    """Answers as the route does that the body is for: chat with `messages`, completions with `prompt`, and so on."""
    task = context.engine.info.task
    targets = TARGETS.get(task, ())
    for fields, path in targets:
        if not fields:  # the task has one route, whatever the body is
            return _PassedOn(path)
    body = await request.body()
    given = _fields_of(body, max_bytes=context.config.max_json_bytes)
    for fields, path in targets:
        if fields <= given:
            return _PassedOn(path, body=body)
    known = " or ".join(f"{' and '.join(sorted(fields))} ({path})" for fields, path in targets)
    raise InvalidRequest(f"The model is for the task '{task}': a body needs {known or 'a route, and it has none'}.")


def _fields_of(body: bytes, *, max_bytes: int) -> frozenset[str]:
    found = parsed(body, max_bytes=max_bytes)
    if not isinstance(found, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return frozenset(found)


class _PassedOn(Response):
    """Lets another route of the same app answer; a body that was read already is read again."""

    def __init__(self, path: str, *, body: bytes | None = None) -> None:
        super().__init__()
        self._path = path
        self._given = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as that route does."""
        passed = {name: scope[name] for name in scope if name not in {"route", "endpoint", "path_params"}}
        passed |= {"path": self._path, "raw_path": self._path.encode()}
        await scope["app"].router(passed, self._replayed(receive), send)

    def _replayed(self, receive: Receive) -> Receive:
        if self._given is None:
            return receive
        pending: list[Message] = [{"type": "http.request", "body": self._given, "more_body": False}]

        async def replayed() -> Message:
            return pending.pop() if pending else await receive()

        return replayed
