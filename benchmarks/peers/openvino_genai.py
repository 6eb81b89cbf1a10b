"""OpenVINO GenAI: its continuous-batching pipeline in a child process, without a server.

The checkpoint's float16 GGUF is converted to OpenVINO's own format once, which loads in half the time; it computes in
bfloat16 where the processor can, as by default, and its KV cache is bfloat16 as everyone's; where it cannot, the cache
is of 8 bits, its default. int8 and int4 weights are made of that by OpenVINO's NNCF, with the settings of its export
tool but for groups of 64, which divide every width.
"""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from checkpoints import FORMATS, Checkpoint
from machine import this_machine
from peers.base import (
    KV_BYTES,
    LEVEL_SETTINGS,
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
COMPRESS = """
import sys, nncf, openvino
source, target, mode = sys.argv[1:]
groups = {"group_size": 64, "ratio": 1.0} if mode.startswith("INT4") else {}
model = nncf.compress_weights(openvino.Core().read_model(source), mode=nncf.CompressWeightsMode[mode], **groups)
openvino.save_model(model, target, compress_to_fp16=False)
"""
MODES = {"int8": "INT8_ASYM", "int4": "INT4_ASYM"}
MODEL = "openvino_model.xml"
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


class OpenVino:
    """Asleep is a process whose pipeline was deleted."""

    over_http = False
    sleeps = "the pipeline deleted"

    def __init__(self, checkpoint: Checkpoint, logs: Path, level: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.level = level
        self.log = logs / "openvino.log"
        self._process: Process | None = None

    @property
    def directory(self) -> Path:
        """The checkpoint in OpenVINO's format, its weights in what `FORMATS` says."""
        made = FORMATS[self.checkpoint.format].openvino
        return self._plain if made not in MODES else self._plain.with_name(f"{self._plain.name}-{made}")

    @property
    def _plain(self) -> Path:
        return self.checkpoint.gguf_f16.with_name(f"{self.checkpoint.name}-openvino")

    @property
    def _flags(self) -> tuple[str, ...]:
        return () if self.level == "avx2" else this_machine(measured=False).flags

    def missing(self) -> str | None:
        return None if peer_python("openvino").exists() else how_to_install("openvino")

    def version(self) -> str:
        return f"openvino-genai {installed_version('openvino', 'openvino-genai')}"

    def arguments(self) -> list[str]:
        # -P: the script's own directory must not be searched for modules.
        child = [str(peer_python("openvino")), "-P", str(CHILD)]
        precision = "bf16" if not BF16_FLAGS.isdisjoint(self._flags) else "u8"
        return [*child, str(self.directory), str(KV_BYTES >> 30), str(MAX_STREAMS), precision]

    def command(self) -> str:
        shown = [argument.replace(str(Path.home()), "~") for argument in self.arguments()]
        return " ".join("benchmarks/peers/openvino_child.py" if part == str(CHILD) else part for part in shown)

    def prepare(self) -> None:
        """Convert the GGUF, and compress that."""
        if not self._plain.exists():
            with _made(self._plain) as partial:  # OpenVINO writes its files beside the one it reads
                link = partial / "model.gguf"
                link.symlink_to(self.checkpoint.gguf_f16)
                _run(CONVERT, link)
                link.unlink()
        if not self.directory.exists():
            with _made(self.directory) as partial:
                shutil.copytree(self._plain, partial, dirs_exist_ok=True)
                mode = MODES[FORMATS[self.checkpoint.format].openvino]
                _run(COMPRESS, self._plain / MODEL, partial / MODEL, mode)

    @property
    def process(self) -> Process:
        assert self._process is not None, "not started"
        return self._process

    def start(self, prompt: str) -> float:
        begin = time.perf_counter()
        self._process = Process(
            self.arguments(), log=self.log, environment=LEVEL_SETTINGS.get(self.level or ""), pipe=True
        )
        return self._first_arrival(prompt, START_TIMEOUT_S) - begin

    def ask(self, prompts: list[str], *, max_tokens: int, timeout_s: float) -> Burst:
        found = self._tell({"prompts": prompts, "max_tokens": max_tokens}, timeout_s)
        streams = (stream | {"arrivals_s": tuple(stream["arrivals_s"])} for stream in found["streams"])
        return Burst(found["begin_s"], tuple(Stream(**stream) for stream in streams))

    def memory_bytes(self) -> int:
        return self.process.memory_bytes()

    def disk_bytes(self) -> int:
        return (self.directory / MODEL).with_suffix(".bin").stat().st_size

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


def _run(program: str, *arguments: object) -> None:
    command = [str(peer_python("openvino")), "-c", program, *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def _made(directory: Path) -> Iterator[Path]:
    """A directory to write to, which gets its name once it is whole."""
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    partial.rename(directory)
