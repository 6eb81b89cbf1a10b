"""Prometheus metrics of one app: what is counted and timed here, and the engine's last pushed snapshot.

The engine is never asked, so that scraping works while it is asleep or busy. Names are vLLM's with the prefix
`shuteye_`; the colon of `vllm:` belongs to recording rules.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from shuteye.config import EngineConfig
from shuteye.errors import ClientError, ShuteyeError
from shuteye.frontend.engine import KnownEngine
from shuteye.server.telemetry.exposition import exposition_of
from shuteye.server.telemetry.names import MetricsPrefix, named
from shuteye.server.telemetry.timing import RequestTimer, RequestTiming
from shuteye.state import (
    PREEMPTION_BOUNDS,
    STEP_TOKEN_BOUNDS,
    BucketCounts,
    EngineState,
    SchedulerStats,
    SleepReport,
    TagResidency,
    UpdateReport,
    WakeReport,
)

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from starlette.types import Scope

    from shuteye.server.telemetry.tracing import Tracer

logger = logging.getLogger("shuteye.requests")

LATENCY_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
REQUEST_BUCKETS_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0)
TRANSITION_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Those that may be a label; each series takes memory for ever, so that no caller may make one up."""

N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
TOKEN_BUCKETS = tuple(float(2**power) for power in range(18))

CALL, REQUEST = "call", "request"
"""What caused a transition: somebody's call, or a request that found the model asleep (policy `wake`)."""

SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
"""vLLM's names of the levels: awake, level 1, level 2."""

Report = TypeVar("Report")


