"""Groups of real processes: the same bits on every rank, and no wait that outlasts a death, a stop or a mistake."""

import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch
from rank_processes import Ended, Ranks, run

from shuteye import native
from shuteye.errors import GroupAborted
from shuteye.parallel.gloo import GlooGroup, GlooRendezvous
from shuteye.parallel.group import ShmGroup, ShmRegion

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

SMALL = {"slot_bytes": 4096, "message_bytes": 1024}
LENGTHS = (1, 3, 64, 577, 1024, 5000)


def values(rank, *shape, dtype=torch.float32):
    """What a rank brings: of many magnitudes, so that the order of a sum shows in its bits."""
    source = np.random.default_rng([rank, *shape])
    numbers = source.standard_normal(shape) * 10.0 ** source.integers(-4, 5, shape)
    return torch.from_numpy(numbers.astype(np.float32)).to(dtype)


def rank_order_sum(parts):
    """The oracle: numpy, float32, in rank order."""
    total = np.zeros_like(parts[0].float().numpy())
    for index, part in enumerate(parts):
        total = part.float().numpy() if index == 0 else total + part.float().numpy()
    return torch.from_numpy(total).to(parts[0].dtype)


def bits(tensor):
    integers = {4: torch.int32, 2: torch.int16}[tensor.itemsize]
    return tensor.contiguous().view(integers).numpy().tobytes()


# --- what ranks do ------------------------------------------------------------------------------


def sums(group):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for length in LENGTHS:
            x = values(group.rank, length, dtype=dtype)
            group.all_reduce(x)
            results.append(bits(x))
    return results


def fused(group, rows, width):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        bias, residual = values(10, width, dtype=dtype), values(11, rows + 2, width, dtype=dtype)
        picked = torch.arange(rows).flip(0) + 1
        for index in (None, picked):
            out = torch.empty(rows, width, dtype=dtype)
            part = values(group.rank, rows, width)
            group.all_reduce_into(out, part, bias=bias, residual=residual, residual_rows=index)
            results.append(bits(out))
    return results


def columns(group, rows, widths, to):
    x = values(group.rank, rows, widths[group.rank])
    group.barrier()
    found = group.gather(x, widths, to)
    group.barrier()
    return None if found is None else bits(found)


def relay(group, lengths):
    """Every message goes up the stages, each of which adds one, and back to the first, while others follow it."""
    last = group.size - 1
    messages = [values(7, length) for length in lengths]
    for x in messages:
        if group.rank > 0:
            group.recv(x, group.rank - 1)
            x.add_(1)
        if group.rank < last:
            group.send(x, group.rank + 1)
    for x in messages:
        if group.rank == last:
            group.send(x, 0)
        elif group.rank == 0:
            group.recv(x, last)
    return [bits(x) for x in messages]


def random_rounds(group, rounds, seed):
    source = random.Random(seed)
    bases = [values(rank, 8192) for rank in range(group.size)]
    both = rank_order_sum(bases)
    for number in range(rounds):
        length = source.choice((1, 7, 576, 577, source.randrange(1, 4000)))
        start = source.randrange(8192 - length)
        x = bases[group.rank][start : start + length].clone()
        group.all_reduce(x)
        assert torch.equal(x, both[start : start + length]), f"round {number} of seed {seed}"
        if source.random() < 0.05:
            group.barrier()
        if group.size == 2 and source.random() < 0.2:
            if group.rank == 0:
                group.send(x, 1)
            else:
                other = torch.empty_like(x)
                group.recv(other, 0)
                assert torch.equal(x, other)
    return rounds


def wait_for_others(group, how, idle=(0,)):
    """Ranks in `idle` never come; the others wait, and say how long, and what it cost."""
    if group.rank in idle:
        time.sleep(60)
    begun, before = time.monotonic(), time.process_time()
    try:
        if how == "recv":
            group.recv(torch.empty(9), idle[0])
        elif how == "send":  # two pieces are under way, the third has no place
            group.send(torch.empty(4096), idle[0])
        elif how == "gather":
            group.gather(torch.ones(2, 3), [3] * group.size)
        else:
            group.all_reduce(torch.ones(9))
    except GroupAborted as error:
        assert_stays_aborted(group)
        return Ended(error.message, error.by, error.missing), time.monotonic() - begun, time.process_time() - before
    raise AssertionError("nobody came, and the wait ended")


def assert_stays_aborted(group):
    with pytest.raises(GroupAborted):
        group.barrier()


def reduce_until_aborted(group):
    done = 0
    expected = rank_order_sum([values(rank, 577) for rank in range(group.size)])
    while True:
        x = values(group.rank, 577)
        try:
            group.all_reduce(x)
        except GroupAborted as error:
            return done, error.by
        assert torch.equal(x, expected)
        done += 1


