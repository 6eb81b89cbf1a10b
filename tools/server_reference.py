"""Writes docs/reference/routes.md, compatibility.md, metrics.md and errors.md: what the server says of itself.

Knows nothing of any of them by name; `tests/server/test_server_reference.py` checks that the pages are up to date.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from shuteye import errors
from shuteye.config import EngineConfig
from shuteye.frontend.async_engine import AsyncEngine
from shuteye.server.app import create_app
from shuteye.server.config import ServerConfig
from shuteye.server.context import contexts_of
from shuteye.server.http.admission import ModelRoute
from shuteye.server.http.auth import ControlRoute, InferenceRoute
from shuteye.server.http.errors import RETRY_AFTER_S

PAGES = Path(__file__).resolve().parent.parent / "docs" / "reference"
PEERS = Path(__file__).resolve().parent / "route_peers.toml"

GROUPS = (
    (ModelRoute, "Routes that need the weights", "the API key, if there is one", "by `--on-sleeping-request`"),
    (ControlRoute, "Control routes", "the admin key, or anyone in development mode", "409 if forbidden"),
    (InferenceRoute, "Routes that need none", "the API key, if there is one", "as when awake"),
    (object, "Open routes", "anyone", "as when awake, except `/ready`: 503"),
)
"""Class of route, heading, who may call, what it does asleep; the first that fits counts."""


def render() -> dict[Path, str]:
    """Every page, by where it belongs."""
    app = create_app(
        AsyncEngine(EngineConfig(enable_sleep_mode=True)), ServerConfig(api_key="inference", admin_api_key="admin")
    )
    metrics = contexts_of(app).default.metrics
    return {
        PAGES / "routes.md": _page("Routes", "the docstrings of the routes", _routes(app)),
        PAGES / "compatibility.md": _page(
            "Who else has these routes", "the server's routes and `tools/route_peers.toml`", _compatibility(app)
        ),
        PAGES / "metrics.md": _page("Metrics", "the metrics themselves", _metrics(metrics.registry)),
        PAGES / "errors.md": _page("Errors", "the exceptions in `errors.py`", _errors()),
    }


def _page(title: str, source: str, lines: Iterable[str]) -> str:
    origin = f"Written by `make docs` from {source}; edit those, not this page."
    return "\n".join([f"# {title}", "", origin, "", *lines])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n\n")[0].replace("\n", " ")


# --- routes -------------------------------------------------------------------------------------


def _routes(app: FastAPI) -> Iterator[str]:
    yield "What requests and answers look like is in the server's own OpenAPI document: GET `/openapi.json`, `/docs`."
    yield ""
    found: dict[str, dict[str, str]] = {heading: {} for _kind, heading, _who, _asleep in GROUPS}
    for method, path, route in _own_routes(app):
        heading = next(one[1] for one in GROUPS if isinstance(route, one[0]))
        found[heading].setdefault(f"{method} `{path}`", _first_line(route.endpoint))
    for _kind, heading, who, asleep in GROUPS:
        yield from (f"## {heading}", "", f"Open to {who}. While the model sleeps: {asleep}.", "")
        rows = sorted(found[heading].items(), key=lambda row: row[0].split()[::-1])
        yield from _table(("route", "what it does"), rows)


def _own_routes(app: FastAPI) -> Iterator[tuple[str, str, Any]]:
    """Method, path and route of all that this package answers; of two with one path, the first one does."""
    for route in iter_route_contexts(app.routes):
        endpoint = getattr(route.original_route, "endpoint", None)
        if endpoint is not None and endpoint.__module__.startswith("shuteye."):
            for method in sorted((route.methods or set()) - {"HEAD"}):
                yield method, route.path, route.original_route


# --- who else has them --------------------------------------------------------------------------


def _compatibility(app: FastAPI) -> Iterator[str]:
    told = tomllib.loads(PEERS.read_text())
    peers, own = told["peer"], told["ours"]["routes"]
    paths = {f"{method} {path}": re.sub(r"{[^}]*}", "{}", f"{method} {path}") for method, path, _ in _own_routes(app)}
    known = {route for peer in peers for route in peer["routes"]} | {*own}
    require_told({*paths.values()}, known=known, own={*own})
    yield "That a route is there says nothing of its fields: those of vLLM are compared in [its page](../vllm.md)."
    yield "Read in November 2026 from the sources below."
    yield ""
    rows = []
    for route, plain in sorted(paths.items(), key=lambda one: one[0].split()[::-1]):
        method, path = route.split()
        rows.append((f"{method} `{path}`", *("yes" if plain in peer["routes"] else "–" for peer in peers)))
    yield from _table(("route", *(peer["name"] for peer in peers)), rows)
    for peer in peers:
        missing = sorted(route for route in peer["routes"] if route not in paths.values())
        if peer.get("complete"):
            listed = ", ".join(f"{route.split()[0]} `{route.split()[1]}`" for route in missing)
            yield from (f"Routes of {peer['name']} that are not here: {listed}.", "")
    yield from _table(("column", "read from"), [(peer["name"], peer["source"]) for peer in peers])


def require_told(routes: set[str], *, known: set[str], own: set[str]) -> None:
    """Refuse a table that says nothing of a route, or speaks of one of ours that is gone.

    Raises:
        SystemExit: names them.
    """
    silent, gone = sorted(routes - known), sorted(own - routes)
    if silent:
        raise SystemExit(f"{PEERS.name} does not say who else has {', '.join(silent)}; if nobody, list it in [ours].")
    if gone:
        raise SystemExit(f"{PEERS.name} lists as ours {', '.join(gone)}, which this server does not have.")


# --- metrics ------------------------------------------------------------------------------------


def _metrics(registry: CollectorRegistry) -> Iterator[str]:
    yield "GET `/metrics` answers in Prometheus' text format, awake or asleep. Every series has the label `model_name`."
    yield "Names after the prefix are vLLM's where vLLM has the metric. Histograms have `_bucket`, `_sum` and `_count`."
    yield ""
    yield from _table(("metric", "type", "labels", "what it says"), sorted(_metric_rows(registry)))


def _metric_rows(registry: CollectorRegistry) -> Iterator[tuple[str, str, str, str]]:
    for collector in registry._collector_to_names:
        if isinstance(collector, MetricWrapperBase):
            yield _metric_row(collector._name, collector._type, collector._labelnames, collector._documentation)
        else:
            for family in collector.collect():
                yield _metric_row(family.name, family.type, family._labelnames, family.documentation)


def _metric_row(name: str, kind: str, labels: Sequence[str], text: str) -> tuple[str, str, str, str]:
    shown = f"`{name}_total`" if kind == "counter" else f"`{name}`"
    return (shown, kind, ", ".join(f"`{label}`" for label in labels if label != "model_name"), text)


# --- errors -------------------------------------------------------------------------------------


def _errors() -> Iterator[str]:
    yield 'Every error answers `{"error": {"message", "type", "param", "code"}}`; `ModelSleepingError` has no `param`.'
    yield "`Retry-After` is in seconds. In Python, the engine and `shuteye.client` raise the same classes."
    yield ""
    yield from _table(
        ("status", "type", "class", "Retry-After", "when"),
        sorted(map(_error_row, _leaves(errors.ShuteyeError)), key=lambda row: (row[0], row[1], row[2])),
    )


def _leaves(root: type[errors.ShuteyeError]) -> Iterator[type[errors.ShuteyeError]]:
    """Every class but those that only group others."""
    for child in root.__subclasses__():
        if child not in (errors.ClientError, errors.ServerError):
            yield child
        yield from _leaves(child)


def _error_row(kind: type[errors.ShuteyeError]) -> tuple[str, ...]:
    retry = next((str(seconds) for one, seconds in RETRY_AFTER_S.items() if issubclass(kind, one)), "")
    return (str(kind.status_code), f"`{kind.error_type}`", f"`{kind.__name__}`", retry, _first_line(kind))


if __name__ == "__main__":
    PAGES.mkdir(parents=True, exist_ok=True)
    for path, text in render().items():
        path.write_text(text, encoding="utf-8")
