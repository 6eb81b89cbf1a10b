"""What an engine need not import stays out of its process: half of its start, and most of what it keeps asleep."""

import subprocess
import sys

import pytest

from shuteye import native

HEAVY = ("torch", "transformers", "gguf", "scipy", "accelerate", "huggingface_hub", "numpy.random")

ENGINE = """
import sys
from shuteye import LLM, SamplingParams

with LLM(sys.argv[1], cache_dir=sys.argv[2], kv_cache_memory=1 << 20, max_model_len=256, num_threads=1,
         enable_sleep_mode=True) as llm:
    for params in (SamplingParams(temperature=0.0, max_tokens=3), SamplingParams(seed=1, top_p=0.9, max_tokens=3),
                   SamplingParams(logprobs=2, prompt_logprobs=1, repetition_penalty=1.2, max_tokens=3)):
        assert llm.generate(["a few words"], params)[0].finished
    for level in (1, 2):
        llm.sleep(level=level)
        llm.wake_up()
        assert llm.generate(["more"], SamplingParams(top_k=5, max_tokens=3))[0].finished
print(*sorted(sys.modules))
"""

CALLERS_SIDE = """
import sys
from shuteye.server import launch

launch.import_server()
from fastapi.openapi.models import OpenAPI
from pydantic import BaseModel

assert not OpenAPI.__pydantic_complete__, "built at every start"
assert "defer_build" not in BaseModel.model_config, "models of routes are built under the first request, with warnings"
print(*sys.modules)
"""


def modules_of(script: str, *arguments: str) -> set[str]:
    """The modules that a process has imported at its end."""
    command = (sys.executable, "-c", script, *arguments)
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1].split())


@pytest.mark.skipif(not native.available(), reason="without native kernels torch computes")
def test_an_engine_of_native_kernels_starts_runs_sleeps_and_wakes_without_torch(tiny_checkpoint, core_cache):
    """Would catch an import of torch, or of what converts checkpoints, on the way of a request, a sleep or a wake."""
    found = modules_of(ENGINE, str(tiny_checkpoint), str(core_cache))
    assert not found & {*HEAVY}


def test_the_callers_side_imports_nothing_that_computes():
    """Would catch the memory of every served model growing by a library that its API process does not use."""
    assert not modules_of(CALLERS_SIDE) & {*HEAVY, "numpy", "llguidance", "jinja2", "cyclopts", "rich", "pydantic.v1"}
