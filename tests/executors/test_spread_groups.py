"""Which ranks meet in shared memory and which over TCP, and who is told when nobody should wait any longer."""

import pytest

from shuteye.errors import GroupAborted
from shuteye.executors.frames import HandedRegion, NetworkMeeting
from shuteye.executors.spread_groups import SpreadGroups
from shuteye.parallel.gloo import GlooGroup
from shuteye.parallel.shards import RankPlace

HERE, THERE = "127.0.0.1", "127.0.0.2"


@pytest.fixture
def groups():
    opened = []

    def make(tp_size, pp_size, *machines, crossing=None, tell=lambda *_: None):
        places = RankPlace(0, tp_size, pp_size).all()
        opened.append(
            SpreadGroups(
                places,
                dict(enumerate(machines)),
                epoch=1,
                timeout_s=1.0,
                host=HERE,
                crossing=set() if crossing is None else crossing,
                tell=tell,
            )
        )
        return opened[-1], [opened[-1].meeting(place) for place in places]

    yield make
    for one in opened:
        one.close()


def test_a_stage_on_one_machine_adds_up_in_shared_memory(groups):
    """Would catch sums that cross the network although their ranks are neighbours."""
    _, meetings = groups(2, 2, HERE, HERE, THERE, THERE)
    tensor = [meeting.tensor for meeting in meetings]
    assert all(isinstance(point, HandedRegion) for point in tensor)
    assert tensor[0] == tensor[1] != tensor[2] == tensor[3]
    pipeline = [meeting.pipeline for meeting in meetings]
    assert all(isinstance(point, NetworkMeeting) for point in pipeline)
    assert [point.host for point in pipeline] == [HERE, HERE, THERE, THERE]
    assert pipeline[0].address == pipeline[2].address != pipeline[1].address == pipeline[3].address


def test_all_on_one_machine_need_no_network(groups):
    _, meetings = groups(2, 2, *[THERE] * 4)
    points = [point for meeting in meetings for point in (meeting.tensor, meeting.pipeline)]
    assert all(isinstance(point, HandedRegion) for point in points)
    assert len({point.name for point in points}) == 4


def test_one_rank_meets_nobody(groups):
    _, (meeting,) = groups(1, 1, THERE)
    assert (meeting.tensor, meeting.pipeline) == (None, None)


def test_a_group_that_has_crossed_machines_stays_with_the_network(groups):
    """Would catch a stage of which one rank has chosen native sums, and another one cannot any more."""
    crossing = set()
    groups(2, 1, HERE, THERE, crossing=crossing)
    _, meetings = groups(2, 1, HERE, HERE, crossing=crossing)
    assert all(isinstance(meeting.tensor, NetworkMeeting) for meeting in meetings)


def test_an_abort_reaches_ranks_and_rendezvous_once(groups):
    told = []
    spread, meetings = groups(2, 1, HERE, THERE, tell=lambda *what: told.append(what))
    assert not spread.aborted
    spread.abort("rank 1 was ended")
    spread.abort("rank 0, too")
    assert spread.aborted
    assert told == [(1, "rank 1 was ended")]
    with pytest.raises(GroupAborted, match="rank 1 was ended"):
        GlooGroup(meetings[0].tensor.address, 0, 2, epoch=1, timeout_s=3.0)
