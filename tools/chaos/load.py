"""Streams of requests whose answers are known, and the account of how each of them ended.

Knows nothing of what is being broken.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2
from world import KEY, World

NUM_STREAMS = 16
ANSWER_S = 60.0
"""After that long without a byte a request hangs; longer than any hold, drain or restart here."""

SETTLES_S = 1.0
"""After an outage: who was about to notice it has."""

LENGTHS = (4, 16, 48)
PROMPTS = tuple(
    f"{place}: a server whose memory can be taken and given back, prompt {index}."
    for index, place in enumerate(["Lagos", "Oslo", "Quito", "Hanoi", "Cairo", "Minsk", "Tunis", "Perth"])
)
Weights = Literal["image", "updated"]
Truth = dict[tuple[str, str, int], str]
"""(weights, prompt, number of tokens) → the text of a greedy answer."""


@dataclass
class History:
    """Which weights the server may have had, and when it may have been gone; written by whoever changes that."""

    spans: list[tuple[float, frozenset[str]]] = field(default_factory=lambda: [(0.0, frozenset({"image"}))])
    _outages: list[list[float]] = field(default_factory=list)  # begin, end

    def now(self, *weights: str) -> None:
        """From now on the weights are one of these."""
        self.spans.append((time.monotonic(), frozenset(weights)))

    @property
    def current(self) -> frozenset[str]:
        """What the weights may be now."""
        return self.spans[-1][1]

    def during(self, begin: float, end: float) -> frozenset[str]:
        """What the weights may have been at any moment in between."""
        found: frozenset[str] = frozenset()
        spans = [*self.spans, (float("inf"), frozenset())]  # a copy: whoever changes the weights adds to it meanwhile
        for (start, weights), (stop, _) in itertools.pairwise(spans):
            if start <= end and begin <= stop:
                found |= weights
        return found

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """Connections may break, and afterwards the weights may be the image's."""
        span = [time.monotonic(), float("inf")]
        self._outages.append(span)
        self.now(*self.current, "image")
        try:
            yield
        finally:
            span[1] = time.monotonic() + SETTLES_S

    def was_gone(self, begin: float, end: float) -> bool:
        """Whether the server may have been gone at any moment in between."""
        return any(start <= end and begin <= stop for start, stop in self._outages)