class Metrics:
    """All metrics of one app, in a registry of its own.

    Args:
        tracer: makes spans of prompts and transitions, too.
        log_requests: log a line for every prompt that was served.
        names: which prefix the names have, `shuteye_` or `vllm:`, or each metric under both.

    Attributes:
        num_in_flight: prompts, inputs and recordings that are worked on, or wait to be.
    """

    def __init__(
        self,
        engine: KnownEngine,
        model_name: str,
        *,
        tracer: Tracer | None = None,
        log_requests: bool = False,
        names: MetricsPrefix = "shuteye",
    ) -> None:
        self.registry = CollectorRegistry()
        self.num_in_flight = 0
        self._model = model_name
        self._tracer = tracer
        self._log_requests = log_requests
        self._names = names
        self._last_wake: tuple[float, int] | None = None  # seconds, and bytes of weights that came back
        self._define_requests()
        self._define_transitions()
        self.registry.register(SnapshotCollector(engine, model_name))

    def _define_requests(self) -> None:
        self._answers = self._counter(
            "shuteye_http_requests", "HTTP requests answered, by route and status.", "method", "path", "status"
        )
        self._success = self._counter(
            "shuteye_request_success", "Choices that ended in order: stop, length or abort.", "finished_reason"
        )
        self._failure = self._counter(
            "shuteye_request_failure",
            "Prompts that were lost: disconnected (the client went), refused (a bad value) or error.",
            "reason",
        )
        self._first_token = self._latency("shuteye_time_to_first_token_seconds", "Arrival to first token.")
        self._inter_token = self._latency("shuteye_inter_token_latency_seconds", "Time between tokens of a choice.")
        self._whole = self._whole_request("shuteye_e2e_request_latency_seconds", "Arrival to last token.")
        self._phases = {
            "queue": self._whole_request("shuteye_request_queue_time_seconds", "Arrival to a place in the batch."),
            "prefill": self._whole_request("shuteye_request_prefill_time_seconds", "That place to the first token."),
            "decode": self._whole_request("shuteye_request_decode_time_seconds", "First to last token."),
        }
        self._inference = self._whole_request(
            "shuteye_request_inference_time_seconds", "A place in the batch to the last token."
        )
        self._params = {
            "n": self._histogram("shuteye_request_params_n", "Choices asked for.", buckets=N_BUCKETS),
            "max_tokens": self._histogram(
                "shuteye_request_params_max_tokens", "Most tokens asked for, where it was said.", buckets=TOKEN_BUCKETS
            ),
        }
        self._num_prompt_tokens = self._histogram(
            "shuteye_request_prompt_tokens", "Tokens of a prompt.", buckets=TOKEN_BUCKETS
        ).labels(self._model)
        self._num_output_tokens = self._histogram(
            "shuteye_request_generation_tokens", "Tokens generated for a prompt.", buckets=TOKEN_BUCKETS
        ).labels(self._model)

    def _define_transitions(self) -> None:
        self._transitions = self._counter(
            "shuteye_transitions",
            "Transitions by kind, by outcome (changed, unchanged, or the error's class), and by what caused them "
            "(call, or request: policy wake).",
            "transition",
            "outcome",
            "cause",
        )
        self._transition_time = self._histogram(
            "shuteye_transition_seconds",
            "Duration of transitions that succeeded.",
            "transition",
            buckets=TRANSITION_BUCKETS_S,
        )
        self._freed = self._counter("shuteye_sleep_freed_bytes", "Bytes given back by sleeping, as measured.")
        self._restored = self._counter("shuteye_wake_restored_bytes", "Bytes mapped again by waking, as measured.")
        self._updated = self._counter("shuteye_weights_updated_bytes", "Bytes written by weight updates and reloads.")
        self._residual = Gauge(
            "shuteye_sleep_residual_bytes",
            "Bytes that stayed in the process at the last sleep.",
            ("model_name",),
            registry=self.registry,
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("model_name", *labels), buckets=buckets, registry=self.registry)

    def _latency(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, buckets=LATENCY_BUCKETS_S).labels(self._model)

    def _whole_request(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, buckets=REQUEST_BUCKETS_S).labels(self._model)

    def exposition(self, others: Iterable[Metrics] = ()) -> bytes:
        """Everything, in Prometheus' text format, and with it the metrics of `others`, each family once."""
        return named(exposition_of([self.registry, *(other.registry for other in others)]), self._names)

    # --- requests -------------------------------------------------------------------------------

    def count_answer(self, scope: Scope, status: int) -> None:
        """An HTTP request is being answered; paths that no route has are counted together, as are unusual methods."""
        path = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._answers.labels(self._model, "" if path == "other" else method, path, str(status)).inc()

    @contextmanager
    def request(self) -> Iterator[RequestTimer]:
        """Times one prompt from here on; every choice that finishes is counted, and so is a prompt that is lost."""
        timer = RequestTimer(self._observe_tokens, self._observe_end)
        self.num_in_flight += 1
        try:
            yield timer
        except GeneratorExit:
            timer.lost("disconnected")
            raise
        except ClientError:
            timer.lost("refused")
            raise
        except BaseException as error:
            timer.lost("error" if isinstance(error, Exception) else "disconnected")
            raise
        finally:
            self.num_in_flight -= 1

    def observe_params(self, *, n: int, max_tokens: int | None) -> None:
        """What a request to generate asks for, once per prompt."""
        self._params["n"].labels(self._model).observe(n)
        if max_tokens is not None:
            self._params["max_tokens"].labels(self._model).observe(max_tokens)

    def _observe_tokens(self, seconds: float, count: int) -> None:
        for _ in range(count):
            self._inter_token.observe(seconds)

    def _observe_end(self, served: RequestTiming, failure: str | None) -> None:
        if failure is None:
            self._count_served(served)
        else:
            self._failure.labels(self._model, failure).inc()
        if self._tracer is not None:
            self._tracer.prompt(served)
        if self._log_requests:
            _log(served)

    def _count_served(self, served: RequestTiming) -> None:
        for reason in served.outcome:
            self._success.labels(self._model, reason).inc()
        self._whole.observe(served.ended - served.arrived)
        if served.first_token is not None:
            self._first_token.observe(served.first_token - served.arrived)
        for name, (begin, end) in served.phases.items():
            self._phases[name].observe(end - begin)
        if "prefill" in served.phases:
            self._inference.observe(served.ended - served.phases["prefill"][0])
        self._num_prompt_tokens.observe(served.num_prompt_tokens)
        self._num_output_tokens.observe(served.num_output_tokens)

    # --- transitions ----------------------------------------------------------------------------

    @property
    def last_wake_s(self) -> float | None:
        """How long the last wake took that brought weights back, whatever caused it."""
        return self._last_wake[0] if self._last_wake else None

    def expected_wake_s(self, restore_bytes: int) -> float | None:
        """How long bringing `restore_bytes` of weights back should take, at the last wake's pace; None if unknown."""
        if self._last_wake is None or restore_bytes == 0:
            return None
        seconds, restored_bytes = self._last_wake
        return seconds * (restore_bytes / restored_bytes)

    def next_wake_s(self, state: EngineState) -> float | None:
        """How long waking from `state` should take; None if unknown, or if nothing must be brought back."""
        return self.expected_wake_s(state.restore_bytes)

    async def transition(self, kind: str, work: Awaitable[Report]) -> Report:
        """The result of `work`, timed and counted as a transition of this kind."""
        started = time.perf_counter()
        try:
            report = await work
        except BaseException as error:
            self._count_transition(kind, error, time.perf_counter() - started, cause=CALL)
            raise
        self._count_transition(kind, report, time.perf_counter() - started, cause=CALL)
        return report

    def on_auto_wake(self, outcome: WakeReport | ShuteyeError) -> None:
        """A wake has ended that a request caused (policy `wake`)."""
        self._count_transition("wake_up", outcome, getattr(outcome, "seconds", 0.0), cause=REQUEST)

    def _count_transition(self, kind: str, outcome: object, seconds: float, *, cause: str) -> None:
        failed = isinstance(outcome, BaseException)
        how = type(outcome).__name__ if failed else "changed" if getattr(outcome, "changed", True) else "unchanged"
        self._transitions.labels(self._model, kind, how, cause).inc()
        if not failed:
            self._transition_time.labels(self._model, kind).observe(seconds)
            self._keep_figures(outcome)
        if self._tracer is not None:
            self._tracer.transition(kind, seconds, {"outcome": how, "cause": cause} | _figures_of(outcome))

    def _keep_figures(self, report: object) -> None:
        if isinstance(report, SleepReport) and report.changed:
            self._freed.labels(self._model).inc(report.freed_bytes)
            self._residual.labels(self._model).set(report.residual_bytes)
        if isinstance(report, WakeReport) and report.changed:
            self._restored.labels(self._model).inc(report.restored_bytes)
            self._keep_pace(report)
        if isinstance(report, UpdateReport):
            self._updated.labels(self._model).inc(report.updated_bytes)

    def _keep_pace(self, report: WakeReport) -> None:
        """Remember a wake that brought weights back; not one of level 0, of the KV cache alone, or to blank weights."""
        restored = sum(
            one.restored_bytes for one in report.tags if one.tag == "weights" and one.residency == "resident"
        )
        if restored > 0:
            self._last_wake = (report.seconds, restored)


