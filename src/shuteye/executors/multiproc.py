"""Several ranks, each a process of this machine: asked all at once, with a deadline, and watched for their death.

Knows nothing of sleep: what a failure means for the engine, `engine/controller.py` says. ADR 18 has the protocol.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import zmq

from shuteye.config import EngineConfig
from shuteye.errors import EngineFaulted, MemoryExhausted, RankLost, ShuteyeError, UnsupportedModel, rebuild
from shuteye.executors import Executor, RankFailure, answers
from shuteye.executors.frames import MEETING_VERBS, RESULTS, Meeting, Start, ask
from shuteye.executors.rank_process import RankProcess
from shuteye.models.weight_updates import tensor_file
from shuteye.parallel.group import ShmRegion
from shuteye.parallel.shards import RankPlace
from shuteye.tasks.table import Plan, Result

logger = logging.getLogger(__name__)

_GRACE_S = 1.0
"""After a deadline, how long a rank that only waited for another one may take to say so."""
_LONG_VERBS = frozenset({"reload_weights", "check_update", "update_weights_from_file"})
"""They read files, or make an image: `step_timeout_s` is their deadline, if it is later."""


class MultiprocExecutor(Executor):
    """Ranks as processes that compute one model together.

    A rank that fails in a step ends the step for all of them: they go on in new groups, of the next epoch. One that
    dies is seen by a thread, which ends whatever the others wait for.

    Raises:
        ShuteyeError: a rank could not load.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._places = RankPlace(0, config.tensor_parallel_size, config.pipeline_parallel_size).all()
        self.num_ranks = len(self._places)
        self._sampling_rank = self.num_ranks - config.tensor_parallel_size  # see `ShardPlan.holds_sampler`
        self._call_ids = itertools.count(1)
        self._epoch = 0
        self._num_updates = 0
        self._kv_blocks: int | None = None
        self._reloaded_from: str | None = None
        self._incomplete: set[int] = set()  # started, but not yet brought to where the others are
        self._context: zmq.Context[Any] = zmq.Context()
        self._processes: dict[int, RankProcess] = {}
        self._groups = _Regions(self._places, epoch=0, timeout_s=0.0)
        self._watch = _Watch(self._note_death)
        try:
            self._meet()
            self._start(range(self.num_ranks))
            self._refuse_other_tasks()
        except BaseException:
            self.close()
            raise

    def _refuse_other_tasks(self) -> None:
        """Several ranks refuse by themselves what cannot be split; one rank may be given any model."""
        task = super().call("facts")[0].task
        if task != "generate":
            raise UnsupportedModel(
                f"distributed_executor_backend 'mp' serves models that generate, and this is one for the task "
                f"{task!r}; leave it out.",
                param="distributed_executor_backend",
            )

    # --- asking ---------------------------------------------------------------------------------

    def execute(self, plan: Plan) -> Result:
        """Run one step on every rank; the result of the one that samples. See `Executor.execute`."""
        outcomes = self.outcomes("execute", plan)
        answers(outcomes, num_ranks=self.num_ranks)
        result: Result = outcomes[self._sampling_rank]
        return result

    def call(self, verb: str, *args: Any) -> list[Any]:
        """Call a verb on every rank; see `Executor.call`. What writes weights is checked on all before any writes."""
        match verb:
            case "update_weights":
                file = tensor_file(*args)
                try:
                    return self._update(file.path)
                finally:
                    file.close()
            case "update_weights_from_file":
                return self._update(*args)
            case "reload_weights":
                return self._reload(*args)
            case "allocate_kv_cache":
                (self._kv_blocks,) = args
        return super().call(verb, *args)

    def outcomes(self, verb: str, *args: Any, ranks: Collection[int] | None = None) -> dict[int, Any]:
        """Ask all of them before waiting for any; see `Executor.outcomes`."""
        asked = range(self.num_ranks) if ranks is None else ranks
        if verb in MEETING_VERBS:
            try:
                self._be_together()
            except ShuteyeError as error:
                return dict.fromkeys(asked, error)
        return self._ask(asked, verb, args)

    def _ask(self, ranks: Iterable[int], verb: str, args: tuple[Any, ...]) -> dict[int, Any]:
        call_id = next(self._call_ids)
        frame = ask(call_id, verb, args)
        ranks = tuple(ranks)
        dead = {failure.rank for failure in self.failures()}
        for rank in ranks:
            if rank not in dead:
                self._processes[rank].post(frame)
        patience_s = self._config.rank_timeout_s
        if verb in _LONG_VERBS:
            patience_s = max(patience_s, self._config.step_timeout_s)
        return self._gather(ranks, call_id, verb, patience_s)

    def _gather(self, ranks: Iterable[int], call_id: int, verb: str, patience_s: float | None) -> dict[int, Any]:
        """Every rank's answer; of those that died, or have to be killed at the deadline, `RankLost`."""
        found: dict[int, Any] = {}
        waiting = set(ranks)
        poller = zmq.Poller()
        poller.register(self._watch.died, zmq.POLLIN)
        for rank in waiting:
            poller.register(self._processes[rank].socket, zmq.POLLIN)
        deadline = None if patience_s is None else time.monotonic() + patience_s
        is_late = False
        while True:
            dead = {failure.rank: failure for failure in self.failures()}
            for rank in tuple(waiting):
                outcome = self._received(rank, call_id, verb)
                if outcome is None and rank in dead:
                    outcome = (RankLost(str(dead[rank])),)
                if outcome is not None:
                    (found[rank],) = outcome
                    waiting.remove(rank)
            if not waiting:
                return {rank: found[rank] for rank in sorted(found)}
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                self._be_late(waiting, verb, patience_s, is_late=is_late)
                is_late, deadline = True, time.monotonic() + _GRACE_S
                left_s = _GRACE_S
            poller.poll(None if left_s is None else int(left_s * 1000) + 1)
            self._watch.settle()

    def _received(self, rank: int, call_id: int, verb: str) -> tuple[Any] | None:
        """The rank's answer to the call, if it has come; answers to earlier ones are dropped."""
        process = self._processes[rank]
        while (reply := process.received()) is not None:
            if reply.call_id != call_id or reply.epoch not in (process.epoch, self._epoch):
                continue
            if reply.error is not None:
                return (rebuild(reply.error.kind, reply.error.message, reply.error.param),)
            process.epoch = reply.epoch
            return (RESULTS[verb].decode(reply.result),)
        return None

    def _be_late(self, waiting: Collection[int], verb: str, patience_s: float | None, *, is_late: bool) -> None:
        """Those that only wait for others get a moment to say so; the rest are killed."""
        assert patience_s is not None
        if not is_late:
            ranks = ", ".join(map(str, sorted(waiting)))
            self._groups.abort(f"rank {ranks} did not answer {verb} within {patience_s:g} s")
            return
        for rank in waiting:
            self._processes[rank].kill(f"did not answer {verb} within {patience_s:g} s")

    # --- weights --------------------------------------------------------------------------------

    def _update(self, path: str) -> list[Any]:
        super().call("check_update", path)
        self._num_updates += 1
        return self._written(self.outcomes("update_weights_from_file", path, self._num_updates))

    def _reload(self, path: str | None) -> list[Any]:
        outcomes = self.outcomes("reload_weights", path)
        if all(isinstance(outcome, ShuteyeError) for outcome in outcomes.values()):
            return answers(outcomes, num_ranks=self.num_ranks)  # raises; all of them are as one
        written = self._written(outcomes)
        self._reloaded_from = path or self._reloaded_from
        return written

    def _written(self, outcomes: dict[int, Any]) -> list[Any]:
        try:
            return answers(outcomes, num_ranks=self.num_ranks)
        except RankLost:
            raise
        except ShuteyeError as error:
            raise EngineFaulted(f"some ranks have the new weights and some have not: {error.message}") from error

    # --- groups ---------------------------------------------------------------------------------

    def _meet(self) -> None:
        """Make the groups of the next epoch; nobody has joined them yet."""
        self._epoch += 1
        old = self._groups
        self._groups = _Regions(self._places, epoch=self._epoch, timeout_s=2 * self._config.rank_timeout_s)
        old.close()
        for failure in self.failures():
            self._groups.abort(str(failure))

    def _be_together(self) -> None:
        """Before ranks wait for one another: all live, and no group is one that was aborted.

        Raises:
            RankLost: a rank is dead.
        """
        if failures := self.failures():
            raise RankLost("; ".join(map(str, failures)))
        if self._groups.aborted:
            self._meet()
            self._join(range(self.num_ranks))

    def _join(self, ranks: Iterable[int]) -> None:
        ranks = tuple(ranks)
        call_id = next(self._call_ids)
        for rank in ranks:
            self._processes[rank].post(ask(call_id, "join", (self._groups.meeting(self._places[rank]),)))
        try:
            answers(self._gather(ranks, call_id, "join", self._config.rank_timeout_s), num_ranks=self.num_ranks)
        except ShuteyeError:
            self._groups.abort("not all ranks have joined")
            raise

    # --- ranks that die -------------------------------------------------------------------------

    def failures(self) -> tuple[RankFailure, ...]:
        """See `Executor.failures`."""
        return self._watch.failures()

    def on_failure(self, notify: Callable[[], None]) -> None:
        """See `Executor.on_failure`."""
        self._watch.notify = notify

    def _note_death(self, failure: RankFailure) -> None:
        """On the watching thread: the others must not wait for it."""
        logger.error("R%s; nothing is served until the model is woken.", str(failure)[1:])
        self._groups.abort(str(failure))

    def recover(self) -> bool:
        """Start the dead again, and let all of them meet in new groups; see `Executor.recover`."""
        for _ in self._places:
            with contextlib.suppress(RankLost):  # another one died meanwhile, or had and was not seen yet
                return self._recover()
        return self._recover()

    def _recover(self) -> bool:
        dead = [failure.rank for failure in self.failures()]
        if not dead and not self._incomplete:
            return False
        self._meet()
        self._start(dead)
        self._join(sorted(self._processes.keys() - set(dead)))
        for rank in sorted(self._incomplete):
            self._bring_up(rank)
        return True

    def _start(self, ranks: Iterable[int]) -> None:
        ranks = tuple(ranks)
        for rank in ranks:
            start = Start(self._config, self._places[rank], self._groups.meeting(self._places[rank]))
            try:
                process = RankProcess(self._context, start)
            except OSError as error:
                raise MemoryExhausted(f"The process of rank {rank} cannot be started: {error}.") from error
            if rank in self._processes:
                self._processes[rank].close()
            self._processes[rank] = process
            self._watch.add(process)
            if self._kv_blocks is not None:
                self._incomplete.add(rank)
        answers(self._gather(ranks, 0, "start", None), num_ranks=self.num_ranks)

    def _bring_up(self, rank: int) -> None:
        """Do what the others have done since they were started."""
        if self._reloaded_from is not None:
            answers(self._ask([rank], "reload_weights", (self._reloaded_from,)), num_ranks=self.num_ranks)
        answers(self._ask([rank], "allocate_kv_cache", (self._kv_blocks,)), num_ranks=self.num_ranks)
        self._incomplete.remove(rank)

    def close(self) -> None:
        """Kill every rank; see `Executor.close`."""
        self._watch.close()
        for process in self._processes.values():
            process.stop_loading()
        for process in self._processes.values():
            process.close()
        self._processes.clear()
        self._groups.close()
        self._context.term()


