"""Fixtures of the whole suite: a tiny checkpoint for most tests, the real one for those marked `model`."""

from pathlib import Path

import pytest
import torch

from shuteye.config import default_cache_dir
from shuteye.models.sources import ModelSource, resolve_source
from shuteye.testing import tiny_model

NUM_THREADS = 1


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """More threads than idle cores make every operation wait at a barrier: fifty times slower on a busy machine."""
    torch.set_num_threads(NUM_THREADS)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers in Hugging Face format; read only."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The real SmolLM2-135M-Instruct, fetched once per user; a failure to get it fails the test, never skips it."""
    return resolve_source("smollm2-135m", cache_dir=default_cache_dir())
