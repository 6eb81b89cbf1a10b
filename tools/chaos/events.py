"""What is done to the server, one event at a time; each says what must hold right after it.

Knows nothing of the requests that are under way meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2
from load import History, control
from operator_calls import Operator
from world import HANG_S, Violation, World, wait_for

RECOVERY_S = 60.0
POLICIES = ("reject", "hold", "wake")
HOUR_S = 3600


@dataclass
class Stage:
    """Where events happen."""

    world: World
    history: History
    operator: Operator
    rng: random.Random

    def start(self) -> None:
        """A new server with any policy; it has the image's weights."""
        flags = ["--on-sleeping-request", self.rng.choice(POLICIES), "--hold-timeout-s", "5"]
        self.world.start(*flags, "--verify-wake", self.rng.choice(("sample", "full")))
        self.history.now("image")

    def signal_engine(self, number: signal.Signals) -> int | None:
        """Send a signal to the engine process, if there is one; its id."""
        pid = self.world.engine_pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pid


def kill_engine(stage: Stage) -> None:
    """SIGKILL of the engine process: another one takes its place by itself."""
    with stage.operator.held(), stage.history.outage():
        old = stage.signal_engine(signal.SIGKILL)
        wait_for(lambda: stage.world.engine_pid not in (None, old), "a new engine process", RECOVERY_S)
        wait_for(lambda: stage.world.health() == 200, "/health 200 after the engine was killed", RECOVERY_S)
        stage.history.now("image")


def stop_engine_for_a_moment(stage: Stage) -> None:
    """SIGSTOP for less than the hang timeout: everybody just waits."""
    pid = stage.signal_engine(signal.SIGSTOP)
    time.sleep(stage.rng.uniform(0.1, HANG_S / 3))
    stage.signal_engine(signal.SIGCONT)
    if stage.world.engine_pid != pid:
        raise Violation("an engine that stopped for a moment was replaced")


def hang_engine(stage: Stage) -> None:
    """SIGSTOP for good: /health says so, and a restart helps."""
    with stage.operator.held(), stage.history.outage():
        old = stage.signal_engine(signal.SIGSTOP)
        wait_for(lambda: stage.world.health() == 503, "/health 503 of a hung engine", HANG_S + 20)
        answer = control(stage.world, "/restart_engine")
        if answer.status_code != 200:
            raise Violation(f"/restart_engine answered {answer.status_code}: {answer.text}")
        wait_for(lambda: stage.world.health() == 200, "/health 200 after a restart", RECOVERY_S)
        if old in stage.world.processes():
            raise Violation("the hung engine is still there")
        stage.history.now("image")


def kill_server(stage: Stage) -> None:
    """SIGKILL of the server: its engine goes too, and nothing is left."""
    with stage.operator.held(), stage.history.outage():
        stage.world.kill_server()
        stage.start()


def stop_server_for_a_moment(stage: Stage) -> None:
    """SIGSTOP of the server, then SIGCONT."""
    server = stage.world.server
    assert server is not None
    server.send_signal(signal.SIGSTOP)
    time.sleep(stage.rng.uniform(0.1, 2 * HANG_S))
    server.send_signal(signal.SIGCONT)


def end_server(stage: Stage) -> None:
    """SIGTERM under load: a clean end."""
    with stage.operator.held(), stage.history.outage():
        stage.world.end_server()
        stage.start()


def run_out_of_disk(stage: Stage) -> None:
    """Written weights cannot be saved: the model stays awake and says so; with room again it sleeps."""
    with stage.operator.held():
        bring_awake(stage)
        control(stage.world, "/reload_weights")  # no spill file holds anything now
        stage.operator.update()
        with stage.world.full_disk():
            answer = control(stage.world, "/sleep", level=1, mode="keep")
            if answer.status_code == 200 or "error" not in answer.json():
                raise Violation(f"a sleep without room for what was written answered {answer.status_code}")
            if control(stage.world, "/wake_up").status_code != 200:
                raise Violation("after a sleep that failed the model is not awake")
        answer = control(stage.world, "/sleep", level=1, mode="keep")
        if answer.status_code != 200:
            raise Violation(f"with room again, a sleep answered {answer.status_code}: {answer.text}")
        bring_awake(stage)


def read_only_disk(stage: Stage) -> None:
    """The image is there, and nothing can be written: the server starts, sleeps and wakes."""
    with stage.operator.held(), stage.history.outage():
        stage.world.end_server()
        with stage.world.read_only_disk():
            stage.start()
            for route in ("/sleep", "/wake_up"):
                answer = control(stage.world, route)
                if answer.status_code != 200:
                    raise Violation(f"{route} with a read-only cache answered {answer.status_code}: {answer.text}")
            stage.world.end_server()
        stage.start()


def _break_image(stage: Stage, damage: Callable[[str], None]) -> None:
    with stage.operator.held(), stage.history.outage():
        bring_awake(stage)
        for path in stage.world.images:
            path.chmod(0o644)
            damage(str(path))
        time.sleep(stage.rng.uniform(0.0, 2.0))  # whoever is answered meanwhile is answered right, or refused
        control(stage.world, "/sleep", level=1, mode="abort")
        control(stage.world, "/wake_up")
        stage.world.kill_server()
        for path in stage.world.images:  # what `shuteye images rm` does
            path.parent.chmod(0o755)
            path.unlink()
        stage.start()


def truncate_image(stage: Stage) -> None:
    """The image is cut short under the mapping."""
    _break_image(stage, lambda path: os.truncate(path, 8192))


def overwrite_image(stage: Stage) -> None:
    """The image is written over in place."""

    def damage(path: str) -> None:
        with open(path, "r+b") as file:
            file.seek(4096)
            file.write(stage.rng.randbytes(65536))

    _break_image(stage, damage)


def let_the_clock_jump(stage: Stage) -> None:
    """The wall clock goes a day ahead, then an hour back: no deadline may depend on it."""
    for shift_s in (24 * HOUR_S, -HOUR_S, 0):
        stage.world.set_clock(shift_s)
        time.sleep(stage.rng.uniform(0.2, 1.0))


EVENTS: tuple[Callable[[Stage], None], ...] = (
    kill_engine,
    stop_engine_for_a_moment,
    hang_engine,
    kill_server,
    stop_server_for_a_moment,
    end_server,
    run_out_of_disk,
    read_only_disk,
    truncate_image,
    overwrite_image,
    let_the_clock_jump,
)


def bring_awake(stage: Stage) -> None:
    """Lift every pause and wake, as an operator would who has no idea what happened.

    Raises:
        Violation: that does not help.
    """
    deadline = time.monotonic() + RECOVERY_S
    while True:
        control(stage.world, "/wake_up")
        state = _state(stage)
        if any(tag["residency"] == "blank" for tag in state["tags"]):
            stage.operator.reload()
        control(stage.world, "/wake_up")
        control(stage.world, "/resume")
        if _state(stage)["gate"] == "open":
            return
        if time.monotonic() > deadline:
            raise Violation(f"the server does not wake: {_state(stage)}")
        time.sleep(0.2)


def _state(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = httpx2.get(f"{stage.world.url}/state", timeout=30).json()["state"]
    return found
