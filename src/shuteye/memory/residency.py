"""One rank's arenas and what backs them: runs sleep and wake plans as transactions, and measures what they did.

Knows nothing of requests, ranks or when to sleep; `engine/sleep.py` decides, this carries out.

Every move keeps to one order, so that a failure at any step leaves a known state:
    sleep   save what was written (the memory is untouched: on error still awake) → then release
    wake    map everything → populate → measure; on error, unmap what this call mapped
`_weights` changes before memory goes and after memory came: it always is what `reset` would make true.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shuteye.errors import (
    EngineFaulted,
    InternalError,
    InvalidRequest,
    MemoryExhausted,
    ShuteyeError,
    TransitionConflict,
)
from shuteye.memory.arena import Arena
from shuteye.memory.backends import MemoryBackend
from shuteye.memory.backings import Backing, BackingName, DiskBacking, HostBacking
from shuteye.memory.image import WeightImage
from shuteye.memory.kv_cache_memory import KVCacheMemory
from shuteye.memory.layout import first_difference
from shuteye.memory.release import Release
from shuteye.memory.weights import ImageWatch, Verifier, WeightsState
from shuteye.state import (
    SleepEstimate,
    SleepPlan,
    TagReport,
    TagState,
    VerifyMode,
    VerifyResult,
    WakeEstimate,
    WakePlan,
)


@dataclass(frozen=True, slots=True)
class _Restored:
    """What a wake changed: the weights as they were, or None if left alone; whether it committed the KV cache."""

    weights_before: WeightsState | None
    kv_cache: bool


class Residency:
    """The memory of one rank. Not thread-safe: every call comes from the thread that runs the model.

    The weights begin `offloaded` to the image and the KV cache `discarded`: loading is the first wake.
    Owns the arenas and images given to it, and closes them.

    Attributes:
        image: what `reload` will map.
        watch: over the image that is mapped; to be told when an update has ended, however it did.
    """

    def __init__(
        self,
        *,
        backend: MemoryBackend,
        weights: Arena,
        image: WeightImage,
        spill_dir: Path,
        backing: Literal["disk", "host"] = "disk",
        first_epoch: int = 0,
    ) -> None:
        assert weights.nbytes == image.layout.nbytes, "the weights arena must be exactly as large as its image"
        self._backend = backend
        self._weights_arena = weights
        self._weights = WeightsState.initial(image)
        self.image = image
        self._backing: Backing = DiskBacking(backend, spill_dir) if backing == "disk" else HostBacking(backend)
        self._kv_cache: KVCacheMemory | None = None
        self._missing: set[str] = set()
        self._saved: frozenset[int] | None = None
        self._released: Release | None = None  # of the weights; `finish_release` goes on from there
        self._last_restore: _Restored | None = None
        self._epoch = first_epoch
        self.watch = ImageWatch(weights)
        self._verifier = Verifier(weights, self._backing)

    # --- what there is ---------------------------------------------------------------------------

    def missing(self) -> tuple[str, ...]:
        """After `blank`: the slots not yet written, in layout order."""
        return tuple(name for name in self._weights.image.layout.slots if name in self._missing)

    def epoch(self) -> int:
        """Raised before memory or its content changes; what was computed in an earlier epoch is not to be used."""
        return self._epoch

    @property
    def all_resident(self) -> bool:
        """True if the model can run: every tag is resident and loaded."""
        kv = self._kv_cache
        return self._weights.residency == "resident" and kv is not None and kv.residency == "resident"

    def attach_kv_cache(self, arena: Arena) -> None:
        """Take charge of the KV cache's arena: reserved, nothing committed."""
        assert self._kv_cache is None, "a rank has one KV cache"
        self._kv_cache = KVCacheMemory(arena)

    def states(self) -> tuple[TagState, ...]:
        """Where each tag is, measured now.

        Raises:
            BackendFailure: the kernel would not say.
        """
        arena = self._weights_arena
        backing = self._backing_name(self._weights) if self._weights.residency == "offloaded" else None
        weights = TagState("weights", self._weights.residency, backing, arena.nbytes, arena.resident_bytes())
        return (weights, self._kv_cache.state()) if self._kv_cache else (weights,)

    def _backing_name(self, state: WeightsState) -> BackingName:
        """`image` if it alone brings everything back; else the backing, which then holds what the image does not."""
        return self._backing.name if "saved" in state.sources else "image"

    # --- sleep -----------------------------------------------------------------------------------

    def estimate(self, plan: SleepPlan) -> SleepEstimate:
        """What `save` would write, and the room for it. Touches nothing.

        Raises:
            MemoryExhausted: there is no room.
            TransitionConflict: the weights are not where the plan starts.
        """
        self._weights.require(plan.weights)
        dirty = self._verifier.dirty(self._weights) if plan.weights == "offload" else ()
        self._backing.require_room(dirty)
        return SleepEstimate(sum(extent.nbytes for extent in dirty), self._backing.growth_bytes(dirty))

    def save(self, plan: SleepPlan) -> None:
        """Write the extents that no backing holds truly. On error nothing has changed and a retry works.

        Raises:
            TransitionConflict: the weights are not where the plan starts.
            MemoryExhausted: there is no room.
            BackendFailure: writing failed.
            ImageFailure: see `require_intact`.
        """
        self._weights.require(plan.weights)
        self._settle()
        self._begin_releases()
        if plan.weights != "offload":
            return
        self.require_intact()  # else pages that nobody wrote, or that are gone, would count as the model's
        dirty = self._verifier.dirty(self._weights)
        if "saved" not in self._weights.sources:
            self._backing.drop()
        if dirty:
            self._backing.save(self._weights_arena, dirty)
        self._saved = frozenset(extent.index for extent in dirty)

    def abort_save(self) -> None:
        """Forget what was saved, as another rank could not: the weights go on as they are."""
        self._saved = None

    def release(self, plan: SleepPlan) -> tuple[TagReport, ...]:
        """Give the memory back and report what the kernel says came back. Offloading needs `save` first.

        Raises:
            BackendFailure: the kernel refused; some memory may be gone, and only `reset` is safe now.
        """
        self._weights.require(plan.weights)
        self._begin_releases()
        return self._release(plan)

    def finish_release(self, plan: SleepPlan) -> tuple[TagReport, ...]:
        """Go on with a `release` of the same plan that failed half-way, whatever it had reached; reports are of both.

        Raises:
            BackendFailure: the kernel refused again.
        """
        return self._release(plan)

    def _begin_releases(self) -> None:
        """The next release is another sleep's, also one that `finish_release` begins, as `release` was refused."""
        self._released = None
        if self._kv_cache:
            self._kv_cache.begin_release()

    def _release(self, plan: SleepPlan) -> tuple[TagReport, ...]:
        reports = []
        if plan.weights != "keep":
            reports.append(self._release_weights(discard=plan.weights == "discard"))
        if plan.kv_cache == "discard":
            kv = self._require_kv_cache()
            self._epoch += 1
            reports.append(kv.release())
        return tuple(reports)

    def _release_weights(self, *, discard: bool) -> TagReport:
        started = time.perf_counter()
        release = self._released or self._begin_release_of_weights(discard=discard)
        freed = release.carry_out()
        if discard:
            self._backing.drop()
        return TagReport(
            "weights",
            self._weights.residency,
            backing=None if discard else self._backing_name(self._weights),
            freed_bytes=freed,
            saved_bytes=release.saved_bytes,
            seconds=time.perf_counter() - started,
        )

    def _begin_release_of_weights(self, *, discard: bool) -> Release:
        """The weights are away from here on, whatever follows: what there was of them."""
        self._epoch += 1
        before = self._weights
        saved = frozenset[int]() if discard else self._require_saved()
        saved_bytes = sum(extent.nbytes for extent in before.image.layout.extents if extent.index in saved)
        begun = Release.begin(self._weights_arena, was_mapped=before.is_mapped, saved_bytes=saved_bytes)
        self._weights = before.discarded() if discard else before.offloaded(saved)
        self._settle()
        self._missing.clear()
        self._released = begun
        return begun

    def _require_saved(self) -> frozenset[int]:
        if self._saved is None:
            raise InternalError("Weights were to be offloaded without being saved first.")
        return self._saved

    def _require_kv_cache(self) -> KVCacheMemory:
        if self._kv_cache is None:
            raise InternalError("The plan names the KV cache, and none is attached.")
        return self._kv_cache

    # --- wake ------------------------------------------------------------------------------------

    def restore(self, plan: WakePlan) -> tuple[TagReport, ...]:
        """Bring memory back: all mappings first, then their pages. What is there already is left alone.

        On error everything this call mapped is unmapped and the state is as before; a retry works.

        Raises:
            TransitionConflict: the weights are not where the plan starts.
            MemoryExhausted: the system does not have the memory.
            BackendFailure: the kernel refused.
            ImageFailure: see `require_intact`.
            EngineFaulted: it could not be undone; also when weights that were mapped were being replaced.
        """
        self._settle()
        target, kv = self._after_wake(plan)
        self._require_memory(target, kv)
        if target and "image" in target.sources:
            target.image.require_intact()
        change = _Restored(self._weights if target else None, kv_cache=kv is not None)
        self._epoch += 1
        try:
            reports = self._bring_back(target, kv)
        except BaseException:
            self._take_back(change)
            raise
        if target:
            self._weights = target
            self.watch.remapped()
            self._missing = set(self._weights.image.layout.slots) if target.residency == "blank" else set()
        if kv:
            kv.residency = "resident"
        self._last_restore = change
        return reports

    def estimate_wake(self, plan: WakePlan) -> WakeEstimate:
        """What `restore` would take, all tags together: each alone might fit.

        Raises:
            TransitionConflict: the weights are not where the plan starts.
        """
        return self._wake_estimate(*self._after_wake(plan))

    def _after_wake(self, plan: WakePlan) -> tuple[WeightsState | None, KVCacheMemory | None]:
        """The weights as they will be, None if they stay as they are; the KV cache if it is to be mapped."""
        target = self._weights.after_wake(plan.weights, self.image)
        kv = self._require_kv_cache() if plan.kv_cache == "commit" else None
        return target, kv if kv and kv.residency == "discarded" else None

    def _wake_estimate(self, target: WeightsState | None, kv: KVCacheMemory | None) -> WakeEstimate:
        weights_bytes = self._weights_arena.nbytes if target and not self._weights.is_mapped else 0
        needed = weights_bytes + (kv.arena.nbytes if kv else 0)
        return WakeEstimate(needed, self._backend.available_bytes() if needed else 0)

    def _require_memory(self, target: WeightsState | None, kv: KVCacheMemory | None) -> None:
        found = self._wake_estimate(target, kv)
        if found.needed_bytes > found.available_bytes:
            raise MemoryExhausted(
                f"Waking takes {found.needed_bytes:,} bytes of memory and {found.available_bytes:,} are available. "
                "Free memory and try again."
            )

    def _bring_back(self, target: WeightsState | None, kv: KVCacheMemory | None) -> tuple[TagReport, ...]:
        reports = []
        started = time.perf_counter()
        if target:
            self._map_weights(target)
        mapped = time.perf_counter()
        if kv:
            kv.arena.commit()
        committed = time.perf_counter()
        if target:
            resident = target.residency == "resident"
            if resident:
                self._weights_arena.populate()
            populated = time.perf_counter()
            reports.append(
                TagReport(
                    "weights",
                    target.residency,
                    backing=self._backing_name(target) if resident else None,
                    restored_bytes=self._weights_arena.resident_bytes(),
                    seconds=(mapped - started) + (populated - committed),
                )
            )
        if kv:
            restored_bytes = kv.arena.resident_bytes()
            reports.append(TagReport("kv_cache", "resident", restored_bytes=restored_bytes, seconds=committed - mapped))
        return tuple(reports)

    def _map_weights(self, target: WeightsState) -> None:
        for run in target.runs():
            if run.kind == "memory":
                self._weights_arena.commit()  # blank: a single run, the whole arena
            else:
                self._verifier.source(target, run.kind).load(self._weights_arena, run.offset, run.nbytes)

    def undo_restore(self) -> None:
        """Put back what the last `restore` changed, because what it brought back was found wrong.

        Does nothing if that restore failed and so undid itself: another rank's may have succeeded.

        Raises:
            EngineFaulted: it cannot be put back; only `reset` is safe now.
        """
        change, self._last_restore = self._last_restore, None
        if change is not None:
            self._take_back(change)

    def _take_back(self, change: _Restored) -> None:
        """Release what `change` mapped. Weights that were mapped before it are lost: the kernel keeps one mapping."""
        before = change.weights_before
        replaced = before is not None and before.is_mapped
        self._epoch += 1
        try:
            if before is not None:
                self._weights = before.discarded() if replaced else before
                self._missing.clear()
                self._weights_arena.release()
            if change.kv_cache:
                self._require_kv_cache().discard()
        except ShuteyeError as failure:
            raise EngineFaulted(f"A failed wake could not be undone: {failure} Reset the engine.") from failure
        if replaced:
            raise EngineFaulted("Replacing the weights in memory failed half-way, and they are gone. Reset the engine.")

    # --- writing and replacing weights -----------------------------------------------------------

    def mark_written(self, name: str) -> None:
        """Take note that the tensor `name` (or one tied to it) was written; the last one makes `weights` resident.

        Raises:
            InvalidRequest: there is no such tensor.
            TransitionConflict: the weights are not in memory.
        """
        slot_name = self._weights.image.slot_name(name)
        if slot_name is None:
            raise InvalidRequest(f"The model has no tensor {name!r}.", param="name")
        if not self._weights.is_mapped:
            raise TransitionConflict(f"Tensor {name!r} cannot be written: the weights are {self._weights.residency}.")
        self._epoch += 1
        self._missing.discard(slot_name)
        if not self._missing:
            self._weights = self._weights.restored()

    def replace_image(self, image: WeightImage) -> None:
        """Let the next `reload` map `image`; what is in memory or offloaded now stays what it is until then.

        Raises:
            InvalidRequest: its tensors are not this model's; the first that differs is named.
        """
        difference = first_difference(self._weights.image.layout, image.layout)
        if difference:
            raise InvalidRequest(
                f"The new weights do not fit the model in memory: {difference}. Serve them from a new engine.",
                param="path",
            )
        replaced, self.image = self.image, image
        self._close_unless_used(replaced)

    # --- trust -----------------------------------------------------------------------------------

    def verify(self, mode: VerifyMode) -> VerifyResult:
        """Compare extents in memory with the checksums of what they were mapped from.

        Extents written since, or written into blank memory, have no checksum and are skipped. `sample` takes the next
        few extents in turn, at most `SAMPLE_BYTES` unless one alone is larger.

        Raises:
            BackendFailure: the kernel would not say which pages were written.
            ImageFailure: see `require_intact`.
        """
        self.require_intact()
        return self._verifier.verify(self._weights, mode)

    def require_intact(self) -> None:
        """Refuse to go on with weights under which the image's file was changed, until they are mapped again.

        Raises:
            ImageFailure: see `ImageWatch.require_intact`.
        """
        self.watch.require_intact(self._weights)

    # --- ending ----------------------------------------------------------------------------------

    def reset(self) -> None:
        """The way back from a fault: release everything, keeping what a backing truly holds. Idempotent.

        The weights end `offloaded` if every extent can be brought back, else `discarded`; the KV cache `discarded`.

        Raises:
            BackendFailure: the kernel refused; calling again is safe.
        """
        self._settle()
        self._epoch += 1
        self._weights = self._weights_after_reset()
        self._missing.clear()
        self._weights_arena.release()
        if self._kv_cache:
            self._kv_cache.discard()
        if self._weights.residency == "discarded":
            self._backing.drop()

    def _weights_after_reset(self) -> WeightsState:
        if not self._weights.is_mapped:
            return self._weights
        if not self.watch.is_intact(self._weights):
            return self._weights.discarded()
        dirty = self._verifier.dirty(self._weights)
        held = all(self._verifier.is_held(extent) for extent in dirty)
        if self._weights.residency == "resident" and held:
            return self._weights.offloaded({extent.index for extent in dirty})
        return self._weights.discarded()

    def close(self) -> None:
        """Give everything back for good. Idempotent.

        Raises:
            BackendFailure: the kernel refused; everything else is given back all the same.
        """
        with ExitStack() as stack:
            stack.callback(self.image.close)
            stack.callback(self._weights.image.close)
            stack.callback(self._settle)
            stack.callback(self._backing.drop)
            stack.callback(self._weights_arena.close)
            if self._kv_cache:
                stack.callback(self._kv_cache.arena.close)

    def _settle(self) -> None:
        """A new move begins: the last save is stale, the last restore can no longer be undone."""
        self._saved = None
        change, self._last_restore = self._last_restore, None
        if change is not None and change.weights_before is not None:
            self._close_unless_used(change.weights_before.image)

    def _close_unless_used(self, image: WeightImage) -> None:
        undoable = self._last_restore.weights_before if self._last_restore else None
        users = (self.image, self._weights.image, undoable.image if undoable else None)
        if image not in users:
            image.close()
