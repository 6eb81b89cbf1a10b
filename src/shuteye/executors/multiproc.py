"""Several ranks, each a process of its own: asked all at once, with a deadline, and watched for their death.

Knows nothing of sleep: what a failure means for the engine, `engine/controller.py` says; nor of where ranks run, and
how they are reached: `links.py` has the seam. ADR 18 has the protocol.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import zmq

from shuteye.config import EngineConfig
from shuteye.errors import EngineFaulted, GroupAborted, RankLost, ShuteyeError, UnsupportedModel, rebuild
from shuteye.executors import Executor, RankFailure, Ticket, answers
from shuteye.executors.file_copies import FileCopies, write_files
from shuteye.executors.frames import MEETING_VERBS, RESULTS, Start, ask
from shuteye.executors.links import Groups, Launcher, RankLink
from shuteye.executors.watch import DeathWatch
from shuteye.model_info import ModelSpec
from shuteye.models.weight_updates import tensor_file, tensor_files
from shuteye.parallel.shards import RankPlace
from shuteye.state import UpdateReport
from shuteye.tasks.table import Plan, Result

logger = logging.getLogger(__name__)

_GRACE_S = 1.0
"""After a deadline, how long a rank that only waited for another one may take to say so."""
_END_S = 10.0
"""How long a rank that was killed may take to be gone."""
_LONGEST_POLL_S = 3600.0
"""ZeroMQ counts milliseconds in a C int."""
_LONG_VERBS = frozenset({"reload_weights", "check_update", "update_weights_from_file"})
"""They read files, or make an image: `step_timeout_s` is their deadline, if it is later."""


class MultiprocExecutor(Executor):
    """Ranks as processes that compute one model together.

    A rank that fails in a step ends the step for all of them: they go on in new groups, of the next epoch. One that
    dies is seen by a thread, which ends whatever the others wait for.

    Args:
        launcher: starts the ranks, and is closed with them.

    Raises:
        ShuteyeError: a rank could not load.
    """

    def __init__(self, config: EngineConfig, launcher: Launcher) -> None:
        self._config = config
        self._launcher = launcher
        self._places = RankPlace(0, config.tensor_parallel_size, config.pipeline_parallel_size).all()
        self.num_ranks = len(self._places)
        self.max_in_flight = config.pipeline_parallel_size  # one step for each stage
        self._sampling_rank = self.num_ranks - config.tensor_parallel_size  # see `ShardPlan.holds_sampler`
        self._call_ids = itertools.count(1)
        # Steps posted and not collected. Each rank answers in their order, so that answers wait in its socket.
        self._posted: deque[Ticket] = deque()
        self._epoch = 0
        self._num_updates = 0
        self._kv_blocks: int | None = None
        self._model_config = config  # of the model that is served: reloading may have changed where it comes from
        self._image_keys: dict[int, str] = {}
        self._incomplete: set[int] = set()  # started, but not yet brought to where the others are
        self._processes: dict[int, RankLink] = {}
        self._groups: Groups | None = None
        self._look: Callable[[], None] = lambda: None
        self._watch = DeathWatch(self._note_death)
        try:
            self._meet()
            self._launch(range(self.num_ranks))
            self._require_all(self._gather(range(self.num_ranks), 0, "start", None))  # it may fetch and convert
            self._refuse_other_tasks()
            self._note_images()
        except BaseException:
            self.close()
            raise

    def _refuse_other_tasks(self) -> None:
        """Several ranks refuse by themselves what cannot be split; one rank may be given any model."""
        task = super().call("facts")[0].task
        if task != "generate":
            raise UnsupportedModel(
                f"distributed_executor_backend {self._config.distributed_executor_backend!r} serves models that "
                f"generate, and this is one for the task {task!r}; leave it out.",
                param="distributed_executor_backend",
            )

    # --- asking ---------------------------------------------------------------------------------

    def execute(self, plan: Plan) -> Result:
        """Run one step on every rank; the result of the one that samples. See `Executor.execute`."""
        return self.collect(self.post(plan))

    def post(self, plan: Plan) -> Ticket:
        """Ask every rank, behind the steps before; nobody, if one of those has failed. See `Executor.post`."""
        assert len(self._posted) < self.max_in_flight, "as many steps are in flight as may be"
        ticket = Ticket(plan, next(self._call_ids))
        try:
            self._be_together()
        except ShuteyeError as error:
            ticket = Ticket(plan, error=error)
        else:
            self._send(dict.fromkeys(range(self.num_ranks), ask(ticket.call_id, "execute", (plan,))))
        self._posted.append(ticket)
        return ticket

    def collect(self, ticket: Ticket) -> Result:
        """The result of the rank that samples; see `Executor.collect`. The deadline counts from here."""
        assert ticket is self._posted[0], "steps are collected in the order in which they were posted"
        try:
            if ticket.error is not None:
                raise ticket.error
            outcomes = self._gather(range(self.num_ranks), ticket.call_id, "execute", self._config.rank_timeout_s)
            answers(outcomes, num_ranks=self.num_ranks)
        except ShuteyeError:
            self._abort("execute failed")  # as whoever failed has done, where this process may not see it
            raise
        finally:
            self._posted.popleft()
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
            case "facts":
                return self._facts()
        return super().call(verb, *args)

    def outcomes(self, verb: str, *args: Any, ranks: Collection[int] | None = None) -> dict[int, Any]:
        """Ask all of them before waiting for any; see `Executor.outcomes`."""
        asked = range(self.num_ranks) if ranks is None else ranks
        if verb in MEETING_VERBS:
            try:
                self._be_together()
            except ShuteyeError as error:
                return dict.fromkeys(asked, error)
        outcomes = self._ask(asked, verb, args)
        if verb in MEETING_VERBS and any(isinstance(outcome, ShuteyeError) for outcome in outcomes.values()):
            self._abort(f"{verb} failed")  # as whoever failed has done, where this process may not see it
        return outcomes

    def _ask(self, ranks: Iterable[int], verb: str, args: tuple[Any, ...]) -> dict[int, Any]:
        call_id = next(self._call_ids)
        frame = ask(call_id, verb, args)
        return self._answers_to(dict.fromkeys(ranks, frame), call_id, verb)

    def _ask_each(self, args: Mapping[int, tuple[Any, ...]], verb: str) -> dict[int, Any]:
        """As `_ask`, with arguments for each rank."""
        call_id = next(self._call_ids)
        return self._answers_to({rank: ask(call_id, verb, its) for rank, its in args.items()}, call_id, verb)

    def _answers_to(self, frames: Mapping[int, bytes], call_id: int, verb: str) -> dict[int, Any]:
        assert not self._posted, f"{verb} was asked before every step was collected"
        self._send(frames)
        patience_s = self._config.rank_timeout_s
        if verb in _LONG_VERBS:
            patience_s = max(patience_s, self._config.step_timeout_s)
        return self._gather(frames, call_id, verb, patience_s)

    def _send(self, frames: Mapping[int, bytes]) -> None:
        dead = {failure.rank for failure in self.failures()}
        for rank, frame in frames.items():
            if rank not in dead:
                self._processes[rank].post(frame)

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
                    poller.unregister(self._processes[rank].socket)  # what comes next is of a later step
            if not waiting:
                return {rank: found[rank] for rank in sorted(found)}
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                self._be_late(waiting, verb, patience_s, is_late=is_late)
                is_late, deadline = True, time.monotonic() + _GRACE_S
                left_s = _GRACE_S
            poller.poll(None if left_s is None else int(min(left_s, _LONGEST_POLL_S) * 1000) + 1)
            if self._watch.settle():
                self._look()  # now, as the others may work for a long time yet

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
            self._abort(f"rank {ranks} did not answer {verb} within {patience_s:g} s")
            return
        for rank in waiting:
            self._processes[rank].kill(f"did not answer {verb} within {patience_s:g} s")

    # --- weights --------------------------------------------------------------------------------

    def _update(self, path: str) -> list[Any]:
        """Check on all ranks, then write on all, whose reports are of all files together."""
        with FileCopies(self._call_some, self._launcher.away()) as copies:
            files = tensor_files(path) if self._launcher.away() else [Path(path)]
            paths = [copies.paths(file, range(self.num_ranks)) for file in files]
            for where in paths:
                answers(
                    self._ask_each({rank: (path,) for rank, path in where.items()}, "check_update"),
                    num_ranks=self.num_ranks,
                )
            self._num_updates += 1
            number = self._num_updates
            reports = [
                self._written(
                    self._ask_each({rank: (path, number) for rank, path in where.items()}, "update_weights_from_file")
                )
                for where in paths
            ]
        return [_added(of_rank) for of_rank in zip(*reports, strict=True)]

    def _call_some(self, ranks: Collection[int], verb: str, args: tuple[Any, ...]) -> list[Any]:
        return answers(self._ask(ranks, verb, args), num_ranks=self.num_ranks)

    def _reload(self, path: str | None) -> list[Any]:
        outcomes = self.outcomes("reload_weights", path)
        if all(isinstance(outcome, ShuteyeError) for outcome in outcomes.values()):
            return answers(outcomes, num_ranks=self.num_ranks)  # raises; all of them are as one
        written = self._written(outcomes)
        if path is not None:
            self._model_config = replace(self._config, model=path, revision=None)
        self._note_images()
        return written

    def _note_images(self) -> None:
        """What ranks serve is what those that may have to take their places are to serve."""
        for rank, facts in enumerate(super().call("facts")):
            self._image_keys[rank] = Path(facts.image_dir).name

    def _written(self, outcomes: dict[int, Any]) -> list[Any]:
        try:
            return answers(outcomes, num_ranks=self.num_ranks)
        except RankLost:
            raise
        except ShuteyeError as error:
            raise EngineFaulted(f"some ranks have the new weights and some have not: {error.message}") from error

    def _facts(self) -> list[Any]:
        """Of a tokenizer that lies on another machine, a copy is named that this one can read."""
        found: list[ModelSpec] = super().call("facts")
        if 0 not in self._launcher.away():
            return found
        here = self._config.cache_dir / "tokenizers" / Path(found[0].image_dir).name
        if not here.is_dir():
            (files,) = self._call_some([0], "tokenizer_files", ())
            write_files(here, files)
        return [replace(found[0], tokenizer_dir=str(here)), *found[1:]]

    # --- groups ---------------------------------------------------------------------------------

    def _meet(self, *, instead_of: Collection[int] = ()) -> None:
        """Make the groups of the next epoch; nobody has joined them yet. Ranks start `instead_of` dead ones."""
        self._epoch += 1
        old = self._groups
        self._groups = self._launcher.groups(epoch=self._epoch, timeout_s=2 * self._config.rank_timeout_s)
        if old is not None:
            old.close()
        for failure in self.failures():
            if failure.rank not in instead_of:
                self._groups.abort(str(failure))

    def _abort(self, reason: str) -> None:
        if self._groups is not None:
            self._groups.abort(reason)

    def _be_together(self) -> None:
        """Before ranks wait for one another: all live, and no group is one that was aborted.

        Raises:
            RankLost: a rank is dead.
            GroupAborted: the group of steps in flight was, and no other one can be joined before they are collected.
        """
        if failures := self.failures():
            raise RankLost("; ".join(map(str, failures)))
        if self._groups is None or self._groups.aborted:
            if self._posted:
                raise GroupAborted("a step before this one has failed")
            self._meet()
            self._join(range(self.num_ranks))

    def _join(self, ranks: Iterable[int]) -> None:
        ranks = tuple(ranks)
        self._require_all(self._gather(ranks, self._ask_to_join(ranks), "join", self._config.rank_timeout_s))

    def _ask_to_join(self, ranks: Iterable[int]) -> int:
        assert self._groups is not None
        call_id = next(self._call_ids)
        for rank in ranks:
            self._processes[rank].post(ask(call_id, "join", (self._groups.meeting(self._places[rank]),)))
        return call_id

    def _require_all(self, outcomes: dict[int, Any]) -> None:
        """All are in the groups, or nobody waits for the others there."""
        try:
            answers(outcomes, num_ranks=self.num_ranks)
        except ShuteyeError:
            self._abort("not all ranks have joined")
            raise

    # --- ranks that die -------------------------------------------------------------------------

    def failures(self) -> tuple[RankFailure, ...]:
        """See `Executor.failures`."""
        return self._watch.failures()

    def on_failure(self, notify: Callable[[], None]) -> None:
        """See `Executor.on_failure`."""
        self._watch.notify = notify

    def on_failure_in_call(self, look: Callable[[], None]) -> None:
        """See `Executor.on_failure_in_call`."""
        self._look = look

    def _note_death(self, failure: RankFailure) -> None:
        """On the watching thread: the others must not wait for it."""
        logger.error("R%s; nothing is served until the model is woken.", str(failure)[1:])
        self._abort(str(failure))

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
        self._meet(instead_of=dead)
        self._launch(dead)
        others = sorted(self._processes.keys() - set(dead))
        call_id = self._ask_to_join(others)  # before it is waited for those that start, who may wait for them to join
        outcomes = self._gather(dead, 0, "start", self._config.step_timeout_s)
        if failed := [rank for rank, outcome in outcomes.items() if isinstance(outcome, ShuteyeError)]:
            self._abort("not all ranks could be started")
            self._end(failed)
        self._require_all(outcomes | self._gather(others, call_id, "join", self._config.rank_timeout_s))
        for rank in sorted(self._incomplete):
            outcomes = self._ask([rank], "allocate_kv_cache", (self._kv_blocks,))
            if isinstance(outcomes[rank], ShuteyeError):  # how far it came is not known: the next one begins afresh
                self._end([rank])
            answers(outcomes, num_ranks=self.num_ranks)
            self._incomplete.remove(rank)
        self._note_images()
        return True

    def _launch(self, ranks: Iterable[int]) -> None:
        """Start ranks; nobody waits for them yet."""
        assert self._groups is not None
        for rank in ranks:
            meeting = self._groups.meeting(self._places[rank])
            start = Start(self._model_config, self._places[rank], meeting, image_key=self._image_keys.get(rank))
            process = self._launcher.start(start)
            if rank in self._processes:
                self._processes[rank].close()
            self._processes[rank] = process
            self._watch.add(process)
            if self._kv_blocks is not None:
                self._incomplete.add(rank)

    def _end(self, ranks: Collection[int]) -> None:
        """End ranks that could not be brought up: only then are they dead, and started by the next recovery."""
        for rank in ranks:
            self._processes[rank].kill("could not be brought up")
        poller = zmq.Poller()
        poller.register(self._watch.died, zmq.POLLIN)
        deadline = time.monotonic() + _END_S
        while not {*ranks} <= {failure.rank for failure in self.failures()} and time.monotonic() < deadline:
            poller.poll(100)
            self._watch.settle()

    def close(self) -> None:
        """Kill every rank; see `Executor.close`."""
        self._watch.close()
        for process in self._processes.values():
            process.stop_loading()
        for process in self._processes.values():
            process.close()
        self._processes.clear()
        if self._groups is not None:
            self._groups.close()
        self._launcher.close()


def _added(reports: Sequence[UpdateReport]) -> UpdateReport:
    """Of one rank, for one file after the other."""
    return replace(
        reports[-1],
        updated=sum(report.updated for report in reports),
        updated_bytes=sum(report.updated_bytes for report in reports),
        seconds=sum(report.seconds for report in reports),
    )
