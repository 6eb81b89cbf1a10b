"""An `AsyncEngine` that nobody closed: its process and its sockets go with it, and the interpreter ends in order."""

import subprocess
import sys

import pytest

ENGINE = """
import asyncio, gc, os, sys
from shuteye import AsyncEngine, EngineConfig
async def started():
    engine = AsyncEngine(EngineConfig(model=sys.argv[1], cache_dir=sys.argv[2], kv_cache_memory=1 << 20,
                                      max_model_len=256, num_threads=1))
    await engine.start()
    return engine
"""
ENDS = {
    "dropped by its coroutine": "async def main():\n    print((await started()).engine_pid)\nasyncio.run(main())",
    "in a cycle that is collected": (
        "async def main():\n    engine = await started()\n    engine.itself = engine\n    print(engine.engine_pid)\n"
        "asyncio.run(main()); gc.collect()"
    ),
    "global to the end": "engine = asyncio.run(started())\nprint(engine.engine_pid)",
}
GONE = """
def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
"""


@pytest.mark.parametrize("end", ENDS)
def test_an_interpreter_ends_with_an_engine_that_nobody_closed(tiny_checkpoint, core_cache, end):
    """A hang for ever: a ZeroMQ context that is collected waits for its open sockets."""
    code = f"{ENGINE}\n{ENDS[end]}"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tiny_checkpoint), str(core_cache)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert int(ended.stdout) > 0


def test_the_process_of_a_dropped_engine_is_ended_with_it(tiny_checkpoint, core_cache):
    """An engine process that goes on with nobody to serve, for as long as this one lives."""
    drop = f"{ENDS['in a cycle that is collected'].replace('print(', 'pids.append(')}\nprint(is_gone(pids[0]))"
    code = f"{ENGINE}\n{GONE}\npids = []\n{drop}"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tiny_checkpoint), str(core_cache)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr
