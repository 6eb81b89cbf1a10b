"""Which machines of a Ray cluster ranks go to, and how many CPUs each gets. Pure.

Ranks add up in shared memory only within a machine, dozens of times a step, and hand hidden states on once a stage: so
all ranks on one machine are best, then all of a stage, then whatever there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shuteye.config import RayPlacement
from shuteye.errors import InvalidRequest
from shuteye.parallel.shards import RankPlace


@dataclass(frozen=True, slots=True)
class Machine:
    """A node of the cluster.

    Attributes:
        address: its IP address.
        free, cpus: whole CPUs that nothing has reserved, and all of them.
    """

    node_id: str
    address: str
    free: int
    cpus: int


@dataclass(frozen=True, slots=True)
class Placement:
    """What is asked of Ray: a placement group.

    Attributes:
        strategy: Ray's word for how bundles are spread.
        bundles: ranks that are on one machine, whichever that is.
        cpus_per_rank: reserved for each, and how many threads it computes with.
    """

    strategy: str
    bundles: tuple[tuple[int, ...], ...]
    cpus_per_rank: int

    @property
    def cpus(self) -> list[int]:
        """Of each bundle."""
        return [len(ranks) * self.cpus_per_rank for ranks in self.bundles]

    def bundle_of(self, rank: int) -> int:
        """Which one a rank is in."""
        return next(index for index, ranks in enumerate(self.bundles) if rank in ranks)


def place(
    places: Sequence[RankPlace], machines: Sequence[Machine], *, wanted: RayPlacement, num_threads: int | None
) -> Placement:
    """The best placement for which there are CPUs.

    Args:
        num_threads: CPUs of each rank; None gives them as many as there are.

    Raises:
        InvalidRequest: there are too few.
    """
    for strategy, bundles in _candidates(places, wanted):
        size, count = len(bundles[0]), len(bundles)
        most = max((machine.free for machine in machines), default=0) // size
        shares = range(most, 0, -1) if num_threads is None else [num_threads]
        for share in shares:
            if _fits(machines, size * share, count, apart=strategy == "STRICT_SPREAD"):
                return Placement(strategy, bundles, share)
    raise InvalidRequest(_too_few(places, machines, wanted, num_threads), param="distributed_executor_backend")


def _candidates(places: Sequence[RankPlace], wanted: RayPlacement) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
    """Ray's strategy and the ranks of each bundle, the best first."""
    everyone = (tuple(place.rank for place in places),)
    stages = tuple(
        tuple(place.rank for place in places if place.pp_rank == stage) for stage in range(places[0].pp_size)
    )
    singles = tuple((place.rank,) for place in places)
    match wanted:
        case "pack":
            yield "STRICT_PACK", everyone
        case "spread":
            yield "STRICT_SPREAD", stages if len(stages) > 1 else singles
        case "auto":
            yield "STRICT_PACK", everyone
            yield "PACK", stages
            yield "PACK", singles


def _fits(machines: Sequence[Machine], cpus: int, count: int, *, apart: bool) -> bool:
    rooms = [machine.free // cpus for machine in machines]
    return sum(min(room, 1) if apart else room for room in rooms) >= count


def _too_few(
    places: Sequence[RankPlace], machines: Sequence[Machine], wanted: RayPlacement, num_threads: int | None
) -> str:
    first = places[0]
    how = {
        "pack": ", all on one machine (ray_placement 'pack')",
        "spread": f", each {'stage' if first.pp_size > 1 else 'rank'} on a machine of its own (ray_placement 'spread')",
        "auto": "",
    }[wanted]
    there = ", ".join(f"{machine.free} of {machine.cpus} on {machine.address}" for machine in machines) or "none"
    return (
        f"{len(places)} ranks (tensor_parallel_size {first.tp_size} × pipeline_parallel_size {first.pp_size}) of "
        f"{num_threads or 1} CPUs or more each were wanted{how}; free in the Ray cluster: {there}. Lower num_threads "
        "or the number of ranks, end what else runs there (`ray status` shows it), or add machines (`ray start "
        "--address=…`)."
    )
