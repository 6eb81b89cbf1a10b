"""One model over several rank processes: what one rank gives, asleep and awake as one, and every way to fail."""

from __future__ import annotations

import functools

import pytest
from core_harness import CoreHarness

from shuteye import EngineConfig
from shuteye.calls import SleepCall, WakeCall
from shuteye.engine.core import EngineCore
from shuteye.executors import open_executor
from shuteye.models.converter import Order, obtain_image
from shuteye.models.progress import no_progress
from shuteye.parallel.shards import RankPlace

PROMPT = (5, 300, 9, 11, 60)
LAYOUTS = {"TP 2": (2, 1), "PP 2": (1, 2), "TP 2 x PP 2": (2, 2)}


@pytest.fixture(scope="module")
def config(tiny_checkpoint, core_cache):
    """Configs of a layout, whose images are made here: rank processes convert in processes of their own."""

    def make(layout, **options):
        tp_size, pp_size = LAYOUTS[layout]
        order = functools.partial(Order, str(tiny_checkpoint), str(core_cache), dtype="float32")
        obtain_image(order(place=RankPlace(0, tp_size, pp_size)), no_progress).close()
        return EngineConfig(
            **{
                "model": str(tiny_checkpoint),
                "dtype": "float32",
                "enable_sleep_mode": True,
                "kv_cache_memory": 1 << 20,
                "max_model_len": 256,
                "verify_wake": "full",
                "num_threads": 1,
                "cache_dir": core_cache,
                "tensor_parallel_size": tp_size,
                "pipeline_parallel_size": pp_size,
            }
            | options
        )

    return make


@pytest.fixture(scope="module")
def open_ranks(config):
    executors = []

    def open_them(layout, **options):
        wanted = config(layout, **options)
        executor = open_executor(wanted)
        executors.append(executor)
        return CoreHarness(EngineCore(wanted, executor), None)

    yield open_them
    for executor in executors:
        executor.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_give_what_one_gives_before_and_after_sleep(layout, open_ranks, harness):
    expected = harness.generate(PROMPT)
    ranks = open_ranks(layout)
    assert ranks.generate(PROMPT) == expected
    for level in (1, 2):
        slept = ranks.call(SleepCall(level))
        assert slept.freed_bytes > 0
        assert ranks.core.state.level == level
        ranks.call(WakeCall())
        assert ranks.generate(PROMPT) == expected
