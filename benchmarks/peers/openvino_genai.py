"""OpenVINO GenAI: its continuous-batching pipeline in a child process, without a server.

The checkpoint's float16 GGUF is converted to OpenVINO's own format once, which loads in half the time; it computes in
bfloat16 where the processor can, as by default, and its KV cache is bfloat16 as everyone's.
"""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint
from peers.base import (
    KV_BYTES,
    MAX_STREAMS,
    Burst,
    EngineFailure,
    EngineHangs,
    Stream,
    how_to_install,
    installed_version,
    peer_python,
)
from peers.process import Process

CHILD = Path(__file__).parent / "openvino_child.py"
START_TIMEOUT_S = 120.0
CONVERT = """
import sys, openvino_genai
openvino_genai.LLMPipeline(sys.argv[1], "CPU", enable_save_ov_model=True)
"""


class OpenVino:
    """Asleep is a process whose pipeline was deleted."""

    over_http = False
    sleeps = "the pipeline deleted"

    def __init__(self, checkpoint: Checkpoint, logs: Path) -> None:
        self.checkpoint = checkpoint
        self.log = logs / "openvino.log"
        self._process: Process | None = None

    @property
    def directory(self) -> Path:
        """The checkpoint in OpenVINO's format."""
        return self.checkpoint.gguf_f16.with_name(f"{self.checkpoint.name}-openvino")

    def missing(self) -> str | None:
        return None if peer_python("openvino").exists() else how_to_install("openvino")

    def version(self) -> str:
        return f"openvino-genai {installed_version('openvino', 'openvino-genai')}"

    def arguments(self) -> list[str]:
        # -P: the script's own directory must not be searched for modules.
        child = [str(peer_python("openvino")), "-P", str(CHILD)]
        return [*child, str(self.directory), str(KV_BYTES >> 30), str(MAX_STREAMS)]

    def command(self) -> str:
        shown = [argument.replace(str(Path.home()), "~") for argument in self.arguments()]
        return " ".join("benchmarks/peers/openvino_child.py" if part == str(CHILD) else part for part in shown)

    def prepare(self) -> None:
        """Convert the GGUF; OpenVINO writes its files beside the one it reads."""
        if self.directory.exists():
            return
        partial = self.directory.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        link = partial / "model.gguf"
        link.symlink_to(self.checkpoint.gguf_f16)
        subprocess.run([peer_python("openvino"), "-c", CONVERT, link], check=True, stdout=subprocess.DEVNULL)
        link.unlink()
        partial.rename(self.directory)

    @property
    def process(self) -> Process:
        assert self._process is not None, "not started"
        return self._process

    def start(self, prompt: str) -> float:
        begin = time.perf_counter()
        self._process = Process(self.arguments(), log=self.log, pipe=True)
        return self._first_arrival(prompt, START_TIMEOUT_S) - begin

    def ask(self, prompts: list[str], *, max_tokens: int, timeout_s: float) -> Burst:
        found = self._tell({"prompts": prompts, "max_tokens": max_tokens}, timeout_s)
        streams = (stream | {"arrivals_s": tuple(stream["arrivals_s"])} for stream in found["streams"])
        return Burst(found["begin_s"], tuple(Stream(**stream) for stream in streams))

    def memory_bytes(self) -> int:
        return self.process.memory_bytes()

    def sleep(self) -> float:
        seconds: float = self._tell({"unload": True}, START_TIMEOUT_S)["seconds"]
        return seconds

    def wake(self, prompt: str, *, timeout_s: float) -> float:
        begin = time.perf_counter()
        return self._first_arrival(prompt, timeout_s) - begin

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _first_arrival(self, prompt: str, timeout_s: float) -> float:
        return self.ask([prompt], max_tokens=1, timeout_s=timeout_s).streams[0].arrivals_s[0]

    def _tell(self, line: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        stdin, stdout = self.process.popen.stdin, self.process.popen.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and readline says so
            stdin.write(json.dumps(line).encode() + b"\n")
            stdin.flush()
        if not select.select([stdout], [], [], timeout_s)[0]:
            raise EngineHangs(f"no complete answer in {timeout_s:.0f} s")
        answer = stdout.readline()
        if not answer:
            self.process.popen.wait()
            self.process.check_alive()
            raise EngineFailure("closed its output")
        found: dict[str, Any] = json.loads(answer)
        return found
