"""Which machines ranks go to, for clusters that are made up."""

import pytest

from shuteye.errors import InvalidRequest
from shuteye.executors.ray_placement import Machine, place
from shuteye.parallel.shards import RankPlace


def cluster(*free):
    return [Machine(f"node{number}", f"10.0.0.{number}", cpus, 8) for number, cpus in enumerate(free, 1)]


def placed(tp_size, pp_size, *free, wanted="auto", num_threads=None):
    found = place(RankPlace(0, tp_size, pp_size).all(), cluster(*free), wanted=wanted, num_threads=num_threads)
    assert sorted(rank for ranks in found.bundles for rank in ranks) == list(range(tp_size * pp_size))
    return found.strategy, found.bundles, found.cpus_per_rank


@pytest.mark.parametrize(
    ("sizes", "free", "options", "expected"),
    [
        ((2, 1), (4, 8), {}, ("STRICT_PACK", ((0, 1),), 4)),
        ((2, 2), (8, 3), {"num_threads": 2}, ("STRICT_PACK", ((0, 1, 2, 3),), 2)),
        ((2, 2), (4, 4), {"num_threads": 2}, ("PACK", ((0, 1), (2, 3)), 2)),  # a stage stays on one machine
        ((2, 2), (3, 3), {}, ("PACK", ((0, 1), (2, 3)), 1)),
        ((2, 1), (1, 1), {}, ("PACK", ((0,), (1,)), 1)),  # as there is nothing else
        ((2, 2), (8, 8), {"wanted": "spread"}, ("STRICT_SPREAD", ((0, 1), (2, 3)), 4)),
        ((2, 1), (8, 2), {"wanted": "spread"}, ("STRICT_SPREAD", ((0,), (1,)), 2)),
        ((1, 1), (1, 3), {}, ("STRICT_PACK", ((0,),), 3)),
        ((2, 1), (5, 1), {"wanted": "pack"}, ("STRICT_PACK", ((0, 1),), 2)),
    ],
)
def test_ranks_are_as_close_as_there_is_room(sizes, free, options, expected):
    """Would catch sums over the network where shared memory would do, and CPUs that nobody has."""
    assert placed(*sizes, *free, **options) == expected


@pytest.mark.parametrize(
    ("sizes", "free", "options", "says"),
    [
        ((2, 1), (1,), {}, "2 ranks .* of 1 CPUs or more each were wanted; free .* 1 of 8 on 10.0.0.1"),
        ((2, 1), (3, 3), {"num_threads": 4}, "of 4 CPUs"),
        ((2, 2), (3, 3), {"wanted": "pack"}, "all on one machine"),
        ((1, 3), (8, 8), {"wanted": "spread"}, "each stage on a machine of its own"),
        ((3, 1), (8, 8), {"wanted": "spread"}, "each rank on a machine of its own"),
        ((1, 1), (), {}, "free in the Ray cluster: none"),
    ],
)
def test_too_few_cpus_are_counted(sizes, free, options, says):
    """Would catch an engine that waits for machines for ever, and one that does not say what it has seen."""
    with pytest.raises(InvalidRequest, match=says) as refused:
        placed(*sizes, *free, **options)
    assert refused.value.param == "distributed_executor_backend"
