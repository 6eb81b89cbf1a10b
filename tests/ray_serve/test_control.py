"""The control and its followers in one event loop: every replica carries every call out, or is named."""

import asyncio
import contextlib
import functools

import pytest

from shuteye.calls import PauseCall, ReloadCall, SleepCall, WakeCall
from shuteye.errors import (
    EngineNotReady,
    InternalError,
    InvalidRequest,
    ReplicasFailed,
    SleepFailed,
    TransitionConflict,
)
from shuteye.ray import control as control_module
from shuteye.ray.control import Look, SleepControl
from shuteye.ray.follower import Follower
from shuteye.ray.wanted import AWAKE, Wanted

ASLEEP = ("weights", "kv_cache")


class Machine:
    """What a replica's engine would do: remembers calls, and fails or waits as it is told."""

    def __init__(self):
        self.calls, self.error, self.gate, self.busy = [], None, None, 0

    async def apply(self, call):
        if isinstance(call, Look):
            return b'{"is_sleeping": false, "is_paused": false}'
        assert self.busy == 0, "two calls at once"
        self.busy += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.error is not None:
                raise self.error
            self.calls.append(call)
        finally:
            self.busy -= 1


class Link:
    """The control, called directly; `cut` is a network or an actor that is away."""

    def __init__(self, control):
        self.control, self.cut = control, False

    def __getattr__(self, verb):
        async def ask(*arguments):
            if self.cut:
                raise ConnectionError("cut")
            return await getattr(self.control, verb)(*arguments)

        return ask


class Fleet:
    """A control and followers by name."""

    def __init__(self):
        self.control = SleepControl(lease_s=0.5)
        self.links, self.machines, self.followers = {}, {}, {}

    async def add(self, name):
        self.links[name], self.machines[name] = Link(self.control), Machine()
        self.followers[name] = Follower(name, self.links[name], self.machines[name].apply)
        await self.followers[name].start()
        return self.machines[name]

    async def close(self):
        for name in self.followers:
            self.links[name].cut = False
            await self.followers[name].stop()

    def kill(self, name):
        """As SIGKILL: it says nothing any more."""
        self.links[name].cut = True


def scenario(test):
    """A coroutine as a test, with a fleet that is closed afterwards; quick polls, so that nobody waits."""

    @functools.wraps(test)
    def run(monkeypatch):
        for name in ("POLL_S", "LOOK_S"):
            monkeypatch.setattr(control_module, name, 0.05)
        monkeypatch.setattr("shuteye.ray.follower.AGAIN_S", 0.05)

        async def bounded():
            fleet = Fleet()
            try:
                async with asyncio.timeout(10):
                    await test(fleet)
            finally:
                await fleet.close()

        asyncio.run(bounded())

    del run.__wrapped__  # pytest would look for the fixtures of what is wrapped
    return run


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


@scenario
async def test_every_replica_carries_a_call_out(fleet):
    machines = [await fleet.add("a"), await fleet.add("b")]
    report = await fleet.control.sleep(level=2)
    assert [machine.calls for machine in machines] == [[SleepCall(2)], [SleepCall(2)]]
    assert sorted(outcome.replica for outcome in report.outcomes) == ["a", "b"]
    assert (report.wanted.asleep, report.wanted.level) == (ASLEEP, 2)


@scenario
async def test_a_replica_that_fails_is_named_and_the_next_call_reaches_it(fleet):
    good, bad = await fleet.add("good"), await fleet.add("bad")
    bad.error = SleepFailed("no room on this disk")
    with pytest.raises(ReplicasFailed, match=r"1 of 2 .*replica bad: SleepFailed: no room on this disk"):
        await fleet.control.sleep()
    bad.error = None
    await fleet.control.sleep()
    assert (good.calls, bad.calls) == ([SleepCall(), SleepCall()], [SleepCall()])


@scenario
async def test_a_bug_in_a_replica_is_an_answer_too(fleet):
    machine = await fleet.add("a")
    machine.error = ZeroDivisionError("oops")
    with pytest.raises(ReplicasFailed, match="replica a: InternalError: The call to sleep failed: ZeroDivisionError"):
        await fleet.control.sleep()


