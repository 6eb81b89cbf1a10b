"""Prometheus metrics of one app: its requests as timed here, and the engine's last pushed snapshot.

Knows nothing of routes. Names are vLLM's with the prefix `shuteye_`; the colon of `vllm:` belongs to recording rules.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from shuteye.errors import ClientError
from shuteye.outputs import EngineState, Residency, SchedulerStats, SleepReport, WakeReport

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from shuteye.outputs import RequestOutput

LATENCY_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
REQUEST_BUCKETS_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0)
TRANSITION_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

Report = TypeVar("Report")


class Snapshots(Protocol):
    """The part of an engine that metrics read: what it pushed last."""

    @property
    def state(self) -> EngineState:
        """Where every tag is."""
        ...

    @property
    def stats(self) -> SchedulerStats:
        """Counters and gauges of the scheduler."""
        ...


class Metrics:
    """All metrics of one app, in a registry of its own."""

    def __init__(self, engine: Snapshots, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        labels = ("model_name",)
        self._finished = Counter(
            "shuteye_request_finished",
            "Requests finished, by reason: stop, length, abort, disconnected, refused or error.",
            (*labels, "finished_reason"),
            registry=self.registry,
        )
        self._first_token = self._latency("shuteye_time_to_first_token_seconds", "Arrival to first token.")
        self._inter_token = self._latency("shuteye_inter_token_latency_seconds", "Time between tokens of a choice.")
        self._whole = self._latency(
            "shuteye_e2e_request_latency_seconds", "Arrival to last token.", buckets=REQUEST_BUCKETS_S
        )
        self._transitions = Counter(
            "shuteye_transitions",
            "Transitions asked for over HTTP, by kind and outcome: changed, unchanged, or the error's class.",
            (*labels, "transition", "outcome"),
            registry=self.registry,
        )
        self._transition_time = Histogram(
            "shuteye_transition_seconds",
            "Duration of transitions that succeeded.",
            (*labels, "transition"),
            buckets=TRANSITION_BUCKETS_S,
            registry=self.registry,
        )
        self._freed = Counter(
            "shuteye_sleep_freed_bytes", "Bytes given back by sleeping, as measured.", labels, registry=self.registry
        )
        self._residual = Gauge(
            "shuteye_sleep_residual_bytes",
            "Bytes that stayed in the process at the last sleep.",
            labels,
            registry=self.registry,
        )
        self.registry.register(_SnapshotCollector(engine, model_name))
        self.last_wake_s: float | None = None

    def _latency(self, name: str, text: str, *, buckets: tuple[float, ...] = LATENCY_BUCKETS_S) -> Histogram:
        return Histogram(name, text, ("model_name",), buckets=buckets, registry=self.registry)

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    @contextmanager
    def request(self) -> Iterator[RequestTimer]:
        """Times one prompt from here on; every choice that finishes is counted, and so is a prompt that is lost."""
        timer = RequestTimer(self)
        try:
            yield timer
        except GeneratorExit:
            self.count_finished("disconnected")
            raise
        except ClientError:
            self.count_finished("refused")
            raise
        except BaseException as error:
            self.count_finished("disconnected" if _is_cancellation(error) else "error")
            raise

    def count_finished(self, reason: str) -> None:
        """One more request that ended for `reason`."""
        self._finished.labels(self._model, reason).inc()

    async def transition(self, kind: str, work: Awaitable[Report]) -> Report:
        """The result of `work`, timed and counted as a transition of this kind."""
        started = time.perf_counter()
        try:
            report = await work
        except BaseException as error:
            self._transitions.labels(self._model, kind, type(error).__name__).inc()
            raise
        seconds = time.perf_counter() - started
        outcome = "changed" if getattr(report, "changed", True) else "unchanged"
        self._transitions.labels(self._model, kind, outcome).inc()
        self._transition_time.labels(self._model, kind).observe(seconds)
        self._keep_figures(report)
        return report

    def _keep_figures(self, report: object) -> None:
        if isinstance(report, SleepReport) and report.changed:
            self._freed.labels(self._model).inc(report.freed_bytes)
            self._residual.labels(self._model).set(report.residual_bytes)
        if isinstance(report, WakeReport) and report.changed:
            self.last_wake_s = report.seconds

    def observe_first_token(self, seconds: float) -> None:
        """A request's first token came."""
        self._first_token.labels(self._model).observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        """A choice's next token came."""
        self._inter_token.labels(self._model).observe(seconds)

    def observe_whole(self, seconds: float) -> None:
        """A request's last token came."""
        self._whole.labels(self._model).observe(seconds)


