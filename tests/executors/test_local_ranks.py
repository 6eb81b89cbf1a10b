"""Rank processes of this machine: on which cores they run, and that one which is stopped is noticed."""

import os
import signal
import time

import pytest

from shuteye.calls import SleepCall
from shuteye.executors.local_ranks import divide_cores


@pytest.mark.parametrize(
    ("cores", "num_ranks", "divided"),
    [
        ([0, 1], 1, ((),)),  # it may use what there is
        ([0, 1], 2, ((0,), (1,))),
        ([2, 3, 7, 9, 11], 2, ((2, 3, 7), (9, 11))),
        ([0, 1], 4, ((0,), (1,), (0,), (1,))),
        ([5], 2, ((5,), (5,))),
    ],
)
def test_cores_are_divided_and_ranks_of_a_stage_do_not_share_one(cores, num_ranks, divided):
    """Would catch ranks that wait for one another on one core, and a core that nobody uses."""
    assert divide_cores(cores, num_ranks) == divided


def test_ranks_stay_on_their_cores(open_ranks):
    """Would catch ranks that the scheduler puts on one core, where they wait for each other."""
    ranks = open_ranks("TP 2")
    for rank, cores in enumerate(divide_cores(sorted(os.sched_getaffinity(0)), 2)):
        assert os.sched_getaffinity(ranks.pid(rank)) == {*cores}


@pytest.mark.parametrize("asleep", [False, True])
def test_a_rank_that_is_stopped_while_nobody_asks_it_is_noticed(open_ranks, asleep):
    """Would catch a server that says it is well, and hangs with the next request."""
    ranks = open_ranks("TP 2", rank_timeout_s=1.0)
    if asleep:
        ranks.call(SleepCall(1))
    ranks.kill(1, signal.SIGSTOP)
    assert ranks.wait_for_fault(within_s=5.0) == "rank 1 was killed, as it was stopped for 1 s"
    ranks.wake()
    before = ranks.pid(1)
    ranks.kill(1, signal.SIGSTOP)  # for a moment, as by somebody who looks
    time.sleep(0.5)
    ranks.kill(1, signal.SIGCONT)
    time.sleep(1.5)
    ranks.step()
    assert ranks.core.state.faulted is None
    assert ranks.pid(1) == before
