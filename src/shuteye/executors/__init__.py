"""The seam between the engine core and its ranks: run a step, call a verb on every rank.

Knows nothing of how a rank is reached; `inproc` is the executor of one rank, `multiproc` of several, wherever they run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shuteye.config import EngineConfig, ExecutorBackend
from shuteye.errors import (
    EngineFaulted,
    GroupAborted,
    InvalidRequest,
    RankLost,
    ShuteyeError,
    VerificationFailed,
)
from shuteye.parallel.shards import ONE_RANK, RankPlace
from shuteye.tasks.table import Plan, Result

if TYPE_CHECKING:
    from shuteye.executors.links import Launcher
    from shuteye.models.converter import Computing


@dataclass(frozen=True, slots=True)
class Ticket:
    """A step that was posted, and for whose outcome one can ask once.

    Attributes:
        call_id: what the answers to it carry; 0 if nobody was asked yet.
        error: why no rank was asked at all.
    """

    plan: Plan
    call_id: int = 0
    error: ShuteyeError | None = None


@dataclass(frozen=True, slots=True)
class RankFailure:
    """A rank that is no more.

    Attributes:
        how: it ended, as in "rank 1 was ended by SIGKILL".
    """

    rank: int
    how: str

    def __str__(self) -> str:
        return f"rank {self.rank} {self.how}"


class Executor(ABC):
    """One or more ranks that act as one.

    Attributes:
        num_ranks: how many.
        max_in_flight: steps that may have been posted and not yet collected; more than one where ranks work in turn.
    """

    num_ranks: int = 1
    max_in_flight: int = 1

    @abstractmethod
    def execute(self, plan: Plan) -> Result:
        """Run one step on every rank and return what came of it: the result that goes with the plan's type.

        Raises:
            RankLost: a rank has died; which requests of the step it had computed is not known.
            ShuteyeError: the step failed; no rank advanced its requests.
        """

    def post(self, plan: Plan) -> Ticket:
        """Give a step to every rank, behind those that were posted before. Never waits, unless nothing is in flight."""
        return Ticket(plan)

    def collect(self, ticket: Ticket) -> Result:
        """Wait for the oldest step that was posted; nothing but `post` may be asked before all are collected.

        Once this has raised, whatever was posted behind must not be used: it may build on what was not computed.

        Raises:
            RankLost, ShuteyeError: as `execute` does.
        """
        return self.execute(ticket.plan)

    @abstractmethod
    def outcomes(self, verb: str, *args: Any, ranks: Collection[int] | None = None) -> dict[int, Any]:
        """Call one of `worker.VERBS` on every rank, or on `ranks`: what each returned, or the error it raised."""

    def call(self, verb: str, *args: Any) -> list[Any]:
        """Call one of `worker.VERBS` on every rank; the answers in rank order.

        Raises:
            ShuteyeError: a rank refused; every rank has answered before this is raised, and it names those that did.
        """
        return answers(self.outcomes(verb, *args), num_ranks=self.num_ranks)

    @abstractmethod
    def close(self) -> None:
        """End every rank and give back its memory; idempotent."""

    # --- ranks that end by themselves: of one rank in this process, none does ------------------------

    def failures(self) -> tuple[RankFailure, ...]:
        """The ranks that have died; never waits."""
        return ()

    def on_failure(self, notify: Callable[[], None]) -> None:  # noqa: B027
        """Call `notify` whenever a rank has died, from another thread."""

    def on_failure_in_call(self, look: Callable[[], None]) -> None:  # noqa: B027
        """Call `look` whenever a rank dies during a call whose other answers are waited for, from whoever waits."""

    def recover(self) -> bool:
        """Start ranks in the place of those that have died, their weights loaded as at first; whether there were any.

        Raises:
            ShuteyeError: a rank could not be started; calling again goes on from there.
        """
        return False


def answers(outcomes: Mapping[int, Any], *, num_ranks: int) -> list[Any]:
    """What ranks returned, in rank order.

    Raises:
        ShuteyeError: some raised; one error that names each of them, of the class that matters most.
    """
    failed = {rank: found for rank, found in outcomes.items() if isinstance(found, ShuteyeError)}
    if failed:
        raise _as_one(failed, num_ranks=num_ranks)
    return [outcomes[rank] for rank in sorted(outcomes)]


_WEIGHTIEST = (EngineFaulted, VerificationFailed)


def _as_one(failed: Mapping[int, ShuteyeError], *, num_ranks: int) -> ShuteyeError:
    """Ranks that were kept from going on by others (`GroupAborted`) are named only if nobody says why."""
    causes = {rank: error for rank, error in failed.items() if not isinstance(error, GroupAborted)} or failed
    lost = {error.message: None for error in failed.values() if isinstance(error, RankLost)}
    if lost:
        return RankLost("; ".join(lost))
    weighty = [error for kind in _WEIGHTIEST for error in causes.values() if isinstance(error, kind)]
    first = [*weighty, *causes.values()][0]
    if num_ranks == 1:
        return first
    if len(causes) == num_ranks and len({error.message for error in causes.values()}) == 1:
        text = first.message  # every rank says the same
    else:
        text = "; ".join(f"rank {rank}: {error.message}" for rank, error in sorted(causes.items()))
    return type(first)(text, param=first.param)


def open_executor(config: EngineConfig) -> Executor:
    """The executor that the config names, its ranks loaded: the first time that makes the image, which takes longer.

    Raises:
        ShuteyeError: loading failed.
        InvalidRequest: several ranks where only one can be, or a backend that is not there yet.
    """
    num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size
    backend = config.distributed_executor_backend or ("inproc" if num_ranks == 1 else "mp")
    param = "distributed_executor_backend"
    if backend != "inproc":
        from shuteye.executors.multiproc import MultiprocExecutor

        return MultiprocExecutor(config, _launcher(config, backend))
    if num_ranks > 1:
        raise InvalidRequest(
            f"{param} 'inproc' serves one rank, and {num_ranks} are wanted: use 'mp', or leave it out.", param=param
        )
    from shuteye.executors.inproc import InprocExecutor

    return InprocExecutor(config)


def computing_here(config: EngineConfig) -> Computing:
    """What will compute in a process that has `open_executor` make ranks, as far as an image that is there tells."""
    from shuteye.models.converter import Order, computing_of

    several = config.tensor_parallel_size * config.pipeline_parallel_size > 1
    if several or config.distributed_executor_backend in ("mp", "ray"):
        return "native"  # nothing does: ranks have processes of their own
    return computing_of(Order.of(config, ONE_RANK))


def _launcher(config: EngineConfig, backend: ExecutorBackend) -> Launcher:
    places = RankPlace(0, config.tensor_parallel_size, config.pipeline_parallel_size).all()
    if backend == "ray":
        from shuteye.executors.ray_ranks import RayLauncher

        return RayLauncher(config, places)
    from shuteye.executors.local_ranks import LocalLauncher, make_images

    make_images(config, places[0])
    return LocalLauncher(places)
