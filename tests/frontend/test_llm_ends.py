"""How an `LLM` ends, whatever its process or its caller does: what would hang, crash, or take everyone down with it."""

import asyncio
import subprocess
import sys
import time

import pytest
from safetensors import safe_open

from shuteye import LLM, SamplingParams
from shuteye.errors import InvalidRequest

ENDS = {
    "del at exit": "class Holder:\n    def __del__(self): llm.close()\nholder = Holder()",
    "atexit": "import atexit; atexit.register(llm.close)",
    "running": (
        "import contextlib, threading, time\n"
        "def ask():\n"
        "    with contextlib.suppress(Exception):\n"
        "        llm.generate(['x'] * 200, SamplingParams(max_tokens=200, ignore_eos=True))\n"
        "threading.Thread(target=ask, daemon=True).start(); time.sleep(0.3)"
    ),
    "never closed": "",
}
START = """
import sys
from shuteye import LLM, SamplingParams
llm = LLM(sys.argv[1], kv_cache_memory=1 << 20, max_model_len=256, num_threads=1, cache_dir=sys.argv[2])
"""


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "core-cache"


@pytest.fixture
def llm(tiny_checkpoint, cache_dir):
    options = {"kv_cache_memory": 1 << 20, "max_model_len": 256, "num_threads": 1, "cache_dir": cache_dir}
    with LLM(str(tiny_checkpoint), enable_sleep_mode=True, **options) as made:
        yield made


@pytest.mark.parametrize("end", ENDS)
def test_an_interpreter_ends_in_order_with_an_llm_that_is_open(tiny_checkpoint, cache_dir, end):
    """A hang for ever, a crash among threads that nobody ended, or a traceback after the last line."""
    code = f"{START}\n{ENDS[end]}\nprint('done')"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tiny_checkpoint), str(cache_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
    assert "Traceback" not in ended.stderr


def raising(error):
    raise error
    yield


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), KeyboardInterrupt(), ValueError("boom")])
def test_an_iterable_of_tensors_ends_its_own_update_alone(llm, error):
    """An engine thread that is gone without a word, and callers who wait for ever."""
    expected = type(error) if isinstance(error, Exception) else InvalidRequest
    with pytest.raises(expected):
        llm.update_weights(raising(error))
    assert llm.generate("a", SamplingParams(max_tokens=1))[0].finished


@pytest.mark.parametrize("given", [5, [("a",)], [("model.norm.weight", 5)], {"model.norm.weight": 5}])
def test_what_is_no_list_of_tensors_is_refused(llm, given):
    """A bug of ours, to the caller's eyes."""
    with pytest.raises((InvalidRequest, TypeError)):
        llm.update_weights(given)


def test_what_the_engine_runs_cannot_call_it(llm):
    """A deadlock of the engine with itself."""

    def calling():
        llm.generate("a")
        yield

    with pytest.raises(InvalidRequest, match="cannot be called by what it runs"):
        llm.update_weights(calling())


def test_an_update_given_up_reads_no_further(llm, tiny_checkpoint):
    """An endless iterable that holds the engine after its caller was interrupted."""
    with safe_open(tiny_checkpoint / "model.safetensors", framework="pt") as file:
        norm = file.get_tensor("model.norm.weight")
    read = []

    def endless():
        while True:
            read.append(time.sleep(0.01))
            yield "model.norm.weight", norm

    async def given_up():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await llm._engine.update_weights(endless())

    llm._thread.run(given_up())
    assert llm.generate("a", SamplingParams(max_tokens=1))[0].finished
    assert len(read) > 1, "it was not read at all"


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.sleep(tags=5),
        lambda llm: llm.wake_up(tags=5),
        lambda llm: llm.collective_rpc("facts", 5),
        lambda llm: llm.reload_weights(5),
        lambda llm: llm.reload_weights(""),
        lambda llm: llm.update_weights_from_file(b"x"),
        lambda llm: llm.chat(5),
    ],
)
def test_a_bad_argument_is_the_callers(llm, call):
    """TypeErrors from within, or a bug of ours; an empty path taken for the working directory."""
    with pytest.raises(InvalidRequest):
        call(llm)
