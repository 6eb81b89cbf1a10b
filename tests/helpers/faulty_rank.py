"""A rank process that fails where a test says so: in the file $FAULTS/RANK, one line "verb how" each; the first counts.

how     error    the verb is refused before it does anything
        late     it is done, and then fails
        bug      an exception that is no error of ours
        full     the system has no memory for it
        wrong    it is done, and answers what cannot be true
        kill     the process is killed before it does anything
        stop     it is suspended before it does anything
        hang     it never does anything again, and does not end when told to
        slow     it takes two seconds more
        unproven the canary that goes with it finds other numbers than before
"""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from shuteye.errors import BackendFailure, MemoryExhausted
from shuteye.executors import rank as real
from shuteye.state import VerifyResult

WRONG = {
    "estimate_wake": lambda found: replace(found, available_bytes=found.needed_bytes),
    "verify": lambda _found: VerifyResult(1, (0,)),
    "canary_agrees": lambda _found: False,
    "states": lambda found: (replace(found[0], residency="discarded"), *found[1:]),
    "weights_source": lambda found: f"not-{found}",
}


def plan_fault(directory, rank, *lines):
    """Let a rank fail: each line "verb how" once, in this order."""
    path = Path(directory) / str(rank)
    path.with_suffix(".new").write_text("".join(f"{line}\n" for line in lines))
    path.with_suffix(".new").rename(path)


def _next_fault(rank, verb):
    path = Path(os.environ["FAULTS"]) / str(rank)
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines or lines[0].split()[0] != verb:
        return None
    plan_fault(path.parent, rank, *lines[1:])
    return lines[0].split()[1]


def _fail(how, verb):
    match how:
        case "error":
            raise BackendFailure(f"Injected into {verb}.")
        case "full":
            raise MemoryExhausted(f"Injected into {verb}.")
        case "bug":
            raise ValueError(f"Injected into {verb}.")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(60)
        case "slow":
            time.sleep(2)


def _record(rank, verb, began, worker):
    """Where `records` is, one line for each verb: when it began and ended, and where the arenas are."""
    directory = Path(os.environ["FAULTS"]) / "records"
    if directory.exists():
        residency, kv_cache = worker.residency, worker.residency._kv_cache
        arenas = [residency._weights_arena, *([kv_cache.arena] if kv_cache else [])]
        ranges = [(arena.address, arena.nbytes) for arena in arenas]
        with (directory / str(rank)).open("a") as file:
            file.write(json.dumps([verb, began, time.monotonic(), ranges]) + "\n")


def records(directory, num_ranks):
    """By rank, (verb, begin, end, arenas) of each verb since the last call of this, which begins to record them."""
    directory = Path(directory) / "records"
    directory.mkdir(exist_ok=True)
    found = []
    for rank in range(num_ranks):
        path = directory / str(rank)
        found.append([json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [])
        path.unlink(missing_ok=True)
    return found


class FaultyRank(real._Rank):
    """Looks into the file before each verb."""

    def __init__(self, start, membership):
        _fail(_next_fault(start.place.rank, "start"), "start")
        super().__init__(start, membership)

    def _do(self, verb, arguments):
        began = time.monotonic()
        try:
            return self._fail_or_do(verb, arguments)
        finally:
            _record(self._place.rank, verb, began, self._worker)

    def _fail_or_do(self, verb, arguments):
        how = _next_fault(self._place.rank, verb)
        _fail(how, verb)
        canary = self._worker._canary if how == "unproven" else None
        if canary is not None:
            canary.knows = lambda *_: False
        try:
            found = super()._do(verb, arguments)
        finally:
            if canary is not None:
                del canary.knows
        if how == "late":
            raise BackendFailure(f"Injected after {verb}.")
        return WRONG[verb](found) if how == "wrong" else found


if __name__ == "__main__":
    real._Rank = FaultyRank
    real.main()