def abort_after(group, seconds):
    if group.rank == 0:
        time.sleep(seconds)
        group.abort("the test wants it")
        assert_stays_aborted(group)
        return None
    return wait_for_others(group, "all_reduce")


def disagree(group, how):
    x = torch.ones(6 if group.rank else 5)
    if how == "lengths":
        group.all_reduce(x)
    elif how == "dtypes":
        group.all_reduce(torch.ones(8, dtype=torch.bfloat16 if group.rank else torch.float32))
    elif how == "calls":
        group.all_reduce(x) if group.rank else group.barrier()
    elif how == "widths":
        group.gather(torch.ones(1, 2), [3, 2] if group.rank else [2, 2])
        group.barrier()  # to rank 0 the widths looked right
    elif group.rank:
        group.recv(x, 0)
    else:
        group.send(x, 1)
        group.barrier()


# --- the same numbers everywhere ----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sums_have_the_same_bits_on_every_rank(size):
    """A rank that adds its own part first, an odd length's end, or a piece of a long one that is another round's."""
    expected = [
        bits(rank_order_sum([values(rank, length, dtype=dtype) for rank in range(size)]))
        for dtype in (torch.float32, torch.bfloat16)
        for length in LENGTHS
    ]
    assert run("shm", size, sums, **SMALL) == [expected] * size


def test_shared_memory_and_gloo_agree():
    """Either of them being wrong alone."""
    assert run("gloo", 3, sums) == run("shm", 3, sums)
    widths = (5, 0, 3)
    assert run("gloo", 3, columns, 4, widths, 1) == run("shm", 3, columns, 4, widths, 1)
    lengths = (1, 700)
    assert run("gloo", 3, relay, lengths) == run("shm", 3, relay, lengths)


@pytest.mark.parametrize(("rows", "width"), [(1, 576), (5, 577), (7, 1000)])
def test_bias_and_residual_are_added_as_within_one_rank(rows, width):
    """A bias that every rank adds, a residual of another row, rounding in another place, a row split between rounds."""
    expected = []
    for dtype in (torch.float32, torch.bfloat16):
        total = rank_order_sum([values(rank, rows, width) for rank in range(2)])
        bias, residual = values(10, width, dtype=dtype), values(11, rows + 2, width, dtype=dtype)
        y = (total + bias.float()).to(dtype)
        rows_of_each = (torch.arange(rows), torch.arange(rows).flip(0) + 1)
        expected += [bits(residual[index] + y) for index in rows_of_each]
    assert run("shm", 2, fused, rows, width, **SMALL) == [expected] * 2


@pytest.mark.parametrize(("rows", "widths", "to"), [(1, (5, 4), 0), (3, (1001, 0, 999), 2), (2, (3000, 20), 1)])
def test_uneven_columns_are_gathered_in_order(rows, widths, to):
    """Columns in the wrong place where ranks have different numbers of them, also of parts larger than a slot."""
    expected = torch.cat([values(rank, rows, width) for rank, width in enumerate(widths)], dim=1)
    results = run("shm", len(widths), columns, rows, widths, to, **SMALL)
    assert results == [bits(expected) if rank == to else None for rank in range(len(widths))]


def test_messages_of_any_size_pass_the_stages():
    """A piece lost, or read before it was there, where a message is many times the buffers, or empty."""
    lengths = (0, 1, 256, 257, 40_000, 3)
    first, second, third = run("shm", 3, relay, lengths, **SMALL)
    assert first == third == [bits(values(7, length) + 1 + 1) for length in lengths]
    assert second == [bits(values(7, length) + 1) for length in lengths]


def test_ten_thousand_random_rounds():
    """A slot written while the other rank still reads it, or a wake that is lost, in any order of calls."""
    assert run("shm", 2, random_rounds, 10_000, random.randrange(1 << 30), **SMALL) == [10_000] * 2


# --- whatever happens to a rank, the others go on -----------------------------------------------


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_an_abort_ends_the_waits_of_all(kind):
    """Ranks that wait for one that has given up."""
    _, *others = run(kind, 3, abort_after, 0.3)
    for ended, waited, _ in others:
        assert ended.by == 0
        assert "aborted by rank 0: the test wants it." in ended.message
        assert 0.1 < waited < 2


def test_a_killed_rank_holds_nobody_up():
    """Survivors that wait for ever, or add up what the dead one has left half written."""
    with Ranks("shm", 3, reduce_until_aborted, **SMALL) as ranks:
        time.sleep(0.3)
        ranks.signal(1, signal.SIGKILL)
        ranks.processes[1].join()
        begun = time.monotonic()
        ranks.region.abort("rank 1 was killed by signal 9")
        results = ranks.results([0, 2])
        assert time.monotonic() - begun < 2
        assert "aborted by the engine: rank 1 was killed" in ranks.region.fault().message
    assert all(done > 0 and by is None for done, by in results)
    assert abs(results[0][0] - results[1][0]) <= 1


