"""Engines over rank processes."""

import functools
import os
from pathlib import Path

import pytest
from core_harness import CORE_OPTIONS
from rank_fork_server import RankForkServer
from rank_harness import LAYOUTS, RankHarness

from shuteye import EngineConfig
from shuteye.engine.core import EngineCore
from shuteye.executors import open_executor
from shuteye.executors.rank_process import RankProcess
from shuteye.models.converter import Order, obtain_image
from shuteye.models.progress import no_progress
from shuteye.parallel.shards import RankPlace


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
                **CORE_OPTIONS,
                "cache_dir": core_cache,
                "tensor_parallel_size": tp_size,
                "pipeline_parallel_size": pp_size,
            }
            | options
        )

    return make


@pytest.fixture(scope="module")
def open_ranks(config, tmp_path_factory):
    executors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankProcess, "module", "faulty_rank")
        server = RankForkServer()
        patch.setattr(RankProcess, "spawn", server.spawn)
        helpers = Path(__file__).parents[1] / "helpers"
        patch.setenv("PYTHONPATH", f"{helpers}:{os.environ.get('PYTHONPATH', '')}")

        def open_them(layout, **options):
            faults = tmp_path_factory.mktemp("faults")
            patch.setenv("FAULTS", str(faults))  # ranks that are started again find those of the last ones opened
            wanted = config(layout, **options)
            executor = open_executor(wanted)
            executors.append(executor)
            harness = RankHarness(EngineCore(wanted, executor), None)
            harness.faults = faults
            return harness

        yield open_them
        for executor in executors:
            executor.close()
        server.close()
