"""A core over rank processes that fail where they are told to."""

import signal
import time
from pathlib import Path

from core_harness import CoreHarness
from faulty_rank import plan_fault

from shuteye.calls import WakeCall

LAYOUTS = {"TP 2": (2, 1), "PP 2": (1, 2), "TP 2 x PP 2": (2, 2)}


class RankHarness(CoreHarness):
    """A core over rank processes that fail where they are told to."""

    faults: Path

    def plan_fault(self, rank, *lines):
        plan_fault(self.faults, rank, *lines)

    @property
    def executor(self):
        return self.core._executor

    def pid(self, rank):
        return self.executor._processes[rank].process.pid

    def kill(self, rank, number=signal.SIGKILL):
        self.executor._processes[rank].process.send_signal(number)  # nothing, if it has ended

    def wait_for_fault(self, within_s=1.0):
        """What the state says of it; the loop would be woken, here somebody steps."""
        deadline = time.monotonic() + within_s
        while self.core.state.faulted is None:
            assert time.monotonic() < deadline, "nobody has noticed"
            time.sleep(0.005)
            self.step()
        return self.core.state.faulted

    def wake(self):
        """Awake from whatever there is, no fault is left planned; what the wake reported."""
        for rank in range(self.executor.num_ranks):
            self.plan_fault(rank)
        report = self.call(WakeCall())
        assert self.core.state.gate == "open"
        return report
