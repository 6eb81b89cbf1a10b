"""The transaction that carries a sleep or a wake out on every rank: what fails is rolled back, or the engine faulted.

Knows nothing of requests or tensors: `engine.transitions` drains requests first, the ranks move the bytes.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from shuteye.engine.sleep import GateFlags, SleepState, plan_sleep, plan_wake
from shuteye.engine.wake_room import require_room
from shuteye.errors import (
    CANARY_DISAGREES,
    EngineFaulted,
    ImageFailure,
    RankLost,
    ShuteyeError,
    SleepFailed,
    VerificationFailed,
    WakeFailed,
)
from shuteye.executors import Executor, answers
from shuteye.state import (
    TAGS,
    RankIdentity,
    RankReport,
    RanksDisagree,
    RankState,
    SleepPlan,
    SleepReport,
    Tag,
    TagReport,
    TagState,
    VerifyMode,
    WakePlan,
    WakeReport,
    sum_reports,
    sum_states,
)

logger = logging.getLogger(__name__)

MAX_RELEASES = 3
"""How often a release is tried on a rank, if there are others that have released already."""


class SleepController:
    """Carries legal moves out on every rank; whatever fails is rolled back, or the state is faulted and says so.

    Attributes:
        num_restarts: how often ranks had to be started again, which then know of no request.
        on_fault: called at once, also in the middle of a transition.
        proof_pending: the canary goes with the next step.
    """

    def __init__(self, executor: Executor, *, verify: VerifyMode, canary: bool) -> None:
        self._executor = executor
        self._verify = verify
        self._canary = canary
        self._distrusted = False  # after a fault or a failed verification
        self.proof_pending = False
        self._kept_source: str | None = None  # of the weights that a wake is to bring back; None if they were given up
        self._identities: list[RankIdentity] = executor.call("identity")
        self.num_restarts = 0
        self.on_fault: Callable[[], None] = lambda: None
        self.state = SleepState()
        self.refresh()

    def refresh(self) -> None:
        """Ask every rank where its tags are.

        Raises:
            EngineFaulted: a rank cannot tell, is no more, or tells something else than the others.
        """
        unknown = "a rank cannot tell where its memory is"
        ranks: list[tuple[TagState, ...]] = self._call_or_fault(unknown, "states")
        missing = self._call_or_fault(unknown, "missing")
        epoch = tuple(self._call_or_fault(unknown, "epoch"))
        try:
            tags = tuple(map(sum_states, zip(*ranks, strict=True)))
        except RanksDisagree as error:
            raise self.fault(str(error)) from error
        self._set(tags=tags, missing=tuple(sorted({*sum(missing, ())})), epoch=epoch, ranks=self._rank_states(ranks))

    def _rank_states(self, tags: Sequence[tuple[TagState, ...]]) -> tuple[RankState, ...]:
        found = enumerate(zip(self._identities, tags, strict=True))
        return tuple(RankState(rank, who.place, who.host, who.pid, states) for rank, (who, states) in found)

    def set_gate(self, **changes: Unpack[GateFlags]) -> None:
        """Change what the gate depends on beside residency, and whether new requests are refused."""
        self._set(**changes)

    def plan_sleep(self, level: int, tags: Sequence[Tag]) -> SleepPlan:
        """The moves from the present state; see the module's `plan_sleep`."""
        self.refuse_if_faulted()
        return plan_sleep(self.state.residency("weights"), self.state.residency("kv_cache"), level=level, tags=tags)

    def check_room(self, plan: SleepPlan) -> None:
        """Ask every rank whether the plan can succeed, before anything is touched.

        Raises:
            SleepFailed: a rank has no room for what must be saved.
            EngineFaulted: a rank is no more.
        """
        try:
            self._call("estimate_sleep", plan)
        except EngineFaulted:
            raise
        except ShuteyeError as error:
            raise SleepFailed(f"Still awake, nothing was touched: {error.message}") from error

    def save(self, plan: SleepPlan) -> None:
        """Save on every rank what only memory holds.

        Raises:
            SleepFailed: a rank could not; the model is awake as before.
            EngineFaulted: a rank is no more.
        """
        try:
            self._call("save", plan)
        except EngineFaulted:
            raise
        except ShuteyeError as error:
            raise SleepFailed(f"Still awake, saving failed: {error.message}{self._abort_save()}") from error

    def _abort_save(self) -> str:
        """Let all ranks forget what they saved; who cannot does so when it next saves, and is named."""
        try:
            self._call("abort_save")
        except EngineFaulted:
            raise
        except ShuteyeError as error:
            return f"; {error.message}"
        return ""

    def release(self, plan: SleepPlan, *, begin: float) -> SleepReport:
        """Give memory back on every rank, and measure.

        Raises:
            EngineFaulted: a rank failed half-way; nothing is served until `wake_up` recovers it.
        """
        self.proof_pending = False
        if plan.weights == "discard":
            self._kept_source = None
        try:
            ranks = self._release_all(plan)
        except RankLost as error:
            raise self.fault(error.message) from error
        except ShuteyeError as error:
            raise self.fault(f"releasing failed: {error.message}") from error
        self.refresh()
        reports = self._summed(ranks)
        level = self.state.level
        assert level is not None, "released, and yet awake"
        residual = self.residual_bytes()
        return SleepReport(
            changed=True,
            level=level,
            tags=reports,
            freed_bytes=sum(report.freed_bytes for report in reports),
            residual_bytes=sum(residual),
            seconds=time.perf_counter() - begin,
            ranks=tuple(map(RankReport, range(len(ranks)), ranks, residual)),
        )

    def residual_bytes(self) -> list[int]:
        """The memory of each rank's process.

        Raises:
            EngineFaulted: a rank cannot tell, or is no more.
        """
        return self._call_or_fault("a rank cannot tell how much memory it has", "residual_bytes")

    def _release_all(self, plan: SleepPlan) -> list[tuple[TagReport, ...]]:
        """Release on every rank; where others have released, there is no way but on: who failed tries again."""
        outcomes = self._executor.outcomes("release", plan)
        for _ in range(MAX_RELEASES - 1):
            failed = [rank for rank, found in outcomes.items() if isinstance(found, ShuteyeError)]
            if not failed or len(outcomes) == 1 or any(isinstance(outcomes[rank], RankLost) for rank in failed):
                break
            outcomes |= self._executor.outcomes("finish_release", plan, ranks=failed)
        return answers(outcomes, num_ranks=self._executor.num_ranks)

    def wake(self, tags: Sequence[Tag], *, defer_canary: bool = False) -> WakeReport:
        """Map, fill, verify; the gate opens by itself once every tag is resident and loaded.

        With `defer_canary` the canary does not run now but goes with the first step of the model, which fails with
        `VerificationFailed` if it disagrees; not after a fault.

        Raises:
            TransitionConflict: see `plan_wake`.
            WakeFailed: rolled back, still asleep; a retry may work. After a fault over a damaged image: still faulted.
            EngineFaulted: rolling back failed too.
        """
        begin = time.perf_counter()
        reason = self.state.faulted
        if reason is not None:
            self._recover()
            tags = TAGS  # a part of what is not trusted would leave the rest behind
        state = self.state
        if not state.is_sleeping:
            self.set_gate(paused_by_sleep=False)
            return WakeReport(changed=state.paused_by_sleep, seconds=time.perf_counter() - begin)
        plan = plan_wake(state.residency("weights"), state.residency("kv_cache"), tags=tags, missing=state.missing)
        if plan == WakePlan():
            return WakeReport(changed=False, missing=state.missing, seconds=time.perf_counter() - begin)
        self._require_room(plan)
        try:
            report = self._restore(plan, verify=self._mode, defer_canary=defer_canary and not self._distrusted)
        except WakeFailed as error:
            if reason is not None and isinstance(error.__cause__, ImageFailure):
                self.fault(reason)  # until the image is fixed, whoever looks is to find it
            raise
        self.set_gate(paused_by_sleep=False)
        return replace(report, seconds=time.perf_counter() - begin)

    def _require_room(self, plan: WakePlan) -> None:
        """Of several ranks each sees all of the machine's memory as its own; a rank that is alone asks by itself."""
        if self._executor.num_ranks == 1:
            return
        try:
            estimates = self._call("estimate_wake", plan)
            require_room(zip((who.host for who in self._identities), estimates, strict=True))
        except EngineFaulted:
            raise
        except ShuteyeError as error:
            raise WakeFailed(f"Still asleep, nothing was touched, a retry may work: {error.message}") from error

    def check_loaded(self) -> None:
        """Compare what was just loaded with its checksums, and record the canary's first pass.

        Raises:
            ImageFailure: the image is damaged, or its weights make nonsense.
        """
        try:
            self._check_bytes("off" if self._verify == "off" else "full")
            self._check_canary()
            self._kept_source = self._weights_source()
        except VerificationFailed as error:
            images = [Path(facts.image_dir) for facts in self._executor.call("facts")]
            image, names = images[0], " ".join(image.name for image in images)
            command = f"shuteye images rm {names} --cache-dir {shlex.quote(str(image.parent.parent))}"
            raise ImageFailure(
                f"The weight image {image} cannot be served: {error.message} "
                f"Run `{command}` and start again: it is then rebuilt from the checkpoint."
            ) from error

    def check_after_update(self, *, reloaded: bool) -> None:
        """Record, or compare, the canary of weights that were just written; `reloaded` ones have checksums, too.

        Raises:
            EngineFaulted: the logits are not finite, or the image that was reloaded is not what it was.
        """
        try:
            if reloaded:
                self._check_bytes(self._mode)
            self._check_canary()
            self._kept_source = self._weights_source()
        except EngineFaulted:
            raise
        except ShuteyeError as error:
            raise self.fault(f"the new weights cannot be trusted: {error.message}") from error

    def _restore(self, plan: WakePlan, *, verify: VerifyMode, defer_canary: bool) -> WakeReport:
        self.proof_pending = False
        try:
            ranks = self._call("restore", plan)
            self.refresh()
            verified = self._check_bytes(verify) if plan.weights in ("restore", "reload") else 0
            canary = not defer_canary and self._check_canary()
            if defer_canary and self._can_run_canary:
                self._call("defer_canary")
                self.proof_pending = True
            reports, kept, source = self._summed(ranks), self._kept_source, self._weights_source()
        except EngineFaulted as error:
            if self.state.faulted is not None:
                self._undo_on_survivors()
                raise
            raise self.fault(error.message) from error
        except ShuteyeError as error:
            self._undo(error)
            if isinstance(error, WakeFailed):
                raise
            hope = "" if isinstance(error, ImageFailure) else ", a retry may work"
            raise WakeFailed(f"Still asleep{hope}: {error.message}") from error
        if not self.state.missing:
            self._kept_source = source
        return WakeReport(
            changed=True,
            tags=reports,
            restored_bytes=sum(report.restored_bytes for report in reports),
            verified=verify if verified else "off",
            verified_bytes=verified,
            canary=canary,
            weights_source=source,
            missing=self.state.missing,
            updates_lost=kept is not None and source != kept,
            ranks=tuple(map(RankReport, range(len(ranks)), ranks)),
        )

    @property
    def _mode(self) -> VerifyMode:
        """How much of loaded weights is compared: all of them until that has gone well once, after they were not."""
        return "full" if self._distrusted else self._verify

    def _check_bytes(self, mode: VerifyMode) -> int:
        """Compare loaded weights with their checksums; how many bytes were."""
        if mode == "off":
            return 0
        results = self._call("verify", mode)
        bad = sum(len(result.bad_extents) for result in results)
        if bad:
            self._distrusted = True
            raise VerificationFailed(
                f"{bad} extents of the weights differ from their checksums. `shuteye images verify` tells whether the "
                "image is damaged; a restart refuses a damaged one and says how to have it rebuilt."
            )
        if mode == "full":
            self._distrusted = False
        return sum(result.verified_bytes for result in results)

    def _check_canary(self) -> bool:
        """Run the canary where the model can run at all; True if it ran."""
        if not self._can_run_canary:
            return False
        if not all(self._call("canary_agrees")):
            raise VerificationFailed(CANARY_DISAGREES)
        return True

    @property
    def _can_run_canary(self) -> bool:
        return self._canary and not self.state.is_sleeping

    def _undo(self, cause: ShuteyeError) -> None:
        try:
            self._executor.call("undo_restore")
        except ShuteyeError as error:
            raise self.fault(f"rolling back a wake failed: {error.message}, after: {cause.message}") from error
        self.refresh()

    def _undo_on_survivors(self) -> None:
        """A rank has died in a wake, and what the others have mapped serves nobody; `wake` resets them, too."""
        lost = {failure.rank for failure in self._executor.failures()}
        if lost:
            alive = [rank for rank in range(self._executor.num_ranks) if rank not in lost]
            self._executor.outcomes("undo_restore", ranks=alive)

    def _recover(self) -> None:
        try:
            self.num_restarts += self._executor.recover()
            self._identities = self._executor.call("identity")
            self._executor.call("reset")
            self._make_alike()
        except ShuteyeError as error:
            raise self.fault(f"recovering failed: {error.message}") from error
        self._set(faulted=None)
        self.refresh()

    def _make_alike(self) -> None:
        """Weights that some rank cannot bring back are of no use on the others: all begin with the image's."""
        sources = self._executor.call("weights_source")
        where = [weights.residency for weights, *_ in self._executor.call("states")]
        if len({*sources}) > 1 or len({*where}) > 1:
            logger.warning("Updates of the weights were lost with a rank: the next wake loads the image's.")
            self._executor.call("release", SleepPlan(weights="discard"))

    # --- ranks that are as one ------------------------------------------------------------------

    def _call(self, verb: str, *args: Any) -> list[Any]:
        """Call a verb on every rank.

        Raises:
            EngineFaulted: a rank is no more, and the state says so.
            ShuteyeError: a rank refused.
        """
        try:
            return self._executor.call(verb, *args)
        except RankLost as lost:
            raise self.fault(lost.message) from lost

    def _call_or_fault(self, what: str, verb: str, *args: Any) -> list[Any]:
        """Call a verb that no rank may refuse; `what` says what it means if one does.

        Raises:
            EngineFaulted: one did, or is no more.
        """
        try:
            return self._call(verb, *args)
        except EngineFaulted:
            raise
        except ShuteyeError as error:
            raise self.fault(f"{what}: {error.message}") from error

    def _summed(self, ranks: Sequence[tuple[TagReport, ...]]) -> tuple[TagReport, ...]:
        try:
            return tuple(map(sum_reports, zip(*ranks, strict=True)))
        except RanksDisagree as error:
            raise self.fault(str(error)) from error

    def _weights_source(self) -> str:
        sources: list[str] = self._call("weights_source")
        if len({*sources}) > 1:
            raise self.fault(f"the ranks have different weights: {', '.join(sources)}")
        return sources[0]

    def look_after_ranks(self) -> None:
        """Fault if a rank has died, whatever it did."""
        failures = self._executor.failures()
        if failures and self.state.faulted is None:
            self.fault("; ".join(map(str, failures)))
        elif failures:
            self._mark_dead()

    def _mark_dead(self) -> None:
        """What the dead held is gone: it is neither theirs any more, nor in the sum."""
        how = {failure.rank: failure.how for failure in self._executor.failures()}
        ranks = [replace(one, tags=(), failure=how[one.rank]) if one.rank in how else one for one in self.state.ranks]
        left = [tag for one in ranks for tag in one.tags]
        tags = (
            replace(tag, resident_bytes=sum(one.resident_bytes for one in left if one.tag == tag.tag))
            for tag in self.state.tags
        )
        self._set(ranks=tuple(ranks), tags=tuple(tags))

    def step_ended(self, *, well: bool) -> None:
        """The canary that went with a step has agreed; after an error, some ranks may know it and some not."""
        pending, self.proof_pending = self.proof_pending, False
        if pending and not well:
            self._call_or_fault("the wake cannot be proven", "defer_canary")
            self.proof_pending = True

    def fault(self, reason: str) -> EngineFaulted:
        """Serve nothing from now on until `wake` has recovered; the error to raise."""
        self._distrusted = True
        self._set(faulted=reason)
        self._mark_dead()
        self.on_fault()
        return EngineFaulted(f"Nothing is served: {reason}. POST /wake_up tries to recover with a full verification.")

    def refuse_if_faulted(self) -> None:
        """Raise EngineFaulted while a transition that could not be rolled back is in force."""
        if self.state.faulted is not None:
            raise EngineFaulted(f"The engine is faulted ({self.state.faulted}); only wake_up can recover it.")

    def _set(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
