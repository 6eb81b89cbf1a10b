"""OpenTelemetry spans: one per HTTP request, below it queue, prefill and decode of each prompt; sleeps and wakes.

Imported only when spans are wanted. A W3C `traceparent` of the caller is honoured: https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shuteye import __version__
from shuteye.server.telemetry.timing import RequestTiming

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

UNTRACED = frozenset({"/health", "/ping", "/ready", "/metrics", "/version"})
"""Paths that probes and scrapers request all the time."""

EXPORT_TIMEOUT_S = 3.0
"""How long an unreachable collector is retried; a server that stops waits for it."""

_PROPAGATOR = TraceContextTextMapPropagator()


def otlp_tracer(endpoint: str, model_name: str) -> Tracer:
    """A tracer that sends spans in batches, from a thread of its own, as OTLP over HTTP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracer(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S), model_name)


class Tracer:
    """Makes the spans of one app.

    Args:
        batched: send spans later, many together; else each as it ends.
    """

    def __init__(self, exporter: SpanExporter, model_name: str, *, batched: bool = True) -> None:
        resource = Resource.create({"service.name": "shuteye", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        processor = BatchSpanProcessor(exporter) if batched else SimpleSpanProcessor(exporter)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("shuteye", __version__)
        self._model = model_name

    @contextmanager
    def request(self, scope: Scope) -> Iterator[Span]:
        """Around one HTTP request; spans made inside belong to it, and it belongs to the caller's, if it has one."""
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(
            f"{scope['method']} {scope['path']}",
            context=_PROPAGATOR.extract(carrier, context=Context()),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "url.path": scope["path"]},
        )
        token = attach(trace.set_span_in_context(span))
        try:
            yield span
        except BaseException as error:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            detach(token)
            span.end()

    def prompt(self, served: RequestTiming) -> None:
        """A span of the prompt, and one for each phase it came to; made when it has ended, at the times it had."""
        offset = _monotonic_to_epoch_ns()
        span = self._start("generate", served.arrived, offset)
        span.set_attributes(self._attributes(served))
        parent = trace.set_span_in_context(span)
        for name, (begin, end) in served.phases.items():
            phase = self._start(name, begin, offset, parent=parent)
            phase.end(_ns(end, offset))
        span.end(_ns(served.ended, offset))

    def _attributes(self, served: RequestTiming) -> dict[str, Any]:
        """Names from OpenTelemetry's conventions for generative AI, as far as there are any."""
        found = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": self._model,
            "gen_ai.response.id": served.request_id,
            "gen_ai.response.finish_reasons": served.outcome,
            "gen_ai.usage.input_tokens": served.num_prompt_tokens,
            "gen_ai.usage.output_tokens": served.num_output_tokens,
            "shuteye.num_cached_tokens": served.num_cached_tokens,
        }
        if served.first_token is not None:
            found["gen_ai.server.time_to_first_token"] = served.first_token - served.arrived
        return found

    def transition(self, kind: str, seconds: float, attributes: Mapping[str, str | int | float | bool]) -> None:
        """A span that ends now; a child of the request that called for it, if one did."""
        offset = _monotonic_to_epoch_ns()
        now = time.monotonic()
        span = self._start(kind, now - seconds, offset)
        span.set_attributes({f"shuteye.{name}": value for name, value in attributes.items()})
        if attributes.get("outcome") not in {"changed", "unchanged"}:
            span.set_status(Status(StatusCode.ERROR, str(attributes.get("outcome"))))
        span.end(_ns(now, offset))

    def _start(self, name: str, at: float, offset: int, *, parent: Context | None = None) -> Span:
        return self._tracer.start_span(name, context=parent, start_time=_ns(at, offset))

    def close(self) -> None:
        """Send what is left; blocks until the exporter gives up or has done it."""
        self._provider.shutdown()


def _monotonic_to_epoch_ns() -> int:
    return time.time_ns() - time.monotonic_ns()


def _ns(monotonic_s: float, offset: int) -> int:
    return int(monotonic_s * 1e9) + offset


class TraceRequests:
    """ASGI middleware: a span around every request that is not a probe; costs one comparison per chunk."""

    def __init__(self, app: ASGIApp, *, tracer: Tracer) -> None:
        self.app = app
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on inside its span."""
        if scope["type"] != "http" or scope["path"] in UNTRACED:
            await self.app(scope, receive, send)
            return
        with self.tracer.request(scope) as span:

            def send_noted(message: Message) -> Any:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    span.set_attribute("http.route", getattr(scope.get("route"), "path", ""))
                return send(message)

            await self.app(scope, receive, send_noted)
