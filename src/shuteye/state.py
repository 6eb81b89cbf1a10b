"""Where the memory of a model is, how it gets elsewhere, and what is told of both. Plain frozen data; no torch.

The sleep controller makes plans; ranks carry them out; reports and states are what callers see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Tag = Literal["weights", "kv_cache"]
TAGS: tuple[Tag, ...] = ("weights", "kv_cache")

TagResidency = Literal["resident", "offloaded", "discarded", "blank"]
"""Where a tag's bytes are: in memory; in a backing; nowhere; mapped, but not yet written."""

Gate = Literal["open", "draining", "closed"]


# --- sleep and wake -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TagReport:
    """What one transition did to one tag, in bytes the operating system or driver reported.

    Attributes:
        residency: where the tag's bytes are now.
        backing: what can restore them: `image`, `disk`, `host`, or None.
        freed_bytes: physical memory that left the process (sleep).
        restored_bytes: physical memory mapped again (wake).
        saved_bytes: bytes copied into the backing because they had been written.
    """

    tag: Tag
    residency: TagResidency
    backing: str | None = None
    freed_bytes: int = 0
    restored_bytes: int = 0
    saved_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's part of a transition.

    Attributes:
        residual_bytes: what stays resident in its process after a sleep; None after a wake.
    """

    rank: int
    tags: tuple[TagReport, ...]
    residual_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class SleepReport:
    """The measured outcome of `sleep`; `residual_bytes` is what stays resident in the processes of all ranks."""

    changed: bool
    level: int
    tags: tuple[TagReport, ...] = ()
    freed_bytes: int = 0
    residual_bytes: int = 0
    seconds: float = 0.0
    aborted_requests: int = 0
    held_requests: int = 0
    ranks: tuple[RankReport, ...] = ()


@dataclass(frozen=True, slots=True)
class WakeReport:
    """The measured outcome of `wake_up`.

    Attributes:
        verified: what was checked before the gate opened: `off`, `sample` or `full`; `canary`: whether that ran, too.
        missing: tensors that must still be written before the gate can open.
        updates_lost: a fault has taken weights that `update_weights` had written; these are the image's.
    """

    changed: bool
    tags: tuple[TagReport, ...] = ()
    restored_bytes: int = 0
    verified: str = "off"
    verified_bytes: int = 0
    canary: bool = False
    weights_source: str | None = None
    missing: tuple[str, ...] = ()
    updates_lost: bool = False
    seconds: float = 0.0
    ranks: tuple[RankReport, ...] = ()


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """The outcome of `update_weights` or `reload_weights`; `missing` must be written before the gate can open."""

    updated: int
    updated_bytes: int
    missing: tuple[str, ...] = ()
    seconds: float = 0.0


STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PREEMPTION_BOUNDS = (0, 1, 2, 5, 10, 20)


@dataclass(frozen=True, slots=True)
class BucketCounts:
    """Values counted since start: how many in each bucket (the last is above all bounds), and their sum."""

    counts: tuple[int, ...] = ()
    total: int = 0


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counters since start (`num_*_total`) and gauges now, for `/metrics`.

    Attributes:
        step_tokens: tokens of each step, by `STEP_TOKEN_BOUNDS`: sampled ones, and prompts with their first.
        preemptions: of each request that has ended, by `PREEMPTION_BOUNDS`.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_prompt_tokens_total: int = 0
    num_generation_tokens_total: int = 0
    num_prefix_queries_total: int = 0
    num_prefix_hits_total: int = 0
    num_preemptions_total: int = 0
    step_tokens: BucketCounts = BucketCounts()
    preemptions: BucketCounts = BucketCounts()


@dataclass(frozen=True, slots=True)
class TagState:
    """Where a tag is, and what waking it would cost."""

    tag: Tag
    residency: TagResidency
    backing: str | None
    nbytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class RankIdentity:
    """Which process is a rank.

    Attributes:
        place: `tp0of2.pp0of1`, say; empty for a rank that is alone.
    """

    place: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class RankState:
    """One rank: its process, and where the memory of its part of the model is.

    Attributes:
        tags: empty once it has ended.
        failure: how it ended, such as `was ended by SIGKILL`; None while it lives.
    """

    rank: int
    place: str
    host: str
    pid: int
    tags: tuple[TagState, ...] = ()
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class EngineState:
    """The sleep state that the engine pushes to whoever admits requests.

    Attributes:
        gate: whether requests run.
        paused: a `pause()` is in force; waking never undoes it.
        refusing: new requests are refused, by a pause that ended those in flight, or is about to.
        level: the deepest level asleep at, or None when awake.
        missing: tensors that must be written before the gate can open.
        faulted: why nothing can be served, or None.
        ranks: the processes that hold the model together, in rank order; `tags` is the sum of theirs.
    """

    gate: Gate = "closed"
    paused: bool = False
    level: int | None = None
    tags: tuple[TagState, ...] = ()
    missing: tuple[str, ...] = ()
    faulted: str | None = None
    transition: str | None = None
    refusing: bool = False
    ranks: tuple[RankState, ...] = ()

    @property
    def is_sleeping(self) -> bool:
        """True until every tag is resident and loaded."""
        return any(tag.residency != "resident" for tag in self.tags)

    @property
    def restore_bytes(self) -> int:
        """Weights that a wake must read or copy; blank ones wait for a writer."""
        kept = (tag for tag in self.tags if tag.tag == "weights" and tag.residency in ("offloaded", "discarded"))
        return sum(tag.nbytes - tag.resident_bytes for tag in kept)


VerifyMode = Literal["off", "sample", "full"]

SCRATCH_BLOCK = 0
RESERVED_BLOCKS = 1
"""KV block 0 is the canary's scratch block: it exists in the cache but is never handed out to a request."""

