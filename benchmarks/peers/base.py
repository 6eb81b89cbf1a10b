"""What a benchmark may ask of an engine, what it gets back, and where peers are installed.

Knows nothing of HTTP, of any engine's flags, or of which figures are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from shuteye.config import default_cache_dir

NUM_THREADS = 2
"""Compute threads of every engine; those that cannot be told use all cores."""
MAX_STREAMS = 16
CONTEXT = 2560
"""Tokens that one stream may take: a prompt of 2,048 and its answer."""
KV_BYTES = 1 << 30


LEVEL_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "ATEN_CPU_CAPABILITY": "avx512"},
}
"""Variables that hold oneDNN (so OpenVINO and torch) to an instruction set of shuteye's; others need no holding."""


class EngineFailure(Exception):
    """An engine answered wrongly, died, or is not there; the message becomes a row of the table."""


class EngineHangs(EngineFailure):
    """An engine gave no answer in time."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One streamed answer.

    Attributes:
        arrivals_s: when each piece of text came, on the clock of `time.perf_counter`; never empty.
        prompt_tokens, completion_tokens: as the engine counts them.
    """

    arrivals_s: tuple[float, ...]
    prompt_tokens: int
    completion_tokens: int

    def tokens_by(self, when_s: float) -> float:
        """About how many tokens had come; a piece may hold several, so they are spread evenly over the pieces."""
        pieces = sum(arrival <= when_s for arrival in self.arrivals_s)
        return self.completion_tokens * pieces / len(self.arrivals_s)


@dataclass(frozen=True, slots=True)
class Burst:
    """Answers to prompts that were sent at once, at `begin_s`."""

    begin_s: float
    streams: tuple[Stream, ...]

    @property
    def first_token_s(self) -> float:
        """Seconds until the last of the streams had its first token."""
        return self._all_began_s - self.begin_s

    @property
    def decode_rate(self) -> float:
        """Tokens per second of all streams together, from the moment when every stream had its first token."""
        begin = self._all_began_s
        left = sum(stream.completion_tokens - stream.tokens_by(begin) for stream in self.streams)
        return left / (self._end_s - begin)

    @property
    def total_rate(self) -> float:
        """Generated tokens per second of all streams together, prompts included in the time."""
        return sum(stream.completion_tokens for stream in self.streams) / (self._end_s - self.begin_s)

    @property
    def _all_began_s(self) -> float:
        return max(stream.arrivals_s[0] for stream in self.streams)

    @property
    def _end_s(self) -> float:
        return max(stream.arrivals_s[-1] for stream in self.streams)


class Peer(Protocol):
    """Whoever takes turns, on one checkpoint. Every method may raise `EngineFailure`."""

    @property
    def over_http(self) -> bool:
        """False if what it does includes no server."""
        ...

    @property
    def sleeps(self) -> str | None:
        """What `sleep` does, in a few words; None if it cannot."""
        ...

    def missing(self) -> str | None:
        """How to install it, if it is not."""
        ...

    def version(self) -> str:
        """What is measured."""
        ...

    def command(self) -> str:
        """How it is started, as one would type it."""
        ...

    def prepare(self) -> None:
        """Convert what is converted once, outside of all measurements."""
        ...


@runtime_checkable
class SelfTimed(Peer, Protocol):
    """A peer's own benchmark, which measures a few of our figures its own way."""

    def figures(self) -> Mapping[str, list[float]]:
        """One turn: samples by the keys of the metrics."""
        ...


class Engine(Peer, Protocol):
    """One that is asked."""

    def start(self, prompt: str) -> float:
        """Start, and answer `prompt` with one token; seconds from the start to that token."""
        ...

    def ask(self, prompts: list[str], *, max_tokens: int, timeout_s: float) -> Burst:
        """Send all prompts at once; each is answered greedily with exactly `max_tokens` tokens."""
        ...

    def memory_bytes(self) -> int:
        """Proportional set size of every process it consists of."""
        ...

    def disk_bytes(self) -> int:
        """Of the files that hold the weights it runs with."""
        ...

    def sleep(self) -> float | None:
        """Give back what it can, awaited; seconds, or None where it chose the moment by itself."""
        ...

    def wake(self, prompt: str, *, timeout_s: float) -> float:
        """Seconds from asking a sleeping engine for one token to that token."""
        ...

    def stop(self) -> None:
        """End every process; harmless if there is none."""
        ...


def peer_directory(name: str) -> Path:
    """The virtual environment of a peer."""
    return default_cache_dir() / "peers" / name


def peer_python(name: str) -> Path:
    return peer_directory(name) / "bin" / "python"


def how_to_install(name: str) -> str:
    return f"not installed; `make bench-peers PEERS={name}` installs it"


def installed_version(name: str, package: str) -> str:
    """The version of a package in a peer's own site-packages.

    Raises:
        EngineFailure: it is not there.
    """
    stem = package.replace("-", "_")
    for found in peer_directory(name).glob(f"lib/python*/site-packages/{stem}-*.dist-info"):
        return found.name.removesuffix(".dist-info").removeprefix(f"{stem}-")
    raise EngineFailure(how_to_install(name))
