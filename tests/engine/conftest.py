"""An engine core over a tiny real model, on memory that is poisoned when fresh and fails where it is told to."""

import functools

import pytest
from rigs import Rig

from shuteye.config import EngineConfig, default_cache_dir
from shuteye.engine.core import EngineCore
from shuteye.executors.inproc import InprocExecutor
from shuteye.memory.backends.fake import FakeBackend


@pytest.fixture
def make_rig(tiny_checkpoint, tmp_path_factory):
    """Rigs over one shared image; closed when the test ends."""
    cache_dir = tmp_path_factory.getbasetemp() / "rig-cache"
    rigs = []

    def make(backend=None, **options):
        backend = backend or FakeBackend()
        config = EngineConfig(
            **{
                "model": str(tiny_checkpoint),
                "dtype": "float32",
                "enable_sleep_mode": True,
                "kv_cache_memory": 1 << 20,
                "max_model_len": 256,
                "verify_wake": "full",
                "num_threads": 1,
                "cache_dir": cache_dir,
            }
            | options
        )
        executor = InprocExecutor(config, backend=backend)
        rig = Rig(EngineCore(config, executor), backend)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        if isinstance(rig.backend, FakeBackend):
            rig.backend.clear()
        rig.core._executor.close()


@pytest.fixture
def rig(make_rig):
    return make_rig()


@pytest.fixture(scope="session")
def smollm2_options(smollm2):
    """What `LLM` needs to serve the real model from the user's cache."""
    return {"model": str(smollm2.path), "cache_dir": default_cache_dir(), "num_threads": 2}


@pytest.fixture(scope="session")
def smollm2_reference(smollm2):
    """The real model as transformers loads and runs it by itself, once per dtype."""

    @functools.cache
    def load(dtype):
        from transformers import AutoModelForCausalLM, GgufConfig

        return AutoModelForCausalLM.from_pretrained(
            smollm2.path.parent,
            gguf_file=smollm2.path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
        ).eval()

    return load
