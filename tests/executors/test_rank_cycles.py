"""The real model over ranks, asleep and awake many times: the same tokens and addresses, and no rank that grows.

The sixth of the acceptance cases (vLLM #16663); `test_rank_acceptance.py` has the others.
"""

from __future__ import annotations

import os
import random
import statistics

import pytest
from faulty_rank import records
from rank_arenas import counts, own_bytes, rollup
from rank_harness import LAYOUTS
from sleep_cycles import one_cycle

from shuteye.calls import SleepCall
from shuteye.tasks.generate.requests import SamplingParams

CYCLES = int(os.environ.get("SHUTEYE_RANK_CYCLES", "200"))
WARM_UP = 20
SETTLED = 10
"""Of so many cycles the median is taken, at the beginning and at the end."""
GROWTH_BYTES = 4 << 20
"""What the C library may hold on to more or less, in 180 cycles."""

HELD = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
PROMPTS = [tuple(range(start, start + length)) for start, length in ((500, 5), (2000, 20), (9000, 33))]


class Account:
    """The sleeps of a core over ranks, and what the kernel says of each rank around them."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.pids = [ranks.pid(rank) for rank in range(ranks.executor.num_ranks)]
        self.freed = []  # by cycle: what the report says of each rank, and what has left its process
        self.asleep = []  # by cycle: what each process then still has to itself
        self._before = []

    def call(self, call):
        """Of a `one_cycle` that sleeps through this."""
        if isinstance(call, SleepCall):
            self._before = [rollup(pid)["Rss"] for pid in self.pids]
        report = self.ranks.call(call)
        if isinstance(call, SleepCall):
            after = [rollup(pid)["Rss"] for pid in self.pids]
            left = [one - other for one, other in zip(self._before, after, strict=True)]
            told = [sum(tag.freed_bytes for tag in rank.tags) for rank in report.ranks]
            assert sum(told) == report.freed_bytes
            self.freed.append((told, left))
            self.asleep.append([own_bytes(pid) for pid in self.pids])
        return report

    def measure(self):
        """Of each rank, after a cycle: what it may have too much of."""
        return [{"bytes asleep": nbytes} | counts(pid) for pid, nbytes in zip(self.pids, self.asleep[-1], strict=True)]


def arenas(ranks):
    """Address and size of every rank's, as it said last."""
    return [rank[-1][3] for rank in records(ranks.faults, ranks.executor.num_ranks)]


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_6_cycles_of_ranks(open_ranks, make_harness, smollm2_options, layout):
    """Would catch a leak per cycle in any rank, a moved arena, a wrong token after a wake, bytes that never left."""
    sizes = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory": 32 << 20, "num_threads": 1}
    one = make_harness(**smollm2_options | sizes)
    expected = [one.generate(prompt, HELD) for prompt in PROMPTS]
    one.core._executor.close()
    ranks = open_ranks(layout, **smollm2_options | sizes)
    account, chooser = Account(ranks), random.Random(0)
    arenas_before, measured = None, []
    for cycle in range(CYCLES):
        in_flight = f"in-flight-{cycle}"
        ranks.add(in_flight, PROMPTS[cycle % 3], HELD)
        ranks.step()
        ranks.step()
        records(ranks.faults, ranks.executor.num_ranks)
        one_cycle(account, cycle, chooser)
        ranks.run()
        assert ranks.tokens[in_flight] == expected[cycle % 3], cycle
        found = arenas(ranks)
        assert found == (arenas_before or found), f"an arena moved in cycle {cycle}"
        arenas_before = found
        measured.append(account.measure())
    assert [ranks.pid(rank) for rank in range(ranks.executor.num_ranks)] == account.pids, "a rank was started again"
    assert [ranks.generate(prompt, HELD) for prompt in PROMPTS] == expected
    ranks.executor.close()
    told = tell_growth(layout, measured)
    told += tell_freed(account.freed)
    print(*told, sep="\n")


def tell_growth(layout, measured):
    """No rank has more of anything at the end than after the warm-up, give or take what the C library holds."""
    lines = [f"{layout}, {len(measured)} cycles:"]
    for rank in range(len(measured[0])):
        for what, most in (("bytes asleep", GROWTH_BYTES), ("fds", 0), ("threads", 0), ("maps", 4)):
            early, late = (
                statistics.median(cycle[rank][what] for cycle in part)
                for part in (measured[WARM_UP : WARM_UP + SETTLED], measured[-SETTLED:])
            )
            lines.append(f"  rank {rank}: {what} {early:,.0f} → {late:,.0f}")
            assert late - early <= most, lines[-1]
    return lines


def tell_freed(freed):
    """In every cycle at least 98% of what is told has left the processes, as the kernel sees it."""
    shares = [sum(left) / sum(told) for told, left in freed]
    least = min(min(one / other for one, other in zip(left, told, strict=True)) for told, left in freed)
    line = f"  left / told, all ranks: {min(shares):.4f} … {max(shares):.4f}; of one rank at least {least:.4f}"
    assert min(shares) >= 0.98, line
    return [line]
