"""The transaction table of ranks, cell by cell: what follows when a rank errs, dies or is late in each step.

`helpers/rank_table.py` has the cells. With two requests in flight, whose fate is told, and from wherever a cell ends,
one wake brings everything back.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from rank_harness import LAYOUTS
from rank_table import CELLS, DEADLINE_S, START_S
from safetensors.torch import save_file

from shuteye.calls import ReloadCall, SleepCall, UpdateFromFileCall, WakeCall
from shuteye.errors import EngineFaulted, ShuteyeError
from shuteye.executors import multiproc
from shuteye.tasks.generate.requests import SamplingParams

PROMPT = (5, 300, 9, 11, 60)
IN_FLIGHT = ((6, 5, 300, 9, 11), (90, 91, 92))
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SOON_S = 10.0
"""Far less than the deadlines of the config, by which a rank that waits for another one would show."""

ALIKE = ("hang", "late", "bug")
"""What follows is what follows of being stopped, or of an error."""


def each_rank():
    """Every third way to fail, on a rank of TP 2 in turn, in each run; all that there are, everywhere, in slow ones."""
    for number, (row, cell) in enumerate(CELLS):
        for layout, (tp_size, pp_size) in LAYOUTS.items():
            for rank in range(tp_size * pp_size):
                takes_long = cell.how in ALIKE or (row.verb == "start" and cell.how == "stop")
                in_turn = number % 3 == 0 and rank == number % 2
                quick = layout == "TP 2" and in_turn and not takes_long
                yield pytest.param(
                    *(layout, row, cell, rank),
                    id=f"{layout}-{row.step}-{cell.how}-rank {rank}",
                    marks=() if quick else pytest.mark.slow,
                )


class Trial:
    """One cell, on the ranks of a layout; whoever takes them finds them awake with the image's weights."""

    def __init__(self, ranks, row, cell, rank):
        self.ranks, self.row, self.cell, self.rank = ranks, row, cell, rank
        self.num_ranks = ranks.executor.num_ranks
        self.error = None

    @property
    def says(self):
        return self.cell.says.format(rank=self.rank, verb=self.row.verb)

    def begin(self):
        """Bring everything to where the step is, with requests in flight."""
        self.pids = [self.ranks.pid(rank) for rank in range(self.num_ranks)]
        self.streams = [f"stream-{len(self.ranks.tokens)}-{number}" for number in range(len(IN_FLIGHT))]
        for name, prompt in zip(self.streams, IN_FLIGHT, strict=True):
            self.ranks.add(name, prompt, PARAMS)
        for _ in range(3):
            self.ranks.step()
        if self.row.begin == "asleep":
            self.ranks.call(SleepCall(1, mode="keep"))
        if self.row.begin == "without a rank":
            self.ranks.kill(self.rank if self.row.dead else self.other)
            self.ranks.wait_for_fault()

    @property
    def other(self):
        return (self.rank + 1) % self.num_ranks

    def plan(self):
        if self.row.deed == "sleep":
            states = self.ranks.executor.call("states")
            self.resident = sum(tag.resident_bytes for of_rank in states for tag in of_rank)
        self.ranks.plan_fault(self.rank, *self.row.after, f"{self.row.verb} {self.cell.how}")
        if self.row.others:
            self.ranks.plan_fault(self.other, *self.row.others)

    def shorten_deadlines(self, patch):
        """Of a rank that is late; and let requests wake the model, if the first step after that is what fails."""
        ranks, deadlines = self.ranks, {"rank_timeout_s": DEADLINE_S}
        if self.row.verb in multiproc._LONG_VERBS:
            deadlines["step_timeout_s"] = DEADLINE_S
        if self.row.verb == "start":
            deadlines["step_timeout_s"] = START_S
        if self.cell.how in ("stop", "hang"):
            patch.setattr(ranks.executor, "_config", replace(ranks.executor._config, **deadlines))
            patch.setattr(multiproc, "_GRACE_S", 0.3)
        if self.row.deed == "first step":
            patch.setattr(ranks.core, "config", replace(ranks.core.config, on_sleeping_request="wake"))

    def act(self, update):
        """The call, or the request, during which the rank fails."""
        match self.row.deed:
            case "sleep":
                self.call(SleepCall(1, mode="keep"))
            case "wake":
                self.call(WakeCall())
            case "update":
                self.call(UpdateFromFileCall(str(update)))
            case "reload":
                self.call(ReloadCall())
            case "step" | "first step":
                self.ask()

    def call(self, call):
        try:
            report = self.ranks.call(call)
            assert not isinstance(call, SleepCall) or report.freed_bytes == self.resident, "bytes were left out"
        except ShuteyeError as error:
            self.error = error

    def ask(self):
        """One more request, which wakes the model if that is asleep."""
        name = f"asked-{len(self.ranks.tokens)}"
        self.ranks.add(name, IN_FLIGHT[0], PARAMS)
        for _ in range(200):
            if self.ranks.core.state.faulted or name in self.ranks.ended:
                break
            self.ranks.step()
        self.ranks.step()  # what was told meanwhile
        ended = self.ranks.ended.get(name)
        if ended is None:  # kept, as those in flight
            self.streams.append(name)
        self.error = ended if isinstance(ended, ShuteyeError) else None

    def check_the_end(self):
        state = self.ranks.core.state
        assert type(self.error) is (self.cell.error or type(None)), self.error
        said = f"{self.error.message if self.error else ''} {state.faulted}"
        assert re.search(self.says, said), said
        resident = {tag.resident_bytes for tag in state.tags}
        match self.cell.end:
            case "awake":
                assert (state.gate, state.faulted, state.is_sleeping) == ("open", None, False)
            case "asleep":
                assert (state.gate, state.faulted, state.is_sleeping) == ("closed", None, True)
                assert resident == {0}, "a rank has memory that the others have given back"
            case "faulted":
                assert state.faulted
                self.check_the_fault()

    def check_the_fault(self):
        """Nothing is served, and nobody goes to sleep; of a rank that died, the others hold nothing for it."""
        name = f"refused-{len(self.ranks.tokens)}"
        self.ranks.add(name, PROMPT)
        self.ranks.step()
        assert isinstance(self.ranks.ended[name], EngineFaulted)
        with pytest.raises(EngineFaulted):
            self.ranks.call(SleepCall(1))
        lost = {failure.rank for failure in self.ranks.executor.failures()}
        if lost and (
            self.row.verb in ("release", "finish_release") or (self.row.begin, self.row.deed) == ("asleep", "wake")
        ):
            alive = [rank for rank in range(self.num_ranks) if rank not in lost]
            for states in self.ranks.executor.outcomes("states", ranks=alive).values():
                assert {tag.resident_bytes for tag in states} == {0}, "a survivor has not finished"

    def check_recovery(self, expected):
        """One wake, and all is as it was."""
        assert not self.ranks.wake().updates_lost, "there were none"
        assert not self.ranks.executor.failures()
        again = [rank for rank, pid in enumerate(self.pids) if pid != self.ranks.pid(rank)]
        may_be = {self.rank, self.other} if self.row.begin == "without a rank" else {self.rank}
        assert set(again) <= may_be, "a rank that only waited for another one was ended, too"
        assert (self.rank in again) == (self.row.dead or self.cell.how in ("kill", "stop", "hang"))
        assert len({*self.ranks.executor.call("weights_source")}) == 1
        self.ranks.run()
        for name, prompt in zip(self.streams, (*IN_FLIGHT, IN_FLIGHT[0]), strict=False):
            self.check_stream(name, expected[prompt])
        assert self.ranks.generate(PROMPT, PARAMS) == expected[PROMPT]

    def check_stream(self, name, expected):
        ended = self.ranks.ended[name]
        match self.cell.streams:
            case "served":
                assert (ended, self.ranks.tokens[name]) == ("length", expected)
            case "failed":
                assert isinstance(ended, ShuteyeError)
                assert self.ranks.tokens[name] == expected[: len(self.ranks.tokens[name])]


