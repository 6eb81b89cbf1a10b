"""A failure at every step of every move, before and after it took effect: the old state, the new one, or a way back.

The steps are those that the backend recorded in a run without failure, so none can be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
from memory_harness import LEVEL_1, LEVEL_2, RELOAD, WAKE, World

from shuteye.errors import BackendFailure, EngineFaulted
from shuteye.memory.image import WeightImage
from shuteye.state import SleepPlan, TagReport, WakePlan

MakeWorld = Callable[..., World]


def awake(world: World) -> None:
    """Nothing to do."""


def changed(world: World) -> None:
    world.write(0, world.weight_bytes[0] ^ 0xFF)
    world.write(5000, world.weight_bytes[5000] ^ 0xFF)


def changed_again(world: World) -> None:
    changed(world)
    world.sleep(LEVEL_1)
    world.wake(WAKE)
    world.write(5001, world.weight_bytes[5001] ^ 0xFF)


def asleep(world: World) -> None:
    world.sleep(LEVEL_1)


def asleep_changed(world: World) -> None:
    changed(world)
    world.sleep(LEVEL_1)


def discarded(world: World) -> None:
    world.sleep(LEVEL_2)


def blank(world: World) -> None:
    world.sleep(LEVEL_2)
    world.wake(WakePlan("blank", "commit"))


def blank_written(world: World) -> None:
    blank(world)
    world.write_everything(9)


def with_other_image(world: World) -> None:
    discarded(world)
    world.residency.replace_image(WeightImage.open(world.other_image_path))


def saved(world: World) -> None:
    changed(world)
    world.residency.save(LEVEL_1)


def woken(world: World) -> None:
    asleep_changed(world)
    world.wake(WAKE)


@dataclass(frozen=True)
class Snapshot:
    """Everything a move may change and a caller can see. Bytes are None where touching them would crash."""

    where: dict[str, str]
    missing: tuple[str, ...]
    weights: bytes | None
    kv: bytes | None


def snapshot(world: World) -> Snapshot:
    where = world.where
    mapped = where["weights"] in ("resident", "blank")
    return Snapshot(
        where,
        world.residency.missing(),
        world.weight_bytes if mapped else None,
        world.bytes_of(world.kv) if where["kv_cache"] == "resident" else None,
    )


def failures(
    make_world: MakeWorld, prepare: Callable[[World], None], move: Callable[[World], object]
) -> Iterator[tuple[World, Snapshot]]:
    """A prepared world for every step of `move` and both sides of it, the failure waiting, and how it is before."""
    rehearsal = make_world()
    prepare(rehearsal)
    rehearsal.backend.clear()
    move(rehearsal)
    steps = list(rehearsal.backend.steps)
    assert steps, "a move without steps proves nothing"
    for step in range(len(steps)):
        for when in ("before", "after"):
            world = make_world()
            prepare(world)
            before = snapshot(world)
            world.backend.clear()
            world.backend.fail_at(step, when=when)
            yield world, before


def recover(world: World) -> bytes:
    """Reset, wake by whatever road is open, and give the weights."""
    world.backend.clear()
    world.residency.reset()
    states = world.residency.states()
    assert [state.resident_bytes for state in states] == [0, 0]
    world.wake(WAKE if world.where["weights"] == "offloaded" else RELOAD)
    assert world.where == {"weights": "resident", "kv_cache": "resident"}
    assert world.residency.verify("full").bad_extents == ()
    return world.weight_bytes


ALL_SLEEPS = [
    (awake, LEVEL_1),
    (changed, LEVEL_1),
    (changed_again, LEVEL_1),
    (blank_written, LEVEL_1),
    (changed, SleepPlan("offload", "keep")),
    (changed, SleepPlan("keep", "discard")),
    (changed, LEVEL_2),
    (blank, LEVEL_2),
]


@pytest.mark.parametrize(("prepare", "plan"), [case for case in ALL_SLEEPS if case[1].weights == "offload"])
def test_a_failed_save_leaves_it_awake_and_a_retry_works(make_world: MakeWorld, prepare, plan: SleepPlan) -> None:
    for world, before in failures(make_world, prepare, lambda world: world.residency.save(plan)):
        with pytest.raises(BackendFailure):
            world.residency.save(plan)
        assert snapshot(world) == before
        world.backend.clear()
        world.sleep(plan)
        world.wake(WAKE)
        assert world.weight_bytes == before.weights


@pytest.mark.parametrize(("prepare", "plan"), [case for case in ALL_SLEEPS if case[1].weights == "offload"])
def test_a_failed_estimate_changes_nothing(make_world: MakeWorld, prepare, plan: SleepPlan) -> None:
    for world, before in failures(make_world, prepare, lambda world: world.residency.estimate(plan)):
        with pytest.raises(BackendFailure):
            world.residency.estimate(plan)
        assert snapshot(world) == before


@pytest.mark.parametrize(("prepare", "plan"), ALL_SLEEPS)
def test_after_a_failed_release_a_reset_brings_every_byte_back(make_world: MakeWorld, prepare, plan: SleepPlan) -> None:
    def prepare_and_save(world: World) -> None:
        prepare(world)
        world.residency.save(plan)

    pristine = make_world().weight_bytes
    for world, before in failures(make_world, prepare_and_save, lambda world: world.residency.release(plan)):
        with pytest.raises(BackendFailure):
            world.residency.release(plan)
        # Changes that were never saved are lost when a plan that keeps them fails: then the image's own come back.
        kept = before.weights if plan.weights == "offload" else pristine
        assert recover(world) == kept


ALL_WAKES = [
    (asleep, WAKE),
    (asleep_changed, WAKE),
    (asleep_changed, WakePlan("restore", "keep")),
    (asleep_changed, WakePlan("keep", "commit")),
    (asleep_changed, RELOAD),
    (discarded, RELOAD),
    (discarded, WakePlan("blank", "keep")),
    (discarded, WakePlan("blank", "commit")),
    (with_other_image, RELOAD),
]


@pytest.mark.parametrize(("prepare", "plan"), ALL_WAKES)
def test_a_failed_wake_leaves_it_asleep_and_a_retry_works(make_world: MakeWorld, prepare, plan: WakePlan) -> None:
    rehearsal = make_world()
    prepare(rehearsal)
    rehearsal.wake(plan)
    after = snapshot(rehearsal)
    for world, before in failures(make_world, prepare, lambda world: world.wake(plan)):
        with pytest.raises(BackendFailure):
            world.wake(plan)
        assert snapshot(world) == before
        asleep_now = [s for s in world.residency.states() if s.residency in ("offloaded", "discarded")]
        assert {state.resident_bytes for state in asleep_now} == {0}
        world.backend.clear()
        world.wake(plan)
        assert snapshot(world) == after


@pytest.mark.parametrize(("prepare", "plan"), ALL_WAKES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wake_that_cannot_be_undone_is_a_fault_with_a_way_back(
    make_world: MakeWorld, prepare, plan: WakePlan, when: str
) -> None:
    truth = make_world()
    prepare(truth)
    expected = recover(truth)
    for world, before in failures(make_world, prepare, lambda world: world.wake(plan)):
        world.backend.fail_next("release", when=when)
        try:
            world.wake(plan)
        except EngineFaulted:
            assert recover(world) == expected
        except BackendFailure:  # it failed before anything was mapped
            assert snapshot(world) == before


@pytest.mark.parametrize("prepare", [awake, changed, blank, blank_written])
def test_replacing_mapped_weights_is_old_new_or_a_fault(make_world: MakeWorld, prepare) -> None:
    pristine = make_world().weight_bytes
    for world, before in failures(make_world, prepare, lambda world: world.wake(RELOAD)):
        try:
            world.wake(RELOAD)
        except EngineFaulted:
            assert recover(world) == pristine
        except BackendFailure:
            assert snapshot(world) == before


def test_a_failed_undo_is_a_fault_with_a_way_back(make_world: MakeWorld) -> None:
    expected = make_world()
    changed(expected)
    for world, _ in failures(make_world, woken, lambda world: world.residency.undo_restore()):
        with pytest.raises(EngineFaulted):
            world.residency.undo_restore()
        assert recover(world) == expected.weight_bytes


@pytest.mark.parametrize("prepare", [awake, changed, saved, woken, asleep_changed, discarded, blank, blank_written])
def test_a_failed_reset_can_be_repeated(make_world: MakeWorld, prepare) -> None:
    truth = make_world()
    prepare(truth)
    expected = recover(truth)
    for world, _ in failures(make_world, prepare, lambda world: world.residency.reset()):
        with pytest.raises(BackendFailure):
            world.residency.reset()
        assert recover(world) == expected


@pytest.mark.parametrize("prepare", [awake, changed, woken])
def test_a_failed_verification_changes_nothing(make_world: MakeWorld, prepare) -> None:
    for world, before in failures(make_world, prepare, lambda world: world.residency.verify("full")):
        with pytest.raises(BackendFailure):
            world.residency.verify("full")
        assert snapshot(world) == before


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("plan", [LEVEL_1, LEVEL_2], ids=["level 1", "level 2"])
def test_a_release_that_is_finished_reports_what_the_first_try_freed_too(
    make_world: MakeWorld, plan: SleepPlan, when: str
) -> None:
    """Would catch bytes that left the process before the failure, and are told by nobody."""

    def begin() -> World:
        world = make_world()
        changed(world)
        world.residency.save(plan)
        world.backend.clear()
        return world

    def told(world: World, reports: Sequence[TagReport]) -> list[TagReport]:
        assert world.where == {report.tag: report.residency for report in reports}
        return [replace(report, seconds=0.0) for report in reports]

    whole = begin()
    reports, steps = whole.residency.release(plan), tuple(whole.backend.steps)
    expected = told(whole, reports)
    assert all(report.freed_bytes for report in expected)
    for step in range(len(steps)):
        world = begin()
        world.backend.fail_at(step, when=when)
        with pytest.raises(BackendFailure):
            world.residency.release(plan)
        world.backend.clear()
        assert told(world, world.residency.finish_release(plan)) == expected, (step, steps)


@pytest.mark.parametrize("plan", [LEVEL_1, LEVEL_2], ids=["level 1", "level 2"])
def test_a_release_that_never_began_is_not_finished_as_the_last_one_was(make_world: MakeWorld, plan: SleepPlan) -> None:
    """Would catch memory that is given back while the weights count as resident: what an update wrote would be gone."""
    world = make_world()
    world.residency.save(LEVEL_1)
    world.residency.release(LEVEL_1)
    world.wake(WAKE)
    changed(world)
    world.residency.save(plan)
    reports = world.residency.finish_release(plan)  # another rank's release had an error, ours was not even asked
    assert world.where == {report.tag: report.residency for report in reports}
    assert world.where["weights"] == ("offloaded" if plan == LEVEL_1 else "discarded")
