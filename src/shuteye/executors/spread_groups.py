"""Groups of ranks that may be on several machines: shared memory within one machine, TCP between machines."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from shuteye.executors.frames import HandedRegion, Meeting, MeetingPoint, NetworkMeeting
from shuteye.parallel.shards import RankPlace

if TYPE_CHECKING:
    from shuteye.parallel.gloo import GlooRendezvous

logger = logging.getLogger(__name__)


class SpreadGroups:
    """The groups of one epoch; see `Groups`.

    Args:
        machines: the address of each rank's, by rank.
        host: an address of this machine that ranks of others reach.
        crossing: groups, by their ranks, that have been on several machines once; it is added to. They stay with TCP:
            ranks that were loaded in such a group compute otherwise than those that were not.
        tell: has all ranks end every wait in an epoch, and why.
    """

    def __init__(
        self,
        places: Sequence[RankPlace],
        machines: Mapping[int, str],
        *,
        epoch: int,
        timeout_s: float,
        host: str,
        crossing: set[tuple[int, ...]],
        tell: Callable[[int, str], None],
    ) -> None:
        self._epoch, self._timeout_s = epoch, timeout_s
        self._machines, self._host, self._tell = machines, host, tell
        self._lock = threading.Lock()
        self._aborted = False
        self._rendezvous: dict[tuple[int, ...], GlooRendezvous] = {}
        self._names: dict[tuple[int, ...], str] = {}
        for ranks in {_tensor_ranks(place) for place in places} | {_pipeline_ranks(place) for place in places}:
            if len(ranks) > 1:
                self._prepare(ranks, crossing)

    def _prepare(self, ranks: tuple[int, ...], crossing: set[tuple[int, ...]]) -> None:
        if ranks not in crossing and len({self._machines[rank] for rank in ranks}) == 1:
            self._names[ranks] = f"shuteye-group-{secrets.token_hex(16)}"
            return
        from shuteye.parallel.gloo import GlooRendezvous

        crossing.add(ranks)
        self._rendezvous[ranks] = GlooRendezvous(epoch=self._epoch, host=self._host)

    def meeting(self, place: RankPlace) -> Meeting:
        """See `Groups.meeting`."""
        tensor, pipeline = (self._point(ranks, place) for ranks in (_tensor_ranks(place), _pipeline_ranks(place)))
        return Meeting(self._epoch, tensor, pipeline, self._timeout_s)

    def _point(self, ranks: tuple[int, ...], place: RankPlace) -> MeetingPoint | None:
        if ranks in self._names:
            return HandedRegion(self._names[ranks])
        if ranks in self._rendezvous:
            return NetworkMeeting(self._rendezvous[ranks].address, self._machines[place.rank])
        return None

    @property
    def aborted(self) -> bool:
        """Whether `abort` was called: a rank that aborts a group fails in what it was asked, and is not asked again."""
        return self._aborted

    def abort(self, reason: str) -> None:
        """See `Groups.abort`."""
        with self._lock:
            first, self._aborted = not self._aborted, True
            if not first:
                return
            for rendezvous in self._rendezvous.values():
                rendezvous.abort(reason)
        self._tell(self._epoch, reason)

    def close(self) -> None:
        """See `Groups.close`."""
        with self._lock:
            self._aborted = True  # later deaths are not of this epoch
            for rendezvous in self._rendezvous.values():
                rendezvous.close()
            self._rendezvous = {}


def _tensor_ranks(place: RankPlace) -> tuple[int, ...]:
    first = place.pp_rank * place.tp_size
    return tuple(range(first, first + place.tp_size))


def _pipeline_ranks(place: RankPlace) -> tuple[int, ...]:
    return tuple(range(place.tp_rank, place.num_ranks, place.tp_size))