@scenario
async def test_a_replica_added_later_comes_up_as_is_wanted(fleet):
    await fleet.add("a")
    await fleet.control.sleep(level=2)
    later = await fleet.add("later")
    assert later.calls == [SleepCall(2, tags=ASLEEP)]
    await fleet.control.wake_up()
    assert later.calls[1:] == [WakeCall()]
    assert (await fleet.add("last")).calls == []


@scenario
async def test_what_nobody_did_is_not_wanted(fleet):
    machine = await fleet.add("a")
    machine.error = TransitionConflict("not now")
    with pytest.raises(TransitionConflict, match="not now"):
        await fleet.control.sleep()
    assert (await fleet.add("b")).calls == []


@scenario
async def test_what_one_did_is_wanted_of_all(fleet):
    await fleet.add("a")
    (await fleet.add("b")).error = InternalError("bug")
    with pytest.raises(ReplicasFailed):
        await fleet.control.sleep()
    assert (await fleet.add("c")).calls == [SleepCall(tags=ASLEEP)]


@scenario
async def test_without_replicas_a_call_is_noted_but_no_success(fleet):
    with pytest.raises(EngineNotReady, match="those that start will come up so"):
        await fleet.control.sleep()
    assert (await fleet.add("a")).calls == [SleepCall(tags=ASLEEP)]


@scenario
async def test_calls_are_carried_out_one_after_the_other(fleet):
    """Two clients at once: some replicas asleep and some awake, each client with its 200."""
    machines = [await fleet.add(name) for name in "abc"]
    calls = (SleepCall(), WakeCall(), SleepCall(2), PauseCall())
    await asyncio.gather(*(fleet.control.carry_out(call) for call in calls))
    assert [machine.calls for machine in machines] == [list(calls)] * 3


@scenario
async def test_who_starts_during_a_call_waits_for_what_it_leads_to(fleet):
    first = await fleet.add("a")
    first.gate = asyncio.Event()
    sleeping = asyncio.create_task(fleet.control.sleep())
    await until(lambda: first.busy)
    starting = asyncio.create_task(fleet.add("b"))
    await asyncio.sleep(0.2)
    assert not starting.done()
    first.gate.set()
    await sleeping
    assert (await starting).calls == [SleepCall(tags=ASLEEP)]


@scenario
async def test_a_caller_that_goes_leaves_no_call_half_done(fleet):
    machine = await fleet.add("a")
    machine.gate = asyncio.Event()
    calling = asyncio.create_task(fleet.control.sleep())
    await until(lambda: machine.busy)
    calling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await calling
    machine.gate.set()
    await until(lambda: machine.calls == [SleepCall()])
    assert (await fleet.add("b")).calls == [SleepCall(tags=ASLEEP)]


@scenario
async def test_a_killed_replica_is_named_within_its_lease_and_then_forgotten(fleet):
    await fleet.add("a")
    await fleet.add("dead")
    fleet.kill("dead")
    with pytest.raises(
        ReplicasFailed, match=r"replica dead: EngineDead: The replica has given no sign of life for 0\.5 s"
    ):
        await fleet.control.sleep()
    assert [outcome.replica for outcome in (await fleet.control.wake_up()).outcomes] == ["a"]


@scenario
async def test_a_replica_that_ends_as_it_should_is_forgotten_at_once(fleet):
    await fleet.add("a")
    await fleet.add("b")
    await fleet.followers["b"].stop()
    assert [outcome.replica for outcome in (await fleet.control.sleep()).outcomes] == ["a"]


@scenario
async def test_a_replica_that_was_away_catches_up(fleet):
    await fleet.add("a")
    away = await fleet.add("away")
    fleet.kill("away")
    with pytest.raises(ReplicasFailed, match="replica away"):
        await fleet.control.sleep()
    fleet.links["away"].cut = False
    await until(lambda: away.calls == [SleepCall(tags=ASLEEP)])


