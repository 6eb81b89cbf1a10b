"""The engine's last pushed snapshot as Prometheus metrics, read when scraped.

Knows nothing of requests over HTTP; asks the engine nothing, so it works while asleep or busy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from shuteye.frontend.engine import KnownEngine
from shuteye.state import EngineState, SchedulerStats, TagResidency

if TYPE_CHECKING:
    from prometheus_client.core import Metric

SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
"""vLLM's names of the levels: awake, level 1, level 2."""


@dataclass(frozen=True, slots=True, eq=False)  # registries hash collectors by identity
class SnapshotCollector(Collector):
    """Gauges and counters of one engine."""

    engine: KnownEngine
    model_name: str

    def collect(self) -> Iterable[Metric]:
        """All families, as of now."""
        yield from self._of_scheduler(self.engine.stats)
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

    def _family(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(name, text, labels=("model_name", *labels))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = self._family(name, text)
        family.add_metric((self.model_name,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self.model_name,), value)
        return family
