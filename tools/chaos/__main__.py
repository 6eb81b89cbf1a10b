"""Breaks a server in every way that is known here while 16 streams run, and says what it did wrong. `make chaos`.

    python tools/chaos [--minutes 10] [--seed N] [--only EVENT …] [--keep]

A promise that is not kept ends the run with status 1, the seed and the server's log. Needs root (a small tmpfs is
mounted) and a C compiler (a clock that jumps); everything else it makes lies in one temporary directory.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import faults
import httpx2
from events import EVENTS, Stage, bring_awake
from load import LENGTHS, PROMPTS, History, Load, Truth, ask, learn
from operator_calls import Operator
from world import Violation, World

FAULTS_SHARE = 0.15
"""Of the time: without processes, on memory that fails."""

PAUSE_S = (0.5, 4.0)
MAX_SHOWN = 20


def main() -> int:
    """Run; 0 if every promise was kept."""
    arguments = parse()
    directory = Path(tempfile.mkdtemp(prefix="shuteye-chaos-"))
    print(f"chaos: {arguments.minutes:g} minutes, seed {arguments.seed}, in {directory}", flush=True)
    checkpoint, update = make_model(directory)
    violations: list[str] = []
    if not arguments.only:
        seconds = arguments.minutes * 60 * FAULTS_SHARE
        ends, violations = faults.run(checkpoint, directory / "faults", seconds=seconds, seed=arguments.seed)
        say("memory that fails", ends)
    world = World(directory, checkpoint)
    try:
        violations += break_server(world, update, arguments)
    except Violation as violation:
        violations.append(str(violation))
    finally:
        world.close()
    for violation in violations[:MAX_SHOWN]:
        print(f"VIOLATION: {violation}")
    if violations:
        print(
            f"{len(violations)} promises were not kept; again: --seed {arguments.seed}; the server's log: {world.log}"
        )
        return 1
    if not arguments.keep:
        shutil.rmtree(directory)
    print("Every request ended in an answer or a clear error, nothing was left behind, and all answers were right.")
    return 0


def parse() -> argparse.Namespace:
    """What the caller wants."""
    parser = argparse.ArgumentParser(prog="tools/chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="repeats the order of events")
    parser.add_argument("--only", nargs="+", choices=[event.__name__ for event in EVENTS], help="only these events")
    parser.add_argument("--keep", action="store_true", help="keep the server's log even if all went well")
    return parser.parse_args()


def make_model(directory: Path) -> tuple[Path, Path]:
    """A tiny checkpoint, and a file of weights that make other values: a stale cache shows in the text."""
    from safetensors.torch import load_file, save_file

    from shuteye.testing import tiny_model

    checkpoint = tiny_model(directory / "model")
    tensors = load_file(checkpoint / "model.safetensors")
    update = directory / "update.safetensors"
    save_file({name: -tensor for name, tensor in tensors.items() if "v_proj" in name}, update)
    return checkpoint, update


def break_server(world: World, update: Path, arguments: argparse.Namespace) -> list[str]:
    """Start a server, learn what it should say, then break it until the time is over."""
    rng, history, truth = random.Random(arguments.seed), History(), Truth()
    operator, load = Operator(world, history, update, arguments.seed), Load(world, truth, history, arguments.seed)
    stage = Stage(world, history, operator, rng)
    stage.start()
    learn(world, "image", truth)
    operator.update()
    learn(world, "updated", truth)
    operator.reload()
    if all(truth["image", prompt, 48] == truth["updated", prompt, 48] for prompt in PROMPTS):
        raise Violation("the two sets of weights say the same: nothing could be noticed")
    history.spans[:] = [(0.0, frozenset({"image"}))]
    load.start()
    operator.start()
    happened: Counter[str] = Counter()
    events = [event for event in EVENTS if not arguments.only or event.__name__ in arguments.only]
    end = time.monotonic() + arguments.minutes * 60 * (1 if arguments.only else 1 - FAULTS_SHARE)
    violations: list[str] = []
    try:
        while time.monotonic() < end and not (load.violations or operator.violations):
            for event in rng.sample(events, len(events)):
                time.sleep(rng.uniform(*PAUSE_S))
                begin = time.monotonic()
                event(stage)
                require_right_answers(stage, truth)
                happened[event.__name__] += 1
                print(f"  {event.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
                if time.monotonic() > end or load.violations or operator.violations:
                    break
    except (Violation, httpx2.HTTPError) as violation:
        violations.append(f"{event.__name__}: {type(violation).__name__}: {violation}")
    operator.stop()
    load.stop()
    say("events", happened)
    say("requests", load.ends)
    say("control calls", operator.answers)
    violations += [*load.violations, *operator.violations]
    if not violations:
        world.end_server()
    return violations


def require_right_answers(stage: Stage, truth: Truth) -> None:
    """Awake again, the server says what it said at first.

    Raises:
        Violation: it does not.
    """
    with stage.operator.held():
        bring_awake(stage)
        if stage.operator.reload().status_code != 200:
            raise Violation("the image cannot be loaded again")
        for prompt in stage.rng.sample(PROMPTS, 3):
            length = stage.rng.choice(LENGTHS)
            found = ask(stage.world, prompt, length)
            if found != truth["image", prompt, length]:
                raise Violation(f"a wrong answer afterwards: {found!r}, expected {truth['image', prompt, length]!r}")


def say(what: str, counts: Counter[str]) -> None:
    """One line."""
    print(f"{what}: " + (", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"), flush=True)


if __name__ == "__main__":
    sys.exit(main())