def _figures_of(report: object) -> dict[str, Any]:
    """What a span says of a transition's report."""
    names = ("level", "freed_bytes", "residual_bytes", "restored_bytes", "verified", "updated_bytes")
    return {name: getattr(report, name) for name in names if hasattr(report, name)}


def _log(served: RequestTiming) -> None:
    """One line for one prompt, without its text."""
    seconds = served.ended - served.arrived
    phases = {f"{name}_s": round(end - begin, 6) for name, (begin, end) in served.phases.items()}
    logger.info(
        "%s: %d tokens in (%d cached), %d out, %.3f s",
        " ".join(served.outcome),
        served.num_prompt_tokens,
        served.num_cached_tokens,
        served.num_output_tokens,
        seconds,
        extra={
            "outcome": served.outcome,
            "num_prompt_tokens": served.num_prompt_tokens,
            "num_cached_tokens": served.num_cached_tokens,
            "num_output_tokens": served.num_output_tokens,
            "seconds": round(seconds, 6),
            **phases,
        },
    )


@dataclass(frozen=True, slots=True, eq=False)  # registries hash collectors by identity
class SnapshotCollector(Collector):
    """Gauges and counters of one engine."""

    engine: KnownEngine
    model_name: str

    def collect(self) -> Iterable[Metric]:
        """All families, as of now."""
        yield from self._of_scheduler(self.engine.stats)
        yield from self._of_cache(self.engine.config, self.engine.stats)
        yield from self._of_sleep(self.engine.state)

    def _of_scheduler(self, stats: SchedulerStats) -> Iterable[Metric]:
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("shuteye_num_requests_running", "Sequences in the running batch.", stats.num_running)
        yield self._gauge(
            "shuteye_num_requests_waiting", "Sequences waiting for a place in it, or for the gate.", stats.num_waiting
        )
        yield self._gauge("shuteye_kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used)
        yield self._counter("shuteye_prompt_tokens", "Prompt tokens taken in.", stats.num_prompt_tokens_total)
        yield self._counter("shuteye_generation_tokens", "Tokens generated.", stats.num_generation_tokens_total)
        yield self._counter(
            "shuteye_prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.num_prefix_queries_total
        )
        yield self._counter(
            "shuteye_prefix_cache_hits", "Tokens found in the prefix cache.", stats.num_prefix_hits_total
        )
        yield self._counter(
            "shuteye_num_preemptions",
            "Sequences that lost their KV blocks and were computed again; those kept over a sleep included.",
            stats.num_preemptions_total,
        )
        yield self._histogram(
            "shuteye_iteration_tokens_total",
            "Tokens of a step: those sampled, and a prompt's with its first.",
            STEP_TOKEN_BOUNDS,
            stats.step_tokens,
        )
        yield self._histogram(
            "shuteye_request_num_preemptions",
            "How often a sequence that has ended was preempted.",
            PREEMPTION_BOUNDS,
            stats.preemptions,
        )

    def _of_cache(self, config: EngineConfig, stats: SchedulerStats) -> Iterable[Metric]:
        facts = {
            "block_size": config.block_size,
            "num_gpu_blocks": stats.num_blocks,
            "enable_prefix_caching": config.enable_prefix_caching,
        }
        info = self._family("shuteye_cache_config_info", "How the KV cache is divided (vLLM's names).", *facts)
        info.add_metric((self.model_name, *map(str, facts.values())), 1)
        yield info
        waiting = self._family("shuteye_num_requests_waiting_by_reason", "The same, by what they wait for.", "reason")
        closed = self.engine.state.gate != "open"
        waiting.add_metric((self.model_name, "capacity"), 0 if closed else stats.num_waiting)
        waiting.add_metric((self.model_name, "deferred"), stats.num_waiting if closed else 0)
        yield waiting

    def _of_sleep(self, state: EngineState) -> Iterable[Metric]:
        yield self._gauge("shuteye_is_sleeping", "1 until every tag is resident and loaded.", float(state.is_sleeping))
        yield self._gauge("shuteye_is_paused", "1 while a pause is in force.", float(state.paused))
        faulted = state.faulted is not None
        yield self._gauge("shuteye_is_faulted", "1 while nothing is served until a recovery.", float(faulted))
        sleep_state = self._family("shuteye_engine_sleep_state", "1 for the state in force.", "sleep_state")
        now = SLEEP_STATES[min(state.level or 0, 2) if state.is_sleeping else 0]
        for name in SLEEP_STATES:
            sleep_state.add_metric((self.model_name, name), float(name == now))
        yield sleep_state
        yield from self._of_tags(state)
        yield from self._of_ranks(state)

    def _of_tags(self, state: EngineState) -> Iterable[Metric]:
        residency = self._family("shuteye_tag_residency", "1 for where a tag's bytes are.", "tag", "residency")
        resident = self._family("shuteye_tag_resident_bytes", "Physical memory a tag holds.", "tag")
        size = self._family("shuteye_tag_bytes", "Bytes of a tag when it is all there.", "tag")
        for tag in state.tags:
            resident.add_metric((self.model_name, tag.tag), tag.resident_bytes)
            size.add_metric((self.model_name, tag.tag), tag.nbytes)
            for place in get_args(TagResidency):
                residency.add_metric((self.model_name, tag.tag, place), float(tag.residency == place))
        yield from (residency, resident, size)

    def _of_ranks(self, state: EngineState) -> Iterable[Metric]:
        alive = self._family("shuteye_rank_up", "1 while the process of a rank lives.", "rank", "host")
        resident = self._family("shuteye_rank_resident_bytes", "Physical memory a tag holds on a rank.", "rank", "tag")
        for rank in state.ranks:
            alive.add_metric((self.model_name, str(rank.rank), rank.host), float(rank.failure is None))
            for tag in rank.tags:
                resident.add_metric((self.model_name, str(rank.rank), tag.tag), tag.resident_bytes)
        yield from (alive, resident)

    def _family(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(name, text, labels=("model_name", *labels))

    def _histogram(self, name: str, text: str, bounds: Sequence[int], found: BucketCounts) -> Metric:
        family = HistogramMetricFamily(name, text, labels=("model_name",))
        upto = list(accumulate(found.counts or (0,) * (len(bounds) + 1)))
        names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        family.add_metric((self.model_name,), list(zip(names, upto, strict=True)), found.total)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = self._family(name, text)
        family.add_metric((self.model_name,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self.model_name,), value)
        return family
