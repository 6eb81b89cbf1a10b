"""What an operator may ask of a server whatever its engine does: what it runs with, to end requests, to stop.

Served without sleep mode, too.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from fastapi import APIRouter, Response
from msgspec import Struct

from shuteye import __version__
from shuteye.calls import Call
from shuteye.errors import TransitionConflict
from shuteye.server.context import Context, ServerContext
from shuteye.server.control.calls import documented_body, requested
from shuteye.server.http.answers import JsonAnswer
from shuteye.server.http.auth import ControlRoute

router = APIRouter(route_class=ControlRoute)

SECRETS = ("api_key", "admin_api_key")


class AbortRequest(Call[None], frozen=True):
    """End requests that run or wait; they get what there is of them, with finish reason `abort`."""

    verb: ClassVar[str] = "abort_requests"

    request_ids: Annotated[
        Sequence[str] | None,
        msgspec.Meta(description="The `id`s of answers, or `X-Request-Id`s of requests; all requests unless given."),
    ] = None


class ShutdownRequest(Call[None], frozen=True):
    """Stop the server as SIGTERM does."""

    verb: ClassVar[str] = "shutdown"


class AbortAnswer(Struct):
    """Answer of POST /abort_requests: how many prompts, inputs and recordings were ended."""

    status: Literal["aborted"]
    aborted: int


class ServerInfoAnswer(Struct):
    """Answer of GET /server_info (vLLM's shape): both configurations, and what they run on.

    `vllm_env` is empty: environment variables are flags here, and end up in the configurations.
    """

    vllm_config: str | dict[str, Any]
    vllm_env: dict[str, str]
    system_env: dict[str, str]


class ShutdownAnswer(Struct):
    """Answer of POST /shutdown: the server ends once nothing runs any more, or after so many seconds."""

    status: Literal["stopping"]
    grace_s: float


@router.post("/abort_requests", response_model=None, openapi_extra=documented_body(AbortRequest))
async def abort_requests(
    asked: Annotated[AbortRequest, requested(AbortRequest, in_query=False)], context: Context
) -> Response:
    """Ends requests without a pause; unknown ids have finished, and are not counted."""
    engine = context.engine
    wanted = None if not asked.request_ids else frozenset(asked.request_ids)
    found = [known for known in engine.request_ids if wanted is None or wanted & _names(known)]
    for request_id in found:
        await engine.abort(request_id)
    return JsonAnswer(AbortAnswer("aborted", len(found)))


def _names(engine_id: str) -> frozenset[str]:
    """By what callers know a request: prompt i of the answer `id` is `{id}-{i}-{run}` in the engine (see `Job`)."""
    answer_id = engine_id.rsplit("-", 2)[0]
    return frozenset((engine_id, answer_id, engine_id.partition("-")[2], answer_id.partition("-")[2]))


@router.get("/server_info", response_model=None)
async def server_info(context: Context, config_format: Literal["text", "json"] = "text") -> Response:
    """Tells the configuration, without its keys, as text or as JSON, and what the server runs on."""
    configs = _configs(context)
    shown = " ".join(f"{name}({_listed(fields)})" for name, fields in configs.items())
    answer = ServerInfoAnswer(shown if config_format == "text" else configs, {}, _system())
    return JsonAnswer(msgspec.to_builtins(answer, enc_hook=str))


def _configs(context: ServerContext) -> dict[str, Any]:
    server = asdict(context.config)
    server |= {name: "***" for name in SECRETS if server[name] is not None}
    return {"engine": asdict(context.engine.config), "server": server}


def _listed(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())


def _system() -> dict[str, str]:
    return {
        "shuteye_version": __version__,
        "python_version": platform.python_version(),
        "python_platform": platform.platform(),
        "libc_version": " ".join(platform.libc_ver()),
        "cpu_count": str(len(os.sched_getaffinity(0))),
    }


@router.post("/shutdown", response_model=None)
async def shutdown(_call: Annotated[ShutdownRequest, requested(ShutdownRequest)], context: Context) -> Response:
    """Stops the server as SIGTERM does: nothing new is taken, and what runs has the grace to finish."""
    if context.stopping.begin is None:
        raise TransitionConflict("This server is run by another program, which alone can stop it.")
    if not context.stopping.begun:
        context.stopping.begin("POST /shutdown")
    return JsonAnswer(ShutdownAnswer("stopping", context.config.shutdown_grace_s))
