"""Tiny Whispers, and engine cores over them."""

import functools
from pathlib import Path

import numpy as np
import pytest
from speech_harness import CoreHarness, Reference

from shuteye.audio import decode
from shuteye.config import EngineConfig
from shuteye.engine.core import EngineCore
from shuteye.executors.inproc import InprocExecutor
from shuteye.memory.backends.fake import FakeBackend
from shuteye.testing import tiny_speech_model

SPEECH = Path(__file__).parent.parent / "data" / "speech.ogg"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Tiny Whispers by (seed, multilingual); read only."""
    directory = tmp_path_factory.mktemp("whispers")

    @functools.cache
    def make(seed=0, multilingual=False):
        return tiny_speech_model(directory / f"{seed}-{multilingual}", seed=seed, multilingual=multilingual)

    return make


@pytest.fixture
def make_rig(checkpoints, tmp_path_factory):
    """Rigs over memory that is poisoned when fresh, and over one shared image per checkpoint."""
    cache_dir = tmp_path_factory.getbasetemp() / "speech-cache"
    rigs = []

    def make(seed=0, multilingual=False, **options):
        settings = {
            "model": str(checkpoints(seed, multilingual)),
            "dtype": "float32",
            "enable_sleep_mode": True,
            "verify_wake": "full",
            "num_threads": 1,
            "cache_dir": cache_dir,
        }
        config = EngineConfig(**settings | options)
        rig = CoreHarness(EngineCore(config, InprocExecutor(config, backend=FakeBackend())))
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.core._executor.close()


@pytest.fixture
def rig(make_rig):
    return make_rig()


@pytest.fixture(scope="session")
def reference(checkpoints):
    """Transformers' own answers, by (seed, multilingual)."""
    return functools.cache(lambda seed=0, multilingual=False: Reference(checkpoints(seed, multilingual)))


@pytest.fixture(scope="session")
def spoken():
    """Thirteen seconds of synthesized speech, as samples; see data/make_speech.py."""
    return np.frombuffer(decode(SPEECH.read_bytes()), dtype="<f4")
