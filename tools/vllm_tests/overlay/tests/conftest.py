"""In the place of the fixtures of vLLM's tests: hub names lead to the files of what is served in their place."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from in_place import stand_in
from vllm import tokenizers
from vllm.transformers_utils import repo_utils

_FILES = Path(os.environ["SHUTEYE_TEST_MODELS"])
"""A directory with the tokenizer of each model that is served, under its alias."""


class HfRunner:
    """The models that theirs is compared with."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pytest.skip("transformers itself computes what is compared here")


class LocalAssetServer:
    """Serves vLLM's images and videos, which are not in its source distribution."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pytest.skip("vLLM's test assets are not in its source distribution")


class _Hub:
    """`huggingface_hub.HfApi`: nothing is fetched."""

    def snapshot_download(self, repo_id: str | None = None, *_args: Any, **_kwargs: Any) -> str:
        return str(_FILES / stand_in(str(repo_id)))


_tokenizer = transformers.AutoTokenizer.from_pretrained


def _local(name: Any, *args: Any, **kwargs: Any) -> Any:
    return _tokenizer(name if Path(str(name)).exists() else _FILES / stand_in(str(name)), *args, **kwargs)


def _get_tokenizer(tokenizer_name: str, *_args: Any, **_kwargs: Any) -> Any:
    return _local(tokenizer_name)


transformers.AutoTokenizer.from_pretrained = _local
tokenizers.get_tokenizer = _get_tokenizer
repo_utils.hf_api = _Hub


def _asks_a_server(item: Any) -> bool:
    """Whether a test is about what a server, or `LLM`, answers, not about other classes of vLLM's."""
    if item.get_closest_marker("cpu_test") or not hasattr(item, "function"):
        return False
    if "/llm/" in str(item.path):
        return True
    code = inspect.getsource(item.function)
    return any("server" in one or "client" in one for one in (code, *item.fixturenames))


def pytest_configure(config: Any) -> None:
    """Offline tests import what stands for vLLM's outputs."""
    if any("/llm/" in one for one in config.args):
        import tests.offline  # noqa: F401


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out the tests of vLLM's own classes."""
    others = [item for item in items if not _asks_a_server(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def _absent(name: str) -> Any:
    @pytest.fixture(name=name, scope="session")
    def fixture() -> Any:
        pytest.skip(f"{name} computes with vLLM or transformers itself, which is not what is tested here")

    return fixture


@pytest.fixture(scope="session")
def vllm_runner() -> type[Any]:
    """Makes engines in this process."""
    from tests.offline import VllmRunner

    return VllmRunner


hf_runner, local_asset_server = map(_absent, ("hf_runner", "local_asset_server"))
example_prompts, image_urls, video_urls = map(_absent, ("example_prompts", "image_urls", "video_urls"))