@pytest.fixture(scope="module")
def opened(open_ranks):
    """Ranks of the layout that was asked for last: more at a time would take too much memory."""
    kept = {}

    @contextmanager
    def of(layout):
        ranks = kept.pop(layout, None)
        for other in (*kept.values(),):
            other.executor.close()
        kept.clear()
        ranks = ranks or open_ranks(layout)
        try:
            yield ranks
        except BaseException:
            ranks.executor.close()  # what a cell that failed left is no place to begin the next one
            raise
        kept[layout] = ranks

    return of


@pytest.fixture
def expected(harness):
    """What one rank gives."""
    return {prompt: harness.generate(prompt, PARAMS) for prompt in (PROMPT, *IN_FLIGHT)}


@pytest.fixture(scope="module")
def update(tiny_checkpoint, tmp_path_factory):
    """Other weights."""
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).state_dict()
    path = tmp_path_factory.mktemp("update") / "new.safetensors"
    save_file({name: tensor.neg() for name, tensor in state.items() if name != "lm_head.weight"}, path)
    return path


@pytest.mark.parametrize(("layout", "row", "cell", "rank"), [*each_rank()])
def test_cell(opened, layout, row, cell, rank, *, expected, update, monkeypatch):
    """Would catch half a transition, a cause that nobody is told, a request that is lost, and a wait without an end."""
    with opened(layout) as ranks:
        trial = Trial(ranks, row, cell, rank)
        trial.begin()
        trial.plan()
        with monkeypatch.context() as patch:
            trial.shorten_deadlines(patch)
            began = time.monotonic()
            trial.act(update)
            assert time.monotonic() - began < SOON_S
        trial.check_the_end()
        trial.check_recovery(expected)
