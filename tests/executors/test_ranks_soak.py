"""Ranks under a random schedule of sleeps, wakes, updates, requests and every class of fault: `make soak-ranks`.

$SHUTEYE_SOAK_S is how long each layout is tried, in seconds.
"""

import os
import random
import signal
import time
from dataclasses import replace

import pytest
from rank_harness import LAYOUTS
from safetensors.torch import save_file

from shuteye.calls import ReloadCall, SleepCall, UpdateFromFileCall, WakeCall
from shuteye.errors import ShuteyeError
from shuteye.tasks.generate.requests import SamplingParams

SOAK_S = float(os.environ.get("SHUTEYE_SOAK_S", "20"))
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS = [(number, 5, 300, 9, 11, 60 + number) for number in range(3, 8)]
VERBS = (
    *("execute", "estimate_sleep", "save", "abort_save", "release", "finish_release", "residual_bytes"),
    *("estimate_wake", "restore", "undo_restore", "verify", "canary_agrees", "weights_source", "states"),
    *("check_update", "update_weights_from_file", "reload_weights"),
    *("start", "allocate_kv_cache", "join", "reset"),
)


class Soak:
    """One layout's schedule; `weights` is what the next tokens must come from, None if that cannot be known."""

    def __init__(self, ranks, seed, files):
        self.ranks, self.files = ranks, files
        self.random = random.Random(seed)
        self.expected = {}
        self.weights = "image"
        self.streams = {}  # request id → prompt and weights
        self.log = []

    def learn(self):
        for name, path in self.files.items():
            self.ranks.call(UpdateFromFileCall(str(path)) if path else ReloadCall())
            self.expected[name] = [self.ranks.generate(prompt, PARAMS) for prompt in PROMPTS]
        self.ranks.call(ReloadCall())

    def note(self, *what):
        self.log.append(what)

    def stream(self):
        if len(self.ranks.tokens) - len(self.ranks.ended) < 5:
            name, prompt = f"stream-{len(self.ranks.tokens)}", self.random.randrange(len(PROMPTS))
            self.streams[name] = prompt, self.weights
            self.ranks.add(name, PROMPTS[prompt], PARAMS)
        for _ in range(self.random.randrange(1, 12)):
            self.ranks.step()

    def call(self, call, weights):
        """A call that may fail; `weights` after it, if it does not."""
        unfinished = [name for name in self.streams if name not in self.ranks.ended]
        if weights != self.weights:
            self.forget_weights(unfinished)
        try:
            self.ranks.call(call)
            self.weights = weights
            self.note(call, "done")
            if isinstance(call, WakeCall) and self.weights != "image" and not self.is_updated():
                self.weights = "image"  # a rank has died with the update
                self.forget_weights(unfinished)
        except ShuteyeError as error:
            self.note(call, type(error).__name__, error.message)

    def forget_weights(self, names):
        """Their tokens are of both."""
        for name in names:
            self.streams[name] = self.streams[name][0], None

    def is_updated(self):
        return any(
            "+" in found for found in self.ranks.executor.outcomes("weights_source").values() if isinstance(found, str)
        )

    def fault(self):
        rank = self.random.randrange(self.ranks.executor.num_ranks)
        how = self.random.choice(["error", "bug", "late", "full", "kill", "kill now", "stop", "stop now", "hang"])
        verb = self.random.choice(VERBS)
        self.note(rank, verb, how)
        match how:
            case "kill now":
                self.ranks.kill(rank)
            case "stop now":
                self.ranks.kill(rank, signal.SIGSTOP)
            case _:
                self.ranks.plan_fault(rank, f"{verb} {how}")

    def recover(self):
        """However things are, a few wakes bring all back, and then every token is right."""
        for rank in range(self.ranks.executor.num_ranks):
            self.ranks.plan_fault(rank)
        for _ in range(4):
            if self.ranks.core.state.missing:
                self.call(ReloadCall(), "image")
            self.call(WakeCall(), self.weights)
            sources = {*self.ranks.executor.outcomes("weights_source").values()}  # finds one that is stopped, as well
            self.ranks.step()
            if self.ranks.core.state.gate == "open":
                break
        assert self.ranks.core.state.gate == "open", self.ranks.core.state
        self.ranks.run()
        (source,) = sources
        if "+" not in source:
            self.weights = "image"
        prompt = self.random.randrange(len(PROMPTS))
        found = self.ranks.generate(PROMPTS[prompt], PARAMS)
        served = [name for name, tokens in self.expected.items() if tokens[prompt] == found]
        assert served, "tokens of no weights there are"
        assert self.weights in served or "+" in source, (self.weights, served, source)
        self.weights = served[0]
        for name, (number, weights) in self.streams.items():
            ended = self.ranks.ended[name]
            if weights is not None and not isinstance(ended, ShuteyeError) and ended == "length":
                ours = self.expected[weights][number]
                assert self.ranks.tokens[name] == ours, (name, weights)
        self.streams.clear()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_schedule_of_faults_gives_a_wrong_token_or_a_hang(open_ranks, layout, tmp_path):
    """Would catch whatever nobody has thought of."""
    from transformers import AutoModelForCausalLM

    ranks = open_ranks(layout)
    state = AutoModelForCausalLM.from_pretrained(ranks.core.config.model).state_dict()
    save_file({name: tensor.neg() for name, tensor in state.items() if "lm_head" not in name}, tmp_path / "new")
    seed = int(os.environ.get("SHUTEYE_SOAK_SEED", random.randrange(1 << 30)))
    soak = Soak(ranks, seed, {"updated": tmp_path / "new", "image": None})
    soak.learn()
    ranks.executor._config = replace(ranks.executor._config, rank_timeout_s=3.0, step_timeout_s=6.0)
    deadline = time.monotonic() + SOAK_S
    try:
        while time.monotonic() < deadline:
            match soak.random.randrange(12):
                case 0 | 1:
                    soak.call(SleepCall(1, mode=soak.random.choice(["keep", "abort"])), soak.weights)
                case 2:
                    soak.call(SleepCall(2, mode="keep"), "image")
                case 3 | 4:
                    soak.call(WakeCall(soak.random.choice([None, None, ["weights"], ["kv_cache"]])), soak.weights)
                case 5:
                    soak.call(UpdateFromFileCall(str(tmp_path / "new")), "updated")
                case 6:
                    soak.call(ReloadCall(), "image")
                case 7:
                    soak.fault()
                case 8:
                    soak.recover()
                case _:
                    soak.stream()
        soak.recover()
    except BaseException:
        print(f"SHUTEYE_SOAK_SEED={seed}", *soak.log[-25:], sep="\n")
        raise
    finally:
        for rank in range(ranks.executor.num_ranks):
            ranks.kill(rank, signal.SIGCONT)
        ranks.executor.close()