# --- a step -------------------------------------------------------------------------------------


Epoch = tuple[int, ...]
"""What the memory of each rank holds, as a number that every release, reset, reload and update of weights raises.

K/V, prefix digests and whatever else was computed belong to the epoch in which they were computed, and to no other.
"""


# --- sleep and wake -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SleepPlan:
    """What to do with each tag; `keep` leaves it alone.

    weights: `offload` keeps them restorable, `discard` forgets them (and drops a backing that held them).
    """

    weights: Literal["keep", "offload", "discard"] = "keep"
    kv_cache: Literal["keep", "discard"] = "keep"


@dataclass(frozen=True, slots=True)
class SleepEstimate:
    """What a plan would need, found before anything is touched.

    Attributes:
        save_bytes: what would be written.
        growth_bytes: the part of it for which the backing needs new room; the rest overwrites older copies.
    """

    save_bytes: int
    growth_bytes: int


@dataclass(frozen=True, slots=True)
class WakeEstimate:
    """What a plan would need, found before anything is touched, and what the machine has for all of its ranks."""

    needed_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class WakePlan:
    """What to do with each tag; `keep` leaves it alone.

    weights: `restore` brings back what was offloaded, `reload` the image's, `blank` maps memory to be written.
    """

    weights: Literal["keep", "restore", "reload", "blank"] = "keep"
    kv_cache: Literal["keep", "commit"] = "keep"


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """How many bytes were compared with their checksums, and which extents differ."""

    verified_bytes: int
    bad_extents: tuple[int, ...] = ()


DrainMode = Literal["abort", "wait", "keep"]
"""What becomes of requests in flight when the gate closes."""


class RanksDisagree(ValueError):
    """Ranks tell different things of what must be the same on all."""


def sum_states(ranks: Sequence[TagState]) -> TagState:
    """Where a tag is, with the bytes of all ranks.

    While an update goes on, ranks that have all their tensors are ahead: the tag is blank until all are.

    Raises:
        RanksDisagree: it is here and there.
    """
    found = {state.residency for state in ranks}
    if len(found) > 1 and found != {"blank", "resident"}:
        raise RanksDisagree(_differing(ranks[0].tag, [state.residency for state in ranks]))
    return replace(
        ranks[0],
        residency="blank" if "blank" in found else ranks[0].residency,
        backing=_backing([state.backing for state in ranks]),
        nbytes=sum(state.nbytes for state in ranks),
        resident_bytes=sum(state.resident_bytes for state in ranks),
    )


def sum_reports(ranks: Sequence[TagReport]) -> TagReport:
    """What a transition did to a tag, with the bytes of all ranks and the seconds of the slowest.

    Raises:
        RanksDisagree: it did different things.
    """
    if len({report.residency for report in ranks}) > 1:
        raise RanksDisagree(_differing(ranks[0].tag, [report.residency for report in ranks]))
    return replace(
        ranks[0],
        backing=_backing([report.backing for report in ranks]),
        freed_bytes=sum(report.freed_bytes for report in ranks),
        restored_bytes=sum(report.restored_bytes for report in ranks),
        saved_bytes=sum(report.saved_bytes for report in ranks),
        seconds=max(report.seconds for report in ranks),
    )


def sum_updates(ranks: Sequence[UpdateReport]) -> UpdateReport:
    """What an update did, with the bytes of all ranks, what any of them misses, and the seconds of the slowest.

    Of a reload, each rank counts the tensors of which it has a part: the number is the largest of them.
    """
    return UpdateReport(
        updated=max(report.updated for report in ranks),
        updated_bytes=sum(report.updated_bytes for report in ranks),
        missing=tuple(dict.fromkeys(name for report in ranks for name in report.missing)),
        seconds=max(report.seconds for report in ranks),
    )


def _backing(ranks: Sequence[str | None]) -> str | None:
    """Of ranks of which some wrote to their weights: what holds them, rather than the image."""
    return next((backing for backing in ranks if backing != "image"), ranks[0])


def _differing(what: str, ranks: Sequence[object]) -> str:
    return f"the ranks disagree on {what}: " + ", ".join(f"{found} on rank {rank}" for rank, found in enumerate(ranks))
