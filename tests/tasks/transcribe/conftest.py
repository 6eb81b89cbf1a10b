"""Tiny Whispers, and engine cores over them."""

import functools
from pathlib import Path

import numpy as np
import pytest
from speech_harness import Reference, SpeechHarness

from shuteye.audio import decode
from shuteye.config import EngineConfig
from shuteye.engine.core import EngineCore
from shuteye.executors.inproc import InprocExecutor
from shuteye.memory.backends.fake import FakeBackend

SPEECH = Path(__file__).parents[2] / "data" / "speech.ogg"


@pytest.fixture
def make_harness(whisper_checkpoints, tmp_path_factory):
    """Harnesses over memory that is poisoned when fresh, and over one shared image per checkpoint."""
    cache_dir = tmp_path_factory.getbasetemp() / "speech-cache"
    harnesses = []

    def make(seed=0, multilingual=False, **options):
        settings = {
            "model": str(whisper_checkpoints(seed, multilingual)),
            "dtype": "float32",
            "enable_sleep_mode": True,
            "verify_wake": "full",
            "num_threads": 1,
            "cache_dir": cache_dir,
        }
        config = EngineConfig(**settings | options)
        harness = SpeechHarness(EngineCore(config, InprocExecutor(config, backend=FakeBackend())))
        harnesses.append(harness)
        return harness

    yield make
    for harness in harnesses:
        harness.core._executor.close()


@pytest.fixture
def harness(make_harness):
    return make_harness()


@pytest.fixture(scope="session")
def reference(whisper_checkpoints):
    """Transformers' own answers, by (seed, multilingual)."""
    return functools.cache(lambda seed=0, multilingual=False: Reference(whisper_checkpoints(seed, multilingual)))


@pytest.fixture(scope="session")
def spoken():
    """Thirteen seconds of synthesized speech, as samples; see data/make_speech.py."""
    return np.frombuffer(decode(SPEECH.read_bytes()), dtype="<f4")