def body(prompt: str, length: int, *, stream: bool) -> dict[str, Any]:
    """A greedy request of exactly `length` tokens."""
    return {"prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True, "stream": stream}


def ask(world: World, prompt: str, length: int) -> str:
    """The answer to one request, whole; raises if there is none."""
    answer = httpx2.post(f"{world.url}/v1/completions", json=body(prompt, length, stream=False), timeout=ANSWER_S)
    answer.raise_for_status()
    text: str = answer.json()["choices"][0]["text"]
    return text


def learn(world: World, weights: Weights, truth: Truth) -> None:
    """Ask everything once and take note."""
    for prompt in PROMPTS:
        for length in LENGTHS:
            truth[weights, prompt, length] = ask(world, prompt, length)


class Load:
    """Threads that ask until told to stop; `ends` counts how requests ended, `violations` says what must not be."""

    def __init__(self, world: World, truth: Truth, history: History, seed: int) -> None:
        self._world, self._truth, self._history = world, truth, history
        self.ends: Counter[str] = Counter()
        self.violations: list[str] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/{index}"),), daemon=True)
            for index in range(NUM_STREAMS)
        ]

    def start(self) -> None:
        """Begin asking."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let every request end; those that do not are violations."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * ANSWER_S)
            if thread.is_alive():
                self.violations.append("a request never ended")

    def _run(self, rng: random.Random) -> None:
        try:
            self._ask_until_stopped(rng)
        except Exception as error:  # whatever it is, one stream less was under test
            self.violations.append(f"a stream ended by a bug of this tool: {type(error).__name__}: {error}")
            raise

    def _ask_until_stopped(self, rng: random.Random) -> None:
        while not self._stopped.is_set():
            prompt, length = rng.choice(PROMPTS), rng.choice(LENGTHS)
            begin = time.monotonic()
            try:
                end, text = self._stream(prompt, length, rng) if rng.random() < 0.7 else self._whole(prompt, length)
            except httpx2.TimeoutException as error:
                end, text = f"hung ({type(error).__name__}, {_state_of(self._world)})", ""
            except (httpx2.HTTPError, OSError):
                end, text = "connection lost", ""
            except (ValueError, KeyError, IndexError) as error:
                end, text = f"unreadable ({type(error).__name__}: {error})", ""
            self._account(prompt, length, begin, end, text)
            if not end.startswith("answered"):
                time.sleep(rng.uniform(0.02, 0.2))

    def _whole(self, prompt: str, length: int) -> tuple[str, str]:
        answer = httpx2.post(
            f"{self._world.url}/v1/completions", json=body(prompt, length, stream=False), timeout=ANSWER_S
        )
        return _outcome(answer.status_code, answer.json())

    def _stream(self, prompt: str, length: int, rng: random.Random) -> tuple[str, str]:
        leaves_after = rng.randint(1, length) if rng.random() < 0.1 else None
        text, reason, chunks = "", None, 0
        with httpx2.stream(
            "POST", f"{self._world.url}/v1/completions", json=body(prompt, length, stream=True), timeout=ANSWER_S
        ) as answer:
            if answer.status_code != 200:
                return _outcome(answer.status_code, json.loads(answer.read()))
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    return ("aborted" if reason == "abort" else "answered"), text
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return _outcome(event["error"].get("code", 0), event)
                text += event["choices"][0]["text"]
                reason = event["choices"][0]["finish_reason"] or reason
                chunks += 1
                if leaves_after == chunks:
                    return "left", text
        return "stream cut", text

    def _account(self, prompt: str, length: int, begin: float, end: str, text: str) -> None:
        wrong = self._wrong(prompt, length, begin, end, text)
        with self._lock:
            self.ends[end] += 1
            if wrong:
                self.violations.append(f"{wrong} (prompt {PROMPTS.index(prompt)}, {length} tokens, {text!r})")

    def _wrong(self, prompt: str, length: int, begin: float, end: str, text: str) -> str | None:
        now = time.monotonic()
        if end.startswith(("hung", "unreadable", "bug")):
            return end
        if end in ("connection lost", "stream cut") and not self._history.was_gone(begin - 1, now):
            return f"{end} although the server was there"
        weights = self._history.during(begin, now)
        if len(weights) != 1:
            return None  # an update or a restart in between: either answer, or one that went on with other weights
        (which,) = weights
        truth = self._truth[which, prompt, length]
        if end == "answered" and text != truth:
            return "a wrong answer"
        if end in ("aborted", "left") and not truth.startswith(text.rstrip("\ufffd")):
            return "the beginning of a wrong answer"
        return None


def _state_of(world: World) -> str:
    """What the server says of itself, for whoever looks into a hang."""
    try:
        found = httpx2.get(f"{world.url}/state", timeout=5).json()
        return f"server {found['status']}, {found['state']}, {found['stats']}"
    except (httpx2.HTTPError, OSError, ValueError) as error:
        return f"no state: {type(error).__name__}"


def _outcome(status: int, answer: dict[str, Any]) -> tuple[str, str]:
    if status == 200:
        choice = answer["choices"][0]
        return ("aborted" if choice["finish_reason"] == "abort" else "answered"), choice["text"]
    error = answer["error"]
    if not error["message"] or not error["type"]:
        raise ValueError(f"an error without message or type: {answer}")
    kind = "bug" if status == 500 else "refused"
    return f"{kind}: {status} {error['type']}" + (f" {error['message']}" if kind == "bug" else ""), ""


def control(world: World, route: str, **query: Any) -> httpx2.Response:
    """One control call."""
    return httpx2.post(
        f"{world.url}{route}", params=query, headers={"Authorization": f"Bearer {KEY}"}, timeout=ANSWER_S
    )
