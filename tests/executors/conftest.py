"""Engines over rank processes."""

import functools

import pytest
from core_harness import CORE_OPTIONS
from rank_fork_server import RankForkServer
from rank_harness import LAYOUTS, RankHarness
from served_ranks import ServedRanks

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
def faults(tmp_path_factory):
    """Lets rank processes be such that fail where they are told to: makes the directories in which they are told.

    Ranks that are started look into the one that was made last, also if they are of an engine that is older.
    """
    with pytest.MonkeyPatch.context() as patch:
        server = RankForkServer()
        patch.setattr(RankProcess, "module", "faulty_rank")
        patch.setattr(RankProcess, "spawn", server.spawn)

        def make():
            directory = tmp_path_factory.mktemp("faults")
            patch.setenv("FAULTS", str(directory))
            return directory

        yield make
        server.close()


@pytest.fixture(scope="module")
def open_ranks(config, faults):
    executors = []

    def open_them(layout, **options):
        directory = faults()
        wanted = config(layout, **options)
        executor = open_executor(wanted)
        executors.append(executor)
        harness = RankHarness(EngineCore(wanted, executor), None)
        harness.faults = directory
        return harness

    yield open_them
    for executor in executors:
        executor.close()


@pytest.fixture(scope="module")
def serve_ranks(config, faults):
    """Servers over ranks, one at a time: whoever asks for another one ends the one before."""
    served = {}

    def serve(layout, **options):
        key = layout, *options.items()
        if key not in served:
            while served:
                served.popitem()[1].close()
            served[key] = ServedRanks(config(layout, **options), faults())
        return served[key]

    yield serve
    for one in served.values():
        one.close()
