"""Fixtures of the whole suite: a tiny checkpoint for most tests, the real one for those marked `model`."""

import copy
import functools
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from core_harness import CORE_OPTIONS, CoreHarness, fake_backend

import shuteye
from shuteye import LLM, AsyncEngine, EngineConfig
from shuteye.config import default_cache_dir
from shuteye.engine.core import EngineCore
from shuteye.executors.inproc import InprocExecutor
from shuteye.memory.backends.fake import FakeBackend
from shuteye.models import converter
from shuteye.models.converter import Order, obtain_image
from shuteye.models.progress import no_progress
from shuteye.models.sources import ModelSource, resolve_source
from shuteye.testing import tiny_model, tiny_speech_model

NUM_THREADS = 1


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """More threads than idle cores make every operation wait at a barrier: fifty times slower on a busy machine."""
    torch.set_num_threads(NUM_THREADS)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A worker of pytest-xdist ignores SIGINT, and so would every process that its tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def convert_here() -> Iterator[None]:
    """Convert in this process: a tiny model takes less time than a process that imports transformers to begin.

    `tests/models/test_converter.py` has the process of its own; so has every server that tests start.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, "make_apart", converter.make)
        yield


@pytest.fixture
def temporary(monkeypatch):
    """Where temporary files go, by a name that is short enough for a socket wherever the tests keep theirs."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers in Hugging Face format; read only."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The real SmolLM2-135M-Instruct, fetched once per user; a failure to get it fails the test, never skips it."""
    return resolve_source("smollm2-135m", cache_dir=default_cache_dir())


@pytest.fixture(scope="session")
def core_cache(tiny_checkpoint, tmp_path_factory):
    """A cache with the image of the tiny checkpoint: a process of its own would take seconds to make it."""
    cache_dir = tmp_path_factory.getbasetemp() / "core-cache"
    obtain_image(Order(str(tiny_checkpoint), str(cache_dir), dtype="float32"), no_progress).close()
    return cache_dir


@pytest.fixture
def tiny_options(core_cache):
    """Settings that make any model of the docs a tiny one."""
    return {
        "kv_cache_memory": 1 << 20,
        "max_model_len": 256,
        "num_threads": 1,
        "cache_dir": core_cache,
    }


@pytest.fixture
def tiny_shuteye(tiny_options, tiny_checkpoint, monkeypatch):
    """`from shuteye import …` gives engines that serve the tiny checkpoint, in this process, whatever is asked for."""

    def tiny_config(_model, **others):
        return EngineConfig(str(tiny_checkpoint), **(tiny_options | others))

    def tiny_llm(_model, **others):
        return LLM(str(tiny_checkpoint), **(tiny_options | others))

    monkeypatch.setattr(shuteye, "EngineConfig", tiny_config, raising=False)
    monkeypatch.setattr(shuteye, "LLM", tiny_llm, raising=False)
    monkeypatch.setattr(shuteye, "AsyncEngine", functools.partial(AsyncEngine, in_process=True), raising=False)


@pytest.fixture(scope="session")
def minilm() -> ModelSource:
    """The real all-MiniLM-L6-v2, fetched once per user; a failure to get it fails the test, never skips it."""
    return resolve_source("minilm-l6", cache_dir=default_cache_dir())


@pytest.fixture(scope="session")
def whisper():
    """The real whisper-tiny.en, fetched and converted once per user; a failure to get it fails the test."""
    return resolve_source("whisper-tiny.en", cache_dir=default_cache_dir())


@pytest.fixture(scope="session")
def whisper_checkpoints(tmp_path_factory):
    """Tiny Whispers by (seed, multilingual); read only."""
    directory = tmp_path_factory.mktemp("whispers")

    @functools.cache
    def make(seed=0, multilingual=False):
        return tiny_speech_model(directory / f"{seed}-{multilingual}", seed=seed, multilingual=multilingual)

    return make


# --- engine cores: on memory that is poisoned when fresh, and fails where it is told to ----------


@pytest.fixture
def make_harness(tiny_checkpoint, core_cache):
    """Harnesses over one shared image; closed when the test ends."""
    harnesses = []

    def make(backend=None, **options):
        backend = backend or fake_backend()
        config = EngineConfig(
            **{
                "model": str(tiny_checkpoint),
                **CORE_OPTIONS,
                "cache_dir": core_cache,
            }
            | options
        )
        executor = InprocExecutor(config, backend=backend)
        harness = CoreHarness(EngineCore(config, executor), backend)
        harnesses.append(harness)
        return harness

    yield make
    for harness in harnesses:
        if isinstance(harness.backend, FakeBackend):
            harness.backend.clear()
        harness.core._executor.close()


@pytest.fixture
def harness(make_harness):
    return make_harness()


@pytest.fixture(scope="session")
def smollm2_options(smollm2):
    """What `LLM` needs to serve the real model from the user's cache, in the dtype that is asked for."""
    return {"model": str(smollm2.path), "cache_dir": default_cache_dir(), "num_threads": 2, "quantization": "none"}


@pytest.fixture(scope="session")
def gguf_read_once():
    """Within `gguf_read_once()`, transformers parses a GGUF file once: seconds for the real one, at every load."""
    import gguf

    slow = {name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}

    @contextmanager
    def reading():
        with pytest.MonkeyPatch.context() as patch:
            for name, once in slow.items():
                patch.setattr(gguf, name, once)
            yield

    return reading


@pytest.fixture(scope="session")
def smollm2_reference(smollm2, gguf_read_once):
    """The real model as transformers loads and runs it by itself, once per dtype."""

    @functools.cache
    def load(dtype):
        from transformers import AutoModelForCausalLM, GgufConfig

        if dtype == torch.float32:
            with gguf_read_once():
                return AutoModelForCausalLM.from_pretrained(
                    smollm2.path.parent,
                    gguf_file=smollm2.path.name,
                    quantization_config=GgufConfig(dequantize=True),
                    dtype=dtype,
                ).eval()
        model = copy.deepcopy(load(torch.float32))  # what loading in `dtype` gives, without dequantizing again
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    return load