class _Regions:
    """The memory of one epoch's groups: one for the ranks of each stage, one for those of each place in a stage."""

    def __init__(self, places: tuple[RankPlace, ...], *, epoch: int, timeout_s: float) -> None:
        first = places[0]
        self._epoch, self._timeout_s = epoch, timeout_s
        self._lock = threading.Lock()
        self._tensor: list[ShmRegion] = []
        self._pipeline: list[ShmRegion] = []
        if epoch == 0:
            return  # of ranks that have not met yet
        if first.tp_size > 1:
            self._tensor = [ShmRegion(first.tp_size, epoch=epoch) for _ in range(first.pp_size)]
        if first.pp_size > 1:
            self._pipeline = [ShmRegion(first.pp_size, epoch=epoch) for _ in range(first.tp_size)]

    def meeting(self, place: RankPlace) -> Meeting:
        """What a rank must know to join."""
        return Meeting(
            self._epoch,
            tensor=self._tensor[place.pp_rank].path if self._tensor else None,
            pipeline=self._pipeline[place.tp_rank].path if self._pipeline else None,
            timeout_s=self._timeout_s,
        )

    @property
    def aborted(self) -> bool:
        """Whether a group was ended, by whomever."""
        return any(region.fault() is not None for region in (*self._tensor, *self._pipeline))

    def abort(self, reason: str) -> None:
        """End every wait of every rank; from any thread."""
        with self._lock:
            for region in (*self._tensor, *self._pipeline):
                region.abort(reason)

    def close(self) -> None:
        """Give up this process' part. Idempotent."""
        with self._lock:
            for region in (*self._tensor, *self._pipeline):
                region.close()
            self._tensor, self._pipeline = [], []