def _is_cancellation(error: BaseException) -> bool:
    return not isinstance(error, Exception)


class RequestTimer:
    """Turns the outputs of one prompt into latencies; tokens that come together share their interval."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        self._last: dict[int, float] = {}

    def observe(self, output: RequestOutput) -> None:
        """Account for one delta output."""
        now = time.perf_counter()
        for completion in output.outputs:
            if completion.token_ids:
                self._observe_tokens(completion.index, len(completion.token_ids), now)
            if completion.finish_reason is not None:
                self._metrics.count_finished(completion.finish_reason)
        if output.finished:
            self._metrics.observe_whole(now - self._started)

    def _observe_tokens(self, index: int, count: int, now: float) -> None:
        if not self._last:
            self._metrics.observe_first_token(now - self._started)
        previous = self._last.get(index)
        if previous is not None:
            for _ in range(count):
                self._metrics.observe_inter_token((now - previous) / count)
        self._last[index] = now


@dataclass(frozen=True, slots=True, eq=False)  # registries hash collectors by identity
class _SnapshotCollector(Collector):
    """Reads the engine's last snapshot when scraped; no round trip, so it works while asleep or busy."""

    engine: Snapshots
    model_name: str

    def collect(self) -> Iterable[Metric]:
        yield from self._of_scheduler(self.engine.stats)
        yield from self._of_sleep(self.engine.state)

    def _of_scheduler(self, stats: SchedulerStats) -> Iterable[Metric]:
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("shuteye_num_requests_running", "Requests in the running batch.", stats.num_running)
        yield self._gauge("shuteye_num_requests_waiting", "Requests waiting to run.", stats.num_waiting)
        yield self._gauge("shuteye_kv_cache_usage_ratio", "Share of KV blocks in use, 0 to 1.", used)
        yield self._counter("shuteye_prompt_tokens", "Prompt tokens computed.", stats.num_prompt_tokens_total)
        yield self._counter("shuteye_generation_tokens", "Tokens generated.", stats.num_generation_tokens_total)
        yield self._counter(
            "shuteye_prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.num_prefix_queries_total
        )
        yield self._counter(
            "shuteye_prefix_cache_hits", "Tokens found in the prefix cache.", stats.num_prefix_hits_total
        )
        yield self._counter("shuteye_num_preemptions", "Requests preempted.", stats.num_preemptions_total)

    def _of_sleep(self, state: EngineState) -> Iterable[Metric]:
        yield self._gauge("shuteye_is_sleeping", "1 until every tag is resident and loaded.", float(state.is_sleeping))
        yield self._gauge("shuteye_is_paused", "1 while a pause is in force.", float(state.paused))
        residency = GaugeMetricFamily(
            "shuteye_tag_residency", "1 for where a tag's bytes are.", labels=("model_name", "tag", "residency")
        )
        resident = GaugeMetricFamily(
            "shuteye_tag_resident_bytes", "Physical memory a tag holds.", labels=("model_name", "tag")
        )
        for tag in state.tags:
            resident.add_metric((self.model_name, tag.tag), tag.resident_bytes)
            for place in get_args(Residency):
                residency.add_metric((self.model_name, tag.tag, place), float(tag.residency == place))
        yield residency
        yield resident

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self.model_name,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self.model_name,), value)
        return family
