"""Groups that a rank joins and leaves, and aborts that come too early, too late, or in time."""

import secrets
import threading
import time

import pytest
import torch

from shuteye.errors import GroupAborted
from shuteye.executors.frames import HandedRegion, Meeting, NetworkMeeting
from shuteye.executors.membership import Membership
from shuteye.parallel.gloo import GlooGroup, GlooRendezvous
from shuteye.parallel.group import ShmGroup
from shuteye.parallel.shards import RankPlace

FIRST, SECOND = RankPlace(0, 2, 1).all()


def meeting(epoch=1, point=None):
    return Meeting(epoch, point or HandedRegion(f"shuteye-test-{secrets.token_hex(8)}"), None, 5.0)


@pytest.fixture
def both():
    """Two members that have met in epoch 1."""
    members, where = [Membership(FIRST), Membership(SECOND)], meeting()
    for member in members:
        member.join(where)
    yield members
    for member in members:
        member.groups.replace(type(member.groups)())


def add_up(member):
    x = torch.ones(2)
    member.groups.tensor.all_reduce(x)
    return x


def test_a_wait_is_ended_from_another_thread(both):
    timer = threading.Timer(0.1, both[0].abort, (1, "rank 1 was ended"))
    timer.start()
    with pytest.raises(GroupAborted, match="rank 1 was ended"):
        add_up(both[0])
    timer.join()


def test_an_abort_of_earlier_groups_does_not_end_later_ones(both):
    """Would catch a recovery that is ended by the news of what it recovers from."""
    where = meeting(2)
    for member in both:
        member.join(where)
    both[0].abort(1, "rank 1 was ended")
    threads = [threading.Thread(target=add_up, args=(member,)) for member in both[1:]]
    for thread in threads:
        thread.start()
    assert add_up(both[0]).tolist() == [2.0, 2.0]
    for thread in threads:
        thread.join()


def test_an_abort_that_comes_before_its_groups_ends_them(both):
    """Would catch a rank that joins when the others have long been told not to."""
    both[0].abort(2, "rank 1 could not be started")
    both[0].join(meeting(2))
    with pytest.raises(GroupAborted, match="could not be started"):
        add_up(both[0])
    began = time.monotonic()
    both[1].abort(3, "rank 0 could not be started")
    with pytest.raises(GroupAborted, match="rank 0 could not be started"):
        both[1].join(meeting(3))
    assert time.monotonic() - began < 2
    assert both[1].epoch == 1


def test_the_meeting_says_how_ranks_reach_one_another(both):
    assert type(both[0].groups.tensor) is ShmGroup
    rendezvous = GlooRendezvous(epoch=2)
    where = meeting(2, NetworkMeeting(rendezvous.address, "127.0.0.1"))
    other = threading.Thread(target=both[1].join, args=(where,))
    other.start()
    both[0].join(where)
    other.join()
    assert {type(member.groups.tensor) for member in both} == {GlooGroup}
    assert both[0].epoch == 2
    rendezvous.close()


def test_a_rank_that_waits_for_others_to_connect_hears_of_an_abort():
    """Would catch gloo's own wait for the others, behind which nobody can look at the rendezvous."""
    rendezvous = GlooRendezvous(epoch=1)
    timer = threading.Timer(0.5, rendezvous.abort, ("rank 1 was ended",))
    timer.start()
    began = time.monotonic()
    with pytest.raises(GroupAborted, match="rank 1 was ended"):
        GlooGroup(rendezvous.address, 0, 2, epoch=1, timeout_s=5.0)
    assert time.monotonic() - began < 2.0
    timer.join()
    rendezvous.close()


def test_an_abort_after_the_rendezvous_has_gone_is_nothing():
    """Would catch a rank that ends because it says what everybody knows."""
    rendezvous = GlooRendezvous(epoch=1)
    member = Membership(FIRST)
    other = threading.Thread(
        target=Membership(SECOND).join, args=(meeting(1, NetworkMeeting(rendezvous.address, "127.0.0.1")),)
    )
    other.start()
    member.join(meeting(1, NetworkMeeting(rendezvous.address, "127.0.0.1")))
    other.join()
    rendezvous.close()
    del rendezvous
    member.abort(1, "the engine is gone")
