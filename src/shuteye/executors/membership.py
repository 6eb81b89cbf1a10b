"""The groups that a rank is in: joined as a `Meeting` says, and aborted from any thread, also before it has joined."""

from __future__ import annotations

import threading

from shuteye.executors.frames import HandedRegion, HeldRegion, Meeting, MeetingPoint, NetworkMeeting
from shuteye.models.rank_groups import RankGroups
from shuteye.parallel.group import Group, ShmGroup
from shuteye.parallel.handed_region import join_handed
from shuteye.parallel.shards import RankPlace


class Membership:
    """A rank's groups, of one epoch after the other.

    Attributes:
        groups: the same object in every epoch.
        epoch: of the groups that were joined last.
    """

    def __init__(self, place: RankPlace) -> None:
        self.groups = RankGroups()
        self.epoch = 0
        self._place = place
        self._lock = threading.Lock()
        self._given_up: tuple[int, str] = (0, "")  # by the engine: the newest epoch, and why

    def join(self, meeting: Meeting) -> None:
        """Be in the groups of another epoch.

        Raises:
            GroupAborted: it is not to be, any more.
        """
        place = self._place
        tensor = self._group(meeting.tensor, place.tp_rank, place.tp_size, meeting)
        try:
            pipeline = self._group(meeting.pipeline, place.pp_rank, place.pp_size, meeting)
        except BaseException:
            if tensor is not None:
                tensor.close()
            raise
        with self._lock:
            self.groups.replace(RankGroups(tensor, pipeline))
            self.epoch = meeting.epoch
            reason = self._why_given_up(meeting.epoch)
        if reason is not None:
            self.groups.abort(reason)

    def abort(self, epoch: int, reason: str) -> None:
        """End every wait in the groups of `epoch`, whether joined already or not; others are not touched."""
        with self._lock:
            self._given_up = max(self._given_up, (epoch, reason))
            if epoch == self.epoch:
                self.groups.abort(reason)

    def _why_given_up(self, epoch: int) -> str | None:
        newest, reason = self._given_up
        return reason if newest >= epoch else None

    def _group(self, point: MeetingPoint | None, rank: int, size: int, meeting: Meeting) -> Group | None:
        epoch, timeout_s = meeting.epoch, meeting.timeout_s
        match point:
            case None:
                return None
            case HeldRegion(path):
                return ShmGroup(path, rank, size, epoch=epoch, timeout_s=timeout_s)
            case HandedRegion(name):
                stopped = lambda: self._why_given_up(epoch)  # noqa: E731
                return join_handed(name, rank, size, epoch=epoch, timeout_s=timeout_s, stopped=stopped)
            case NetworkMeeting(address, host):
                from shuteye.parallel.gloo import GlooGroup

                return GlooGroup(address, rank, size, epoch=epoch, timeout_s=timeout_s, host=host)
