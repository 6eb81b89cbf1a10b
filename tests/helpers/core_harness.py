"""A core over a real model, stepped by hand, and what its requests have received."""

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from shuteye.calls import ControlCall, WakeCall
from shuteye.engine.core import EngineCore
from shuteye.errors import ShuteyeError, VerificationFailed, rebuild
from shuteye.memory.backends import MemoryBackend
from shuteye.memory.backends.fake import FakeBackend
from shuteye.memory.backends.linux import LinuxBackend
from shuteye.models.tensors import slot_view
from shuteye.state import VerifyResult
from shuteye.tasks.generate.requests import GenerateRequest, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


class QuickBackend(LinuxBackend):
    """Takes the process's memory from statm: smaps_rollup walks all of pytest's mappings, at every sleep."""

    def process_resident_bytes(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def fake_backend():
    """Memory that is poisoned when fresh, and fails where it is told to."""
    return FakeBackend(QuickBackend())


CORE_OPTIONS = {
    "dtype": "float32",
    "enable_sleep_mode": True,
    "kv_cache_memory": 1 << 20,
    "max_model_len": 256,
    "verify_wake": "full",
    "num_threads": 1,
}
"""Of an `EngineConfig` for a tiny model that generates."""


class Stepped:
    """A core that is stepped by hand; `step` takes what it tells of requests."""

    LIMIT: ClassVar[int] = 2000
    core: EngineCore

    def run(self, limit=None):
        """Step until there is nothing to do."""
        for _ in range(limit or self.LIMIT):
            if not self.core.can_step:
                return
            self.step()
        raise AssertionError("the core never came to rest")

    @property
    def worker(self):
        """The rank itself, to look behind the engine's back."""
        return self.core._executor._worker

    def submit(self, call: ControlCall):
        """Queue a call; its answers (there must be exactly one) are appended to the returned list."""
        answers = []
        self.core.submit(call, answers.append)
        return answers

    def call(self, call: ControlCall, limit=None):
        """Run a call to its answer; raises what it answers with."""
        answers = self.submit(call)
        for _ in range(limit or self.LIMIT):
            self.step()
            if answers:
                break
        assert len(answers) == 1, f"{call} was answered {len(answers)} times"
        if isinstance(answers[0], ShuteyeError):
            raise answers[0]
        return answers[0]


@dataclass
class CoreHarness(Stepped):
    """A core and what its requests have received so far."""

    core: EngineCore
    backend: MemoryBackend
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, object] = field(default_factory=dict)  # finish reason, or the error

    def add(self, request_id, prompt, params=GREEDY):
        self.tokens[request_id] = []
        self.core.add(GenerateRequest(request_id, tuple(prompt), params))

    def step(self):
        for delta in self.core.step():
            assert delta.request_id not in self.ended, "a request that had ended got more"
            self.tokens[delta.request_id] += delta.token_ids
            if delta.error is not None:
                self.ended[delta.request_id] = rebuild(delta.error.kind, delta.error.message)
            elif delta.finish_reason is not None:
                self.ended[delta.request_id] = delta.finish_reason

    def tensors(self):
        """Views of every weight, by name; alive while the weights are resident."""
        return {slot.name: slot_view(self.worker._weights, slot) for slot in self.worker._image.layout.slots.values()}

    def generate(self, prompt, params=GREEDY):
        """The tokens of one request run to its end."""
        request_id = f"generate-{len(self.tokens)}"
        self.add(request_id, prompt, params)
        self.run()
        ended = self.ended[request_id]
        if isinstance(ended, ShuteyeError):
            raise ended
        return self.tokens[request_id]


def wake_to_wrong_bytes(harness, monkeypatch):
    """A wake whose verification finds an extent that is wrong, and which is refused over it."""
    with monkeypatch.context() as patched:
        patched.setattr(harness.worker.residency, "verify", lambda _mode: VerifyResult(1, (0,)))
        with pytest.raises(VerificationFailed):
            harness.call(WakeCall())
