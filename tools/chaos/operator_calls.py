"""What an operator does all day, at random: sleeps, wakes, pauses and updates, every one of which must be answered.

Knows nothing of what is being broken meanwhile.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
from load import History, control
from world import KEY, World

MODES = ("abort", "wait", "keep")
TAGS = (None, ["weights"], ["kv_cache"], ["weights", "kv_cache"])
EXPECTED = frozenset({200, 400, 409, 503, 504})


class Operator:
    """A thread of control calls; `history` learns which weights may be in force.

    Args:
        update: a safetensors file whose weights are known as "updated".
    """

    def __init__(self, world: World, history: History, update: Path, seed: int) -> None:
        self._world, self._history, self._update = world, history, update
        self._key = {"Authorization": f"Bearer {KEY}"}
        self._rng = random.Random(f"{seed}/operator")
        self.answers: Counter[str] = Counter()
        self.violations: list[str] = []
        self._turn = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the call under way."""
        self._stopped.set()
        self._thread.join(120)
        if self._thread.is_alive():
            self.violations.append("a control call never ended")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No control calls but the caller's own."""
        with self._turn:
            yield

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                with self._turn:
                    self._call()
                time.sleep(self._rng.uniform(0.02, 0.4))
        except Exception as error:  # whatever it is, nothing sleeps or wakes from here on
            self.violations.append(f"the operator ended by a bug of this tool: {type(error).__name__}: {error}")
            raise

    def _call(self) -> None:
        rng = self._rng
        calls: list[tuple[int, Callable[[], httpx2.Response]]] = [
            (6, lambda: self._sleep(rng.choice((0, 1, 1, 2)))),
            (10, self.wake),
            (1, lambda: control(self._world, "/pause", mode=rng.choice(MODES), timeout=2)),
            (3, lambda: control(self._world, "/resume")),
            (1, lambda: control(self._world, "/reset_prefix_cache")),
            (2, self.update),
            (1, self.reload),
        ]
        call = rng.choices([each for _, each in calls], [weight for weight, _ in calls])[0]
        begin = time.monotonic()
        try:
            answer = call()
        except httpx2.TimeoutException:
            self.violations.append("a control call hung")
        except (httpx2.HTTPError, OSError):
            self.answers["connection lost"] += 1
            if not self._history.was_gone(begin - 1, time.monotonic()):
                self.violations.append("a control call lost its connection although the server was there")
        else:
            self.answers[str(answer.status_code)] += 1
            if answer.status_code not in EXPECTED:
                self.violations.append(f"a control call was answered {answer.status_code}: {answer.text[:300]}")

    # --- calls that change which weights are in force -------------------------------------------

    def _sleep(self, level: int) -> httpx2.Response:
        query: dict[str, Any] = {"level": level, "mode": self._rng.choice(MODES), "timeout": 2}
        if level and (tags := self._rng.choice(TAGS)):
            query["tags"] = tags
        if level == 2:
            self._history.now(*self._history.current, "image")
        return control(self._world, "/sleep", **query)

    def wake(self) -> httpx2.Response:
        """Wake everything up; from level 2 that loads the image."""
        return control(self._world, "/wake_up")

    def update(self) -> httpx2.Response:
        """Write the other weights; until that is known to have worked, either may be in force."""
        self._history.now(*self._history.current, "updated")
        answer = httpx2.post(
            f"{self._world.url}/update_weights", json={"path": str(self._update)}, headers=self._key, timeout=60
        )
        if answer.status_code == 200:
            self._history.now("updated")
        return answer

    def reload(self) -> httpx2.Response:
        """Load the image again."""
        self._history.now(*self._history.current, "image")
        answer = control(self._world, "/reload_weights")
        if answer.status_code == 200:
            self._history.now("image")
        return answer