@scenario
async def test_a_replica_that_cannot_catch_up_says_that_it_must_be_replaced(fleet):
    await fleet.add("a")
    away = await fleet.add("away")
    fleet.kill("away")
    away.error = SleepFailed("no room")
    with pytest.raises(ReplicasFailed):
        await fleet.control.sleep()
    fleet.links["away"].cut = False
    await until(lambda: fleet.followers["away"].failure is not None)
    assert "no room" in str(fleet.followers["away"].failure)


@scenario
async def test_a_control_that_was_restarted_learns_what_is_wanted(fleet):
    """A control actor that dies forgets that the application sleeps, and wakes replicas that start."""
    machine = await fleet.add("a")
    await fleet.control.sleep()
    fleet.links["a"].control = fleet.control = SleepControl(lease_s=0.5)
    await until(lambda: fleet.control._members)
    assert (await fleet.add("b")).calls == [SleepCall(tags=ASLEEP)]
    assert machine.calls == [SleepCall()], "it was there already"


@scenario
async def test_who_joins_a_restarted_control_too_early_is_told_later(fleet):
    await fleet.add("a")
    await fleet.control.sleep()
    fleet.kill("a")
    fleet.links["a"].control = fleet.control = SleepControl(lease_s=0.5)
    early = await fleet.add("early")
    assert early.calls == []
    fleet.links["a"].cut = False
    await until(lambda: early.calls == [SleepCall(tags=ASLEEP)])


@scenario
async def test_a_late_answer_is_a_failure_and_says_so(fleet):
    fleet.control._call_timeout_s = 0.3
    machine = await fleet.add("late")
    machine.gate = asyncio.Event()
    with pytest.raises(ReplicasFailed, match=r"replica late: EngineHung: .*not answered for 0\.3 s; it may still"):
        await fleet.control.sleep()
    waking = asyncio.create_task(fleet.control.wake_up())
    await asyncio.sleep(0.1)
    machine.gate.set()
    await waking
    assert machine.calls == [SleepCall(), WakeCall()], "not at once, and in their order"


@scenario
async def test_looks_do_not_wait_for_calls(fleet):
    machine = await fleet.add("a")
    machine.gate = asyncio.Event()
    sleeping = asyncio.create_task(fleet.control.sleep())
    await until(lambda: machine.busy)
    assert set((await fleet.control.look()).states) == {"a"}
    assert await fleet.control.is_sleeping() is False
    machine.gate.set()
    await sleeping


@scenario
async def test_a_replica_is_not_seen_before_it_is_what_is_wanted(fleet):
    """Awake among sleepers, to whoever looks while it comes up."""
    fleet.control._wanted = Wanted(ASLEEP, 1, revision=1)
    machine = Machine()
    machine.gate = asyncio.Event()
    follower = Follower("a", Link(fleet.control), machine.apply)
    starting = asyncio.create_task(follower.start())
    await until(lambda: machine.busy)
    looking = asyncio.create_task(fleet.control.look())
    await asyncio.sleep(0.2)
    assert not looking.done()
    machine.gate.set()
    await starting
    assert set((await looking).states) == {"a"}
    await follower.stop()


@scenario
async def test_a_start_that_cannot_reach_what_is_wanted_fails(fleet):
    """A replica that Ray Serve sends requests to, awake among sleepers."""
    fleet.control._wanted = Wanted(ASLEEP, 1, revision=1)
    follower = Follower("a", Link(fleet.control), _failing)
    with pytest.raises(SleepFailed, match="no room"):
        await follower.start()
    await follower.stop()


async def _failing(_call):
    raise SleepFailed("no room")


@scenario
async def test_what_is_no_call_for_all_is_refused(fleet):
    with pytest.raises(InvalidRequest, match="pause, reset_prefix_cache, resume, sleep, wake_up; not ReloadCall"):
        await fleet.control.carry_out(ReloadCall())
    with pytest.raises(InvalidRequest, match="level must be 0, 1 or 2"):
        await fleet.control.sleep(level=3)
    assert fleet.control._wanted == AWAKE
