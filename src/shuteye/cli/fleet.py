"""`shuteye fleet`: tries the scheduler of many models on a trace of requests, beside others' rules. Serves nothing."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number

from shuteye.cli.quantities import format_seconds, format_size, parse_size
from shuteye.cli.remote import AsJson
from shuteye.cli.terminal import show, show_json, table
from shuteye.cli.values import INTEGER, size_converter
from shuteye.errors import InvalidRequest
from shuteye.fleet.machine import ModelProfile
from shuteye.fleet.rivals import RIVALS
from shuteye.fleet.scheduler import Scheduler
from shuteye.fleet.settings import FleetSettings
from shuteye.fleet.simulation import Policy, Report, simulate
from shuteye.fleet.trace import GENERATORS, Arrival, first, read_trace

OURS = "shuteye"
POLICIES = (OURS, *RIVALS)
GIB = 1024**3
_DEFAULTS = FleetSettings()

app = App(
    name="fleet",
    help="Try the scheduler of many models without serving any.",
    help_epilogue="Example: shuteye fleet simulate skew --budget 3GiB",
)

Size = Parameter(converter=size_converter, metavar="SIZE", show_default=format_size)
Count = Parameter(validator=Number(gte=1))


@app.command(name="simulate", help_epilogue="Example: shuteye fleet simulate requests.csv --models models.toml")
def simulate_trace(
    trace: Annotated[
        str, Parameter(help=f"A CSV file with the columns time, model, tokens; or one of {', '.join(GENERATORS)}.")
    ],
    /,
    *,
    budget: Annotated[int, Size, Parameter(help="Memory for all models of one machine.")] = 3 * GIB,
    models: Annotated[
        Path | None, Parameter(help="A TOML file with a table for each model: awake-bytes, wake-s, …")
    ] = None,
    model_bytes: Annotated[int, Size, Parameter(help="What a model takes awake that --models does not name.")] = GIB,
    wake_s: Annotated[
        float, Parameter(help="How many seconds such a model takes to wake.", validator=Number(gte=0))
    ] = 1.0,
    policy: Annotated[
        tuple[str, ...],
        Parameter(
            help=f"Only this one, and others that are named so: {', '.join(POLICIES)}.", negative="", show_default=False
        ),
    ] = (),
    machines: Annotated[int, INTEGER, Count, Parameter(help="How many machines share the models.")] = 1,
    models_max: Annotated[
        int | None,
        INTEGER,
        Parameter(help="How many models those policies keep that count them; by default as many as they do."),
    ] = None,
    deadline_s: Annotated[
        float, Parameter(help="For how long a request can wait before it is refused.", validator=Number(gt=0))
    ] = 120.0,
    batch_factor: Annotated[
        float,
        Parameter(
            help="For how many times what a swap takes a rare model waits for one that has just woken; 0 for none.",
            validator=Number(gte=0),
        ),
    ] = _DEFAULTS.batch_factor,
    batch_wait_s: Annotated[
        float, Parameter(help="But no longer than so many seconds.", validator=Number(gte=0))
    ] = _DEFAULTS.batch_wait_s,
    min_awake_s: Annotated[
        float, Parameter(help="For how long shuteye keeps a model that has just woken.", validator=Number(gte=0))
    ] = _DEFAULTS.min_awake_s,
    requests: Annotated[int, INTEGER, Count, Parameter(help="How many requests of a trace that is made up.")] = 50_000,
    num_models: Annotated[
        int | None, INTEGER, Count, Parameter(help="How many models it asks for: 20, or five of skew.")
    ] = None,
    per_second: Annotated[
        float | None,
        Parameter(
            help="How many requests come in a second of it, on average: 2, or 10 of skew.", validator=Number(gt=0)
        ),
    ] = None,
    seed: Annotated[int, INTEGER, Parameter(help="Another seed, another trace.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run a trace of requests through the scheduler and through others' rules, and compare what that costs."""
    arrivals = _arrivals(trace, requests=requests, num_models=num_models, per_second=per_second, seed=seed)
    profiles = _profiles(arrivals, models, model_bytes, wake_s)
    settings = FleetSettings(batch_factor=batch_factor, batch_wait_s=batch_wait_s, min_awake_s=min_awake_s)
    reports = [
        simulate(
            name,
            [_policy(name, budget, settings, models_max) for _ in range(machines)],
            profiles,
            arrivals,
            budget_bytes=budget,
            deadline_s=deadline_s,
        )
        for name in _known(policy or POLICIES)
    ]
    if as_json:
        show_json([msgspec.to_builtins(report) for report in reports])
        return
    seconds = arrivals[-1].at if arrivals else 0.0
    show(f"{len(arrivals):,} requests for {len(profiles)} models in {seconds:,.0f} s on {format_size(budget)}")
    show(table(_COLUMNS, map(_row, reports)))