@pytest.mark.parametrize("how", ["all_reduce", "recv", "send", "gather"])
def test_the_deadline_names_the_rank_that_is_stopped(how):
    """A stopped rank that is waited for without end, and an error that does not say which it was."""
    with Ranks("shm", 2, wait_for_others, how, timeout_s=0.6, **SMALL) as ranks:
        ranks.signal(0, signal.SIGSTOP)
        ((ended, waited, _),) = ranks.results([1])
    assert ended.missing == (0,)
    assert f"waited 0.6 s in {how} for rank 0." in ended.message
    assert 0.5 < waited < 3


def test_a_stopped_rank_finds_the_group_aborted_when_it_goes_on():
    """A rank that was taken for dead and enters the next round of a group that has gone on without it."""
    with Ranks("shm", 3, reduce_until_aborted, timeout_s=0.5) as ranks:
        ranks.signal(2, signal.SIGSTOP)
        first, second = ranks.results([0, 1])
        ranks.signal(2, signal.SIGCONT)
        (third,) = ranks.results([2])
    assert first[1] == second[1] == third[1]
    assert first[1] in (0, 1)


def test_gloo_has_deadlines_too_and_notices_the_dead():
    """The oracle hanging where the other does not."""
    with Ranks("gloo", 3, wait_for_others, "all_reduce", (0,), timeout_s=1.5) as ranks:
        results = ranks.results([1, 2])
    for ended, waited, _ in results:
        assert ended.missing == (0,)
        assert waited < 4
    with Ranks("gloo", 2, wait_for_others, "recv", (0,)) as ranks:
        ranks.signal(0, signal.SIGKILL)
        ((ended, _, _),) = ranks.results([1])
    assert "gloo says in recv" in ended.message


def test_a_long_wait_costs_no_cpu():
    """Ranks that spin while they wait for one that has other things to do."""
    with Ranks("shm", 3, wait_for_others, "all_reduce", timeout_s=1.0) as ranks:
        results = ranks.results([1, 2])
    for _, waited, cpu in results:
        assert waited > 0.9
        assert cpu < 0.1


@pytest.mark.parametrize("how", ["lengths", "dtypes", "calls", "widths", "message"])
def test_ranks_in_different_calls_are_told(how):
    """Sums of what does not belong together."""
    results = run("shm", 2, disagree, how)
    assert all(isinstance(one, Ended) for one in results), results
    assert any(
        word in results[0].message for word in ("different calls", "differ in how wide", "where 24 were expected")
    )


# --- who may come in ----------------------------------------------------------------------------


def test_stale_epochs_and_taken_places_are_refused():
    """A rank of before a recovery that adds its parts to those of after it; two processes that are one rank."""
    region = ShmRegion(2, epoch=7)
    with pytest.raises(GroupAborted, match="this rank is of epoch 6, the group of epoch 7"):
        ShmGroup(region.fd, 0, 2, epoch=6)
    with pytest.raises(GroupAborted, match="it has 2 ranks, this would be rank 2 of 3"):
        ShmGroup(region.fd, 2, 3, epoch=7)
    group = ShmGroup(region.path, 0, 2, epoch=7)
    with pytest.raises(GroupAborted, match="another process is rank 0"):
        ShmGroup(region.fd, 0, 2, epoch=7)
    group.close()
    group.close()
    path = region.path
    region.close()
    region.close()
    with pytest.raises(GroupAborted, match="its memory is gone"):
        ShmGroup(path, 1, 2, epoch=7)


def test_other_memory_is_refused():
    """Any file taken for a group's."""
    fd = os.memfd_create("other")
    os.ftruncate(fd, 1 << 20)
    with pytest.raises(GroupAborted, match="not the memory of a group"):
        ShmGroup(fd, 0, 1, epoch=1)
    os.close(fd)


def test_gloo_refuses_stale_epochs():
    """As above, between machines."""
    rendezvous = GlooRendezvous(epoch=4)
    with pytest.raises(GroupAborted, match="this rank is of epoch 3, the group of epoch 4"):
        GlooGroup(rendezvous.address, 0, 1, epoch=3)


def test_memory_is_taken_where_it_is_used():
    """More than a few MiB a group, which a sleeping engine keeps."""
    region = ShmRegion(2, epoch=1)
    before = resource.getpagesize() * 2
    assert region.resident_bytes() <= before
    group = ShmGroup(region.fd, 0, 2, epoch=1, timeout_s=0.01)
    with pytest.raises(GroupAborted):
        group.all_reduce(torch.ones(1 << 20))
    assert region.resident_bytes() <= before + (512 << 10)
    group.close()
    region.close()