class _Watch:
    """A thread that sees processes die.

    Args:
        on_death: called from the thread, before `notify`.

    Attributes:
        died: a descriptor that can be read after a death, until `settle`.
        notify: called from the thread, after a death.
    """

    def __init__(self, on_death: Callable[[RankFailure], None]) -> None:
        self.died = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.notify: Callable[[], None] = lambda: None
        self._on_death = on_death
        self._changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._watched: dict[int, RankProcess] = {}
        self._failures: dict[int, RankFailure] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shuteye-ranks", daemon=True)
        self._thread.start()

    def failures(self) -> tuple[RankFailure, ...]:
        """Those that have died and were not forgotten."""
        with self._lock:
            return tuple(self._failures[rank] for rank in sorted(self._failures))

    def add(self, process: RankProcess) -> None:
        """Watch a process, in the place of one that may have died."""
        with self._lock:
            self._failures.pop(process.rank, None)
            self._watched[process.rank] = process
        os.eventfd_write(self._changed, 1)

    def settle(self) -> None:
        """Whoever waited for deaths has been told of all so far."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.died)

    def close(self) -> None:
        """End the thread. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        os.eventfd_write(self._changed, 1)
        self._thread.join()
        os.close(self.died)
        os.close(self._changed)

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                watched = {process.pidfd: process for process in self._watched.values()}
            poller = select.poll()
            for fd in (self._changed, *watched):
                poller.register(fd, select.POLLIN)
            ready = [fd for fd, _ in poller.poll()]
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._changed)
            if self._closing.is_set():
                return
            for process in (watched[fd] for fd in ready if fd in watched):
                self._note(process)

    def _note(self, process: RankProcess) -> None:
        failure = RankFailure(process.rank, process.reap())
        with self._lock:
            del self._watched[process.rank]
            self._failures[process.rank] = failure
        self._on_death(failure)  # later: groups that are made meanwhile by those who know of it are ended by them
        os.eventfd_write(self.died, 1)
        self.notify()
