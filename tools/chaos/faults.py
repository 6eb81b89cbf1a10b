"""The same without processes: an engine core on memory that fails with ENOSPC and EIO while requests run.

Knows nothing of servers; every answer is compared with what the core said before anything failed.
"""

from __future__ import annotations

import errno
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from shuteye.calls import ControlCall, ReloadCall, SleepCall, WakeCall
from shuteye.config import EngineConfig
from shuteye.engine.core import EngineCore
from shuteye.errors import ShuteyeError
from shuteye.executors.inproc import InprocExecutor
from shuteye.memory.backends import failure_of
from shuteye.memory.backends.fake import FakeBackend
from shuteye.tasks.generate.requests import GenerateRequest, SamplingParams

NUM_PROMPTS = 6
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
CALLS = (
    SleepCall(1, mode="keep"),
    SleepCall(2, mode="keep"),
    SleepCall(1, tags=("kv_cache",), mode="abort"),
    WakeCall(),
    WakeCall(),
)
MAX_STEPS = 5000


class FaultyCore:
    """A core over a tiny model, and what its requests have received."""

    def __init__(self, checkpoint: Path, cache_dir: Path) -> None:
        self.backend = FakeBackend()
        config = EngineConfig(
            model=str(checkpoint),
            dtype="float32",
            enable_sleep_mode=True,
            kv_cache_memory=1 << 20,
            max_model_len=256,
            num_threads=1,
            on_sleeping_request="hold",
            cache_dir=cache_dir,
        )
        self.core = EngineCore(config, InprocExecutor(config, backend=self.backend))
        self.tokens: dict[str, list[int]] = {}
        self.ends: Counter[str] = Counter()

    def add(self, request_id: str, prompt: tuple[int, ...]) -> None:
        """Send a request."""
        self.tokens[request_id] = []
        self.core.add(GenerateRequest(request_id, prompt, PARAMS))

    def step(self) -> list[str]:
        """One step; the requests that ended whole."""
        whole = []
        for delta in self.core.step():
            self.tokens[delta.request_id] += getattr(delta, "token_ids", ())
            if delta.error is not None:
                self.ends[delta.error.kind] += 1
            elif delta.finish_reason is not None:
                self.ends[delta.finish_reason] += 1
                if delta.finish_reason == "length":
                    whole.append(delta.request_id)
        return whole

    def call(self, call: ControlCall) -> Any:
        """A control call, run to its answer."""
        answers: list[Any] = []
        self.core.submit(call, answers.append)
        for _ in range(MAX_STEPS):
            self.step()
            if answers:
                return answers[0]
        raise AssertionError(f"{call} was never answered")


def run(checkpoint: Path, cache_dir: Path, *, seconds: float, seed: int) -> tuple[Counter[str], list[str]]:
    """Fail at random for that long; how requests ended, and what must not have been."""
    rng, violations = random.Random(f"{seed}/faults"), []
    faulty = FaultyCore(checkpoint, cache_dir)
    prompts = [tuple(range(index, index + 40)) for index in range(5, 5 + NUM_PROMPTS)]
    truth = []
    for index, prompt in enumerate(prompts):
        faulty.add(f"truth-{index}", prompt)
        while not faulty.step():
            pass
        truth.append(faulty.tokens[f"truth-{index}"])
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end and not violations:
        number += 1
        which = [rng.randrange(NUM_PROMPTS) for _ in range(4)]
        names = [f"{number}-{index}" for index in range(4)]
        for name, index in zip(names, which, strict=True):
            faulty.add(name, prompts[index])
        code = rng.choice((errno.ENOSPC, errno.EIO, errno.ENOMEM))
        faulty.backend.clear()
        faulty.backend.fail_at(
            rng.randrange(40), when=rng.choice(("before", "after")), error=failure_of("A test", code)
        )
        for _ in range(rng.randrange(60)):  # the trap may spring while requests run, or when the last has ended
            faulty.step()
        for _ in range(rng.randint(0, 3)):
            faulty.call(rng.choice(CALLS))
        faulty.backend.clear()
        violations += _recover(faulty)
        for _ in range(MAX_STEPS):
            if not faulty.core.can_step:
                break
            faulty.step()
        for name, index in zip(names, which, strict=True):
            found = faulty.tokens[name]
            if found != truth[index][: len(found)]:
                violations.append(f"wrong tokens in round {number} (errno {code}): {found} for {truth[index]}")
    faulty.core._executor.close()
    return faulty.ends, violations


def _recover(faulty: FaultyCore) -> list[str]:
    """By the calls that a user has."""
    for call in (WakeCall(), ReloadCall(), WakeCall()):
        if faulty.core.state.gate == "open":
            return []
        if not isinstance(call, ReloadCall) or faulty.core.state.missing:
            outcome = faulty.call(call)
    if faulty.core.state.gate == "open":
        return []
    return [f"no way back: {outcome if isinstance(outcome, ShuteyeError) else faulty.core.state}"]
