"""In the place of the helpers of vLLM's tests: its server is `shuteye serve`, and there are no GPUs to look after."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from in_place import command, environment
from vllm.utils.network_utils import get_open_port

VLLM_PATH = Path(__file__).parent.parent
ROCM_EXTRA_ARGS: list[str] = []
ROCM_ENV_OVERRIDES: dict[str, str] = {}
ROCM_ENGINE_KWARGS: dict[str, Any] = {}
_START_S = 400.0


class RemoteOpenAIServer:
    """`vllm serve`, as its tests use it."""

    DUMMY_API_KEY = "token-abc123"

    def __init__(
        self,
        model: str,
        vllm_serve_args: list[str],
        *,
        env_dict: dict[str, str] | None = None,
        seed: int = 0,
        auto_port: bool = True,
        max_wait_seconds: float | None = None,
        override_hf_configs: dict[str, Any] | None = None,
    ) -> None:
        given = list(vllm_serve_args)
        self.uds = given[given.index("--uds") + 1] if "--uds" in given else None
        self.host = None if self.uds else "127.0.0.1"
        self.port = None
        if not self.uds:
            self.port = int(given[given.index("--port") + 1]) if "--port" in given else get_open_port()
        self.show_hidden_metrics = any(one.startswith("--show-hidden-metrics") for one in given)
        if not self.uds and "--port" not in given:
            given += ["--port", str(self.port)]
        if seed is not None:
            given += ["--seed", str(seed)]
        self.proc = subprocess.Popen(command(model, given), env=environment(env_dict))
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise

    def _wait(self) -> None:
        client = httpx.Client(transport=httpx.HTTPTransport(uds=self.uds)) if self.uds else httpx.Client()
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self.proc.poll() is not None:
                raise RuntimeError(f"shuteye serve ended with status {self.proc.returncode}; its output says why.")
            try:
                if client.get(self.url_for("health"), timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"shuteye serve was not ready within {_START_S:.0f} s.")

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *_error: object) -> None:
        self.proc.terminate()
        try:
            self.proc.wait(20)
        except subprocess.TimeoutExpired:
            self.proc.kill()
            self.proc.wait()

    @property
    def url_root(self) -> str:
        """Where the server is."""
        return f"http://{self.uds.split('/')[-1]}" if self.uds else f"http://{self.host}:{self.port}"

    def url_for(self, *parts: str) -> str:
        """The address of a route; of those that begin with a slash, too, whatever `requests` makes of two slashes."""
        return "/".join((self.url_root, *(part.lstrip("/") for part in parts)))

    def _options(self, given: dict[str, Any], *, path: str) -> dict[str, Any]:
        return {
            "base_url": self.url_for(*([path] if path else [])),
            "api_key": self.DUMMY_API_KEY,
            "max_retries": 0,
        } | ({"timeout": 120} | given)

    def get_client(self, **kwargs: Any) -> openai.OpenAI:
        """A client that does not try twice."""
        return openai.OpenAI(**self._options(kwargs, path="v1"))

    def get_async_client(self, **kwargs: Any) -> openai.AsyncOpenAI:
        """The same for asyncio."""
        return openai.AsyncOpenAI(**self._options(kwargs, path="v1"))

    def get_client_anthropic(self, **kwargs: Any) -> anthropic.Anthropic:
        """Anthropic's client."""
        return anthropic.Anthropic(**self._options(kwargs, path=""))

    def get_async_client_anthropic(self, **kwargs: Any) -> anthropic.AsyncAnthropic:
        """The same for asyncio."""
        return anthropic.AsyncAnthropic(**self._options(kwargs, path=""))


RemoteVLLMServer = RemoteOpenAIServer


def _same(test: Callable[..., Any]) -> Callable[..., Any]:
    return test


def create_new_process_for_each_test(_method: str | None = None) -> Callable[..., Any]:
    """Nothing here holds a GPU that a process would have to give back."""
    return _same


def large_gpu_test(*, min_gb: int) -> Any:
    """Skips: there is no GPU."""
    return pytest.mark.skip(f"needs a GPU of {min_gb} GB")


def multi_gpu_test(*, num_gpus: int) -> Any:
    """Skips: there is no GPU."""
    return pytest.mark.skip(f"needs {num_gpus} GPUs")


large_gpu_mark = large_gpu_test
single_gpu_only = multi_gpu_only = _same


def flat_product(*iterables: Any) -> Any:
    """Products of several iterables, tuples flattened."""
    import itertools

    for parts in itertools.product(*iterables):
        yield tuple(one for part in parts for one in (part if isinstance(part, tuple) else (part,)))


os.environ.setdefault("HF_HUB_OFFLINE", "1")
