"""What callers are told of each rank: in states and reports, awake, asleep, and once it has ended."""

import os
import socket

import pytest
import torch

from shuteye.calls import RpcCall, SleepCall, UpdateCall, WakeCall

NORM = ("model.norm.weight", torch.full((64,), 0.5))


@pytest.fixture(scope="module")
def ranks(open_ranks):
    return open_ranks("TP 2 x PP 2")


def test_every_rank_has_a_row_that_names_its_process(ranks):
    """Would catch rows in the wrong order, or of the engine process."""
    rows = ranks.core.state.ranks
    assert [row.rank for row in rows] == [0, 1, 2, 3]
    assert [row.place for row in rows] == ["tp0of2.pp0of2", "tp1of2.pp0of2", "tp0of2.pp1of2", "tp1of2.pp1of2"]
    assert [row.pid for row in rows] == [ranks.pid(rank) for rank in range(4)]
    assert {row.host for row in rows} == {socket.gethostname()}


def test_rows_add_up_to_the_whole(ranks):
    """Would catch totals that are rank 0's, and rows that are all the same rank's."""
    report = ranks.call(SleepCall(1))
    asleep = ranks.core.state
    woken = ranks.call(WakeCall())
    for index, tag in enumerate(("weights", "kv_cache")):
        for whole, rows, what in (
            (asleep.tags[index], [row.tags[index] for row in asleep.ranks], "nbytes"),
            (report.tags[index], [row.tags[index] for row in report.ranks], "freed_bytes"),
            (woken.tags[index], [row.tags[index] for row in woken.ranks], "restored_bytes"),
        ):
            assert {row.tag for row in rows} == {tag}
            assert getattr(whole, what) == sum(getattr(row, what) for row in rows)
    sizes = [row.tags[0].nbytes for row in asleep.ranks]
    assert len({*sizes}) > 1, "stages are of the same size"
    assert report.residual_bytes == sum(row.residual_bytes for row in report.ranks)
    assert all(row.residual_bytes > 0 for row in report.ranks)
    assert [row.residual_bytes for row in woken.ranks] == [None] * 4


@pytest.mark.parametrize("asleep", [False, True])
def test_a_dead_rank_has_a_row_that_says_how_it_ended(ranks, asleep):
    """Would catch memory that a dead process is said to hold, and the pid of the dead after a recovery."""
    if asleep:
        ranks.call(SleepCall(1))
    ranks.kill(2)
    ranks.wait_for_fault()
    ranks.kill(1)  # while the engine is faulted already
    while len(ranks.executor.failures()) < 2:
        os.sched_yield()
    ranks.step()
    rows = ranks.core.state.ranks
    assert [row.failure for row in rows] == [None, "was ended by SIGKILL", "was ended by SIGKILL", None]
    assert [bool(row.tags) for row in rows] == [True, False, False, True]
    ranks.wake()
    assert [row.pid for row in ranks.core.state.ranks] == [ranks.pid(rank) for rank in range(4)]
    assert not any(row.failure for row in ranks.core.state.ranks)


def test_a_wake_says_that_updates_were_lost(ranks):
    """Would catch a trainer that goes on with weights that it has not written."""
    ranks.call(UpdateCall([NORM]))
    ranks.call(SleepCall(1))
    assert not ranks.call(WakeCall()).updates_lost
    ranks.call(SleepCall(1))
    ranks.kill(3)
    ranks.wait_for_fault()
    report = ranks.call(WakeCall())
    assert report.updates_lost
    assert "+" not in report.weights_source
    ranks.call(SleepCall(1))
    assert not ranks.call(WakeCall()).updates_lost, "said once"


def test_updates_that_were_given_up_are_not_lost(ranks):
    ranks.call(UpdateCall([NORM]))
    ranks.call(SleepCall(2))
    ranks.kill(0)
    ranks.wait_for_fault()
    report = ranks.call(WakeCall())
    assert not report.updates_lost
    assert len({*ranks.call(RpcCall("weights_source"))}) == 1