def _known(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in POLICIES:
            raise InvalidRequest(f"--policy must be one of {', '.join(POLICIES)}, got {name!r}.", param="policy")
    return names


def _policy(name: str, budget: int, settings: FleetSettings, models_max: int | None) -> Policy:
    if name == OURS:
        return Scheduler(budget, settings)
    rival = RIVALS[name](budget)
    if models_max is not None and math.isfinite(rival.models_max):
        rival.models_max = models_max
    return rival


# --- the trace ----------------------------------------------------------------------------------


def _arrivals(
    trace: str, *, requests: int, num_models: int | None, per_second: float | None, seed: int
) -> Sequence[Arrival]:
    generator = GENERATORS.get(trace)
    if generator is None:
        return _from_file(Path(trace))
    if trace == "skew" and num_models is not None:
        raise InvalidRequest("skew has five models; --num-models is for other traces.", param="num_models")
    given = {"num_models": num_models, "per_second": per_second}
    return first(generator(seed, **{name: one for name, one in given.items() if one is not None}), requests)


def _from_file(path: Path) -> Sequence[Arrival]:
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            return list(read_trace(lines))
    except (OSError, UnicodeError) as error:
        names = ", ".join(GENERATORS)
        raise InvalidRequest(
            f"{path} cannot be read: {error}. TRACE is a CSV file, or {names}.", param="trace"
        ) from error


# --- the models ---------------------------------------------------------------------------------


def _profiles(
    arrivals: Iterable[Arrival], models: Path | None, model_bytes: int, wake_s: float
) -> tuple[ModelProfile, ...]:
    """Those of the file, and one for each other model that the trace asks for."""
    found = {} if models is None else _read_models(models)
    for name in sorted({arrival.model for arrival in arrivals} - found.keys()):
        found[name] = ModelProfile(name=name, awake_bytes=model_bytes, wake_s=(wake_s, wake_s, wake_s))
    return tuple(found.values())


def _read_models(path: Path) -> dict[str, ModelProfile]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read as TOML: {error}.", param="models") from error
    return {name: _profile(path, name, one) for name, one in document.items()}


def _profile(path: Path, name: str, given: object) -> ModelProfile:
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{name} in {path} must be a table: write [{name}], and its keys below.", param="models")
    try:
        return msgspec.convert({"name": name} | dict(map(_field, given.items())), _Profile).whole()
    except (ValueError, msgspec.ValidationError) as error:
        raise InvalidRequest(f"[{name}] in {path}: {error}", param="models") from error


def _field(item: tuple[str, Any]) -> tuple[str, Any]:
    """A key as the profile has it, and sizes as bytes."""
    key, value = item[0].replace("-", "_"), item[1]
    if key.endswith("_bytes"):
        value = [_size(one) for one in value] if isinstance(value, list) else _size(value)
    return key, value


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


class _Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model in the file: one number of seconds or bytes stands for all depths."""

    name: str
    awake_bytes: int
    growth_bytes: int = 0
    residual_bytes: int | tuple[int, int, int] = 0
    wake_s: float | tuple[float, float, float] = 1.0
    sleep_s: float = 0.1
    tokens_per_s: float = 100.0
    pinned: bool = False
    priority: int = 0

    def whole(self) -> ModelProfile:
        """The model, with a number for each depth."""
        residual = self.residual_bytes if isinstance(self.residual_bytes, tuple) else (self.residual_bytes,) * 3
        wake_s = self.wake_s if isinstance(self.wake_s, tuple) else (self.wake_s,) * 3
        others = {name: getattr(self, name) for name in _SAME}
        return ModelProfile(residual_bytes=residual, wake_s=wake_s, **others)


_SAME = ("name", "awake_bytes", "growth_bytes", "sleep_s", "tokens_per_s", "pinned", "priority")


# --- what is shown ------------------------------------------------------------------------------

_COLUMNS = (
    *("POLICY", "LOADS ", "EVICTED ", "WHILE ACTIVE ", "REFUSED ", "KILLED ", "PEAK "),
    *("WAIT P50 ", "P95 ", "P99 ", "MAX "),
)


def _row(report: Report) -> tuple[str, ...]:
    counts = (report.loads, report.evictions, report.active_evictions, report.refused, report.killed)
    waits = (format_seconds(report.waits_s[name]) for name in ("p50", "p95", "p99", "max"))
    return (report.policy, *(f"{count:,}" for count in counts), format_size(report.peak_bytes), *waits)
