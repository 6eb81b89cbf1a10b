"""Refuses work for the model as early as possible: by the engine's state, the model's task, and what it would cost.

The engine core decides again, and for good, when a request reaches it. Other limits: of single fields in `openai/`, of
bodies in `bodies.py`, of grammars and of the queue in the engine; docs/guides/production.md lists them all.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute

from shuteye.errors import (
    EngineDead,
    EngineFaulted,
    EngineHung,
    EngineNotReady,
    InvalidRequest,
    ModelPaused,
    ModelSleeping,
    ServerStopping,
)
from shuteye.frontend.engine import Engine
from shuteye.server.config import ServerConfig
from shuteye.server.context import ServerContext, context_of
from shuteye.server.http.auth import Handler, behind_inference_key

MAX_CHARACTERS = 16 * 1024 * 1024
"""Text that one request has encoded, counted as often as it is: a query that goes with every document, for one."""

MAX_PROMPT_TOKENS = 4 * 1024 * 1024
"""Prompt tokens that one request sends to the engine: each of its n sequences has a copy."""


class ModelRoute(APIRoute):
    """A route that needs the weights; refused before its body is read when they cannot be had.

    Attributes:
        key_header: as `InferenceRoute` has it.
    """

    key_header: ClassVar[str | None] = None

    def get_route_handler(self) -> Handler:
        """The route's handler, behind key and gate."""
        handle = super().get_route_handler()

        async def admitted(request: Request) -> Response:
            context = context_of(request)
            refuse_if_stopping(context)
            refuse_unless_serving(context.engine)
            return await handle(request)

        return behind_inference_key(admitted, key_header=self.key_header)


def refuse_if_stopping(context: ServerContext) -> None:
    """Begin nothing that a stop would have to wait for.

    Raises:
        ServerStopping: the server was told to stop.
    """
    if context.stopping.begun:
        raise ServerStopping("This server is stopping; it finishes what runs and takes no new requests.")


def refuse_unless_alive(engine: Engine) -> None:
    """Raise what keeps `engine` from ever working again without help; loading and sleeping are no such thing.

    Raises:
        EngineNotReady: it failed to load.
        EngineDead: its process is gone, or it was closed.
        EngineHung: its process gives no sign of life; it may go on.
        EngineFaulted: a transition could not be rolled back.
    """
    if engine.status == "failed":
        raise EngineNotReady(f"The model failed to load: {_reason(engine)}")
    if engine.status in {"dead", "closed"}:
        raise EngineDead(f"The engine is {engine.status}: {_reason(engine)}")
    if engine.hang is not None:
        raise EngineHung(f"The engine hangs: {engine.hang}. It may go on by itself; POST /restart_engine ends it.")
    if engine.state.faulted is not None:
        raise EngineFaulted(f"The engine is faulted ({engine.state.faulted}); POST /wake_up tries to recover it.")


def _reason(engine: Engine) -> str:
    return engine.failure.message if engine.failure is not None else "it gave no reason."


def refuse_unless_serving(engine: Engine) -> None:
    """Raise what keeps a request from being served now.

    Raises:
        EngineNotReady: the model is loading.
        ModelSleeping: it is asleep, and the policy is to reject.
        ModelPaused: it is paused, and what comes is not held.
        ServerError: whatever `refuse_unless_alive` raises.
    """
    refuse_unless_alive(engine)
    if engine.status == "starting":
        raise EngineNotReady("The model is still loading; GET /ready answers 200 when it can serve.")
    if engine.is_sleeping and engine.config.on_sleeping_request == "reject":
        raise ModelSleeping
    if engine.state.refusing:
        raise ModelPaused


def require_task(context: ServerContext, tasks: str | tuple[str, ...], path: str) -> None:
    """Refuse a route that the model's task does not serve.

    Args:
        tasks: the one, or any of those, that do.

    Raises:
        InvalidRequest: names both tasks.
    """
    served = context.engine.info.task
    accepted = (tasks,) if isinstance(tasks, str) else tasks
    if served not in accepted:
        wanted = " or ".join(f"'{task}'" for task in accepted)
        raise InvalidRequest(
            f"{path} needs a model for the task {wanted}; {context.model_names[0]!r} is one for '{served}'."
        )


def needs_task(*tasks: str) -> Any:
    """A dependency of a route that only models for these tasks serve: it refuses before the body is looked at."""

    def check(request: Request) -> None:
        require_task(context_of(request), tasks, request.url.path)

    return Depends(check)


def require_sequences(config: ServerConfig, count: int, *, param: str) -> None:
    """Refuse more sequences, or inputs, than one request may have.

    Raises:
        InvalidRequest: says how many there are and may be.
    """
    if count > config.max_request_sequences:
        raise InvalidRequest(
            f"The request asks for {count:,} sequences (prompts × n, inputs, or pairs); at most "
            f"{config.max_request_sequences:,} are taken (--max-request-sequences). Send it in parts.",
            param=param,
        )


def require_characters(count: int, *, param: str) -> None:
    """Refuse more text than is encoded for one request.

    Raises:
        InvalidRequest: says how much there is and may be.
    """
    if count > MAX_CHARACTERS:
        raise InvalidRequest(
            f"The request has {count:,} characters to encode; at most {MAX_CHARACTERS:,} are taken.", param=param
        )


def require_prompt_tokens(count: int, *, param: str) -> None:
    """Refuse more prompt tokens, over all sequences, than are sent to the engine for one request.

    Raises:
        InvalidRequest: says how many there are and may be.
    """
    if count > MAX_PROMPT_TOKENS:
        raise InvalidRequest(
            f"The request has {count:,} prompt tokens over all of its sequences; at most {MAX_PROMPT_TOKENS:,} are "
            "taken. Lower n, or send it in parts.",
            param=param,
        )
