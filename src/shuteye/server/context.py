"""What every route needs: the engine, the configuration, the metrics and the names of the model.

An app that serves several models has one of these for each; which one a request is for is chosen before its route runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, cast

from fastapi import Depends
from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from shuteye.errors import InvalidRequest, ModelNotFound, QueueFull
from shuteye.frontend.engine import Engine
from shuteye.server.config import ServerConfig
from shuteye.server.http.middleware import PendingBodies
from shuteye.server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from shuteye.server.telemetry.tracing import Tracer


@dataclass(slots=True)
class Loading:
    """How the engine's first start went: `done` when the model was loaded, `failed` when it ended in an error."""

    done: bool = False
    failed: bool = False


@dataclass(slots=True)
class Stopping:
    """Whether a stop has been requested; from then on the server begins nothing new.

    Attributes:
        begin: requests one, saying who does; None where somebody else runs the server.
    """

    begun: bool = False
    begin: Callable[[str], None] | None = None


@dataclass(slots=True)
class Listening:
    """Where the server may be asked, such as http://127.0.0.1:8000; empty where somebody else listens for it."""

    url: str = ""


@dataclass(slots=True)
class AudioInFlight:
    """How much decoded audio is held for requests; a small file may be an hour, which takes 230 MB."""

    seconds: float = 0.0

    @contextmanager
    def holding(self, seconds: float, *, limit_s: float) -> Iterator[None]:
        """Count one audio request for as long as this lasts.

        Raises:
            QueueFull: together with what is held already, it is over the limit; one request alone never is.
        """
        if self.seconds > 0 and self.seconds + seconds > limit_s:
            raise QueueFull(f"{self.seconds:,.0f} seconds of audio are being processed already; try again later.")
        self.seconds += seconds
        try:
            yield
        finally:
            self.seconds -= seconds


@dataclass(frozen=True, slots=True)
class ServerContext:
    """What an app works with for one model; made by `create_app`.

    Those of one app share all but the engine, its metrics, how it loaded, and what the config says of the model.
    """

    engine: Engine
    config: ServerConfig
    metrics: Metrics
    tracer: Tracer | None = None
    loading: Loading = field(default_factory=Loading)
    stopping: Stopping = field(default_factory=Stopping)
    listening: Listening = field(default_factory=Listening)
    audio: AudioInFlight = field(default_factory=AudioInFlight)
    bodies: PendingBodies = field(default_factory=PendingBodies)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that requests may use; the first is the one answers carry by default."""
        return self.config.served_model_name or (self.engine.config.model,)

    def served_name(self, wanted: str | None) -> str:
        """`wanted`, or the first served name if None.

        Raises:
            ModelNotFound: no such name is served; the message lists those that are.
        """
        if wanted is None:
            return self.model_names[0]
        if wanted not in self.model_names:
            raise _not_served(wanted, self.model_names)
        return wanted


class Contexts:
    """The models of one app, the default one first.

    Raises:
        InvalidRequest: two of them have the same name.
    """

    def __init__(self, contexts: Sequence[ServerContext]) -> None:
        self._contexts = tuple(contexts)
        self._by_name: dict[str, ServerContext] = {}
        for context in contexts:
            for name in context.model_names:
                if name in self._by_name:
                    raise InvalidRequest(f"Two models are served as {name!r}; give one of them another name.")
                self._by_name[name] = context

    def __iter__(self) -> Iterator[ServerContext]:
        """In the order in which they were given."""
        return iter(self._contexts)

    @property
    def default(self) -> ServerContext:
        """The only one, or the first: for requests that name none."""
        return self._contexts[0]

    @property
    def are_several(self) -> bool:
        """Whether requests have a choice."""
        return len(self._contexts) > 1

    def named(self, name: str) -> ServerContext:
        """The one with this name.

        Raises:
            ModelNotFound: no such name is served; the message lists those that are.
        """
        if name not in self._by_name:
            raise _not_served(name, tuple(self._by_name))
        return self._by_name[name]


def _not_served(name: str, served: Sequence[str]) -> ModelNotFound:
    listed = ", ".join(map(repr, served))
    return ModelNotFound(f"The model {name!r} does not exist; this server serves {listed}.", param="model")


CHOSEN = "shuteye.context"
"""Where a request's scope has the context of the model that it is for."""


def contexts_of(app: Starlette) -> Contexts:
    """All models of an app."""
    return cast(Contexts, app.state.contexts)


def context_of(connection: HTTPConnection) -> ServerContext:
    """The context of the model that this request is for."""
    chosen = connection.scope.get(CHOSEN)
    return contexts_of(connection.app).default if chosen is None else cast(ServerContext, chosen)


Context = Annotated[ServerContext, Depends(context_of)]
"""A route's parameter type that FastAPI fills in."""
