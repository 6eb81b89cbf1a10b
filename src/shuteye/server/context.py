"""What every route needs: the engine, the configuration, the metrics and the names of the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, cast

from fastapi import Depends
from starlette.requests import HTTPConnection

from shuteye.errors import ModelNotFound, QueueFull
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
    """What one app works with; made by `create_app`, kept in `app.state.context`."""

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
            served = ", ".join(repr(name) for name in self.model_names)
            raise ModelNotFound(f"The model {wanted!r} does not exist; this server serves {served}.", param="model")
        return wanted


def context_of(connection: HTTPConnection) -> ServerContext:
    """The context of the app that this request came to."""
    return cast(ServerContext, connection.app.state.context)


Context = Annotated[ServerContext, Depends(context_of)]
"""A route's parameter type that FastAPI fills in."""
