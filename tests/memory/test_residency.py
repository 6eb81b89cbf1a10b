"""Sleep and wake as the worker drives them, over real mappings."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from memory_harness import KV_BYTES, LEVEL_1, LEVEL_2, PAGE, RELOAD, WAKE, World, open_fds

from shuteye.errors import (
    BackendFailure,
    ImageFailure,
    InternalError,
    InvalidRequest,
    MemoryExhausted,
    TransitionConflict,
)
from shuteye.memory.backends.fake import POISON
from shuteye.memory.image import ImageIdentity, WeightImage
from shuteye.memory.image_store import ImageStore
from shuteye.memory.layout import TensorSpec
from shuteye.models.tensors import slot_view
from shuteye.state import SleepPlan, VerifyResult, WakePlan

WEIGHTS_PAGES = 7


def test_a_clean_sleep_frees_everything_saves_nothing_and_wakes_the_same(world: World) -> None:
    before = world.weight_bytes
    world.residency.save(LEVEL_1)
    weights, kv = world.residency.release(LEVEL_1)
    assert (weights.residency, weights.backing, weights.saved_bytes) == ("offloaded", "image", 0)
    assert (weights.freed_bytes, kv.freed_bytes) == (WEIGHTS_PAGES * PAGE, KV_BYTES)
    assert [state.resident_bytes for state in world.residency.states()] == [0, 0]
    woken, _ = world.residency.restore(WAKE)
    assert (woken.restored_bytes, woken.backing) == (WEIGHTS_PAGES * PAGE, "image")
    assert world.weight_bytes == before


def test_freed_is_what_the_kernel_had_there_not_the_size_of_the_tag(world: World) -> None:
    """Would catch a report that names what should have come back instead of what did."""
    madv_dontneed = 4
    for arena in (world.weights, world.kv):
        assert world.backend._inner._advise(arena.address, PAGE, madv_dontneed) == 0
    world.residency.save(LEVEL_1)
    freed = [report.freed_bytes for report in world.residency.release(LEVEL_1)]
    assert freed == [(WEIGHTS_PAGES - 1) * PAGE, KV_BYTES - PAGE]


def test_a_clean_sleep_writes_no_file(world: World) -> None:
    world.sleep(LEVEL_1)
    assert "write_file" not in world.backend.steps


def test_the_kv_cache_wakes_poisoned_not_with_old_content(world: World) -> None:
    world.kv.bytes_view(0, 5)[:] = b"stale"
    world.sleep(LEVEL_1)
    world.wake(WAKE)
    assert set(world.bytes_of(world.kv)) == {POISON}


@pytest.mark.parametrize(
    ("offset", "pages"),
    [(0, 1), (PAGE - 1, 1), (PAGE, 3), (4 * PAGE - 1, 3), (4 * PAGE, 2), (6 * PAGE - 1, 2), (6 * PAGE, 1)],
)
def test_a_byte_at_either_side_of_an_extent_edge_makes_only_its_extent_dirty(
    world: World, offset: int, pages: int
) -> None:
    world.write(offset, 1 + world.weight_bytes[offset] & 0xFF)
    changed = world.weight_bytes
    assert world.residency.estimate(LEVEL_1).save_bytes == pages * PAGE
    world.residency.save(LEVEL_1)
    report = world.residency.release(LEVEL_1)[0]
    assert (report.saved_bytes, report.backing) == (pages * PAGE, "disk")
    world.wake(WAKE)
    assert world.weight_bytes == changed


@pytest.mark.parametrize("backing", ["disk", "host"])
def test_sleeping_twice_saves_a_change_once(make_world, backing: str) -> None:
    world = make_world(backing)
    world.write(2 * PAGE, 99)
    changed = world.weight_bytes
    for saved in (3 * PAGE, 0, 0):
        world.residency.save(LEVEL_1)
        report = world.residency.release(LEVEL_1)[0]
        assert (report.saved_bytes, report.backing) == (saved, backing)
        world.wake(WAKE)
        assert world.weight_bytes == changed


def test_a_saved_extent_written_again_is_saved_again(world: World) -> None:
    for value in (1, 2, 3):
        world.write(PAGE, value)
        changed = world.weight_bytes
        world.residency.save(LEVEL_1)
        assert world.residency.release(LEVEL_1)[0].saved_bytes == 3 * PAGE
        world.wake(WAKE)
        assert world.weight_bytes == changed


def test_views_keep_their_addresses_and_values_over_sleep(world: World) -> None:
    tensor = slot_view(world.weights, world.residency.image.layout.slots["layer.q"])
    address, value = tensor.data_ptr(), tensor.clone()
    for _ in range(3):
        world.sleep(LEVEL_1)
        world.wake(WAKE)
    assert tensor.data_ptr() == address
    assert tensor.view(torch.int16).equal(value.view(torch.int16))


def test_weights_alone_may_sleep_and_the_kv_cache_keeps_its_content(world: World) -> None:
    world.kv.bytes_view(0, 4)[:] = b"kept"
    plan = SleepPlan("offload", "keep")
    world.residency.save(plan)
    assert [report.tag for report in world.residency.release(plan)] == ["weights"]
    assert world.where == {"weights": "offloaded", "kv_cache": "resident"}
    world.wake(WAKE)
    assert world.kv.bytes_view(0, 4) == b"kept"


def test_the_kv_cache_alone_may_sleep(world: World) -> None:
    before = world.weight_bytes
    plan = SleepPlan("keep", "discard")
    world.residency.save(plan)
    assert [report.tag for report in world.residency.release(plan)] == ["kv_cache"]
    assert world.where == {"weights": "resident", "kv_cache": "discarded"}
    assert world.weight_bytes == before


def test_level_2_then_reload_brings_the_image_not_the_update(world: World) -> None:
    original = world.weight_bytes
    world.write(0, original[0] ^ 0xFF)
    world.sleep(LEVEL_2)
    assert world.where == {"weights": "discarded", "kv_cache": "discarded"}
    world.wake(RELOAD)
    assert world.weight_bytes == original


@pytest.mark.parametrize("end", ["level 2", "deeper", "reset"])
def test_saved_extents_free_their_disk_space_once_they_are_obsolete(world: World, end: str) -> None:
    """Would catch a spill file that fills the disk for as long as the process lives."""
    before = open_fds()
    world.write(0, 1)
    world.sleep(LEVEL_1)
    assert open_fds() > before
    if end != "deeper":
        world.wake(WAKE)
        world.write(0, 2)
    if end == "reset":
        world.residency.reset()
        assert world.where["weights"] == "discarded"
    else:
        world.sleep(LEVEL_2)
    assert open_fds() == before


def test_a_saved_copy_that_a_reload_made_obsolete_is_freed_before_the_next_save(world: World) -> None:
    """Would catch a spill file that keeps every extent that was ever saved."""
    world.write(PAGE, 1)
    world.sleep(LEVEL_1)
    world.wake(RELOAD)
    world.write(0, 1)
    world.sleep(LEVEL_1)
    assert os.fstat(world.residency._backing._fd).st_blocks * 512 < 4 * PAGE


def test_deepening_from_offloaded_drops_what_was_saved(world: World) -> None:
    world.write(0, 1)
    world.sleep(LEVEL_1)
    world.sleep(LEVEL_2)
    assert world.where["weights"] == "discarded"
    with pytest.raises(TransitionConflict, match="discarded cannot be moved by 'restore'"):
        world.wake(WAKE)


def test_blank_weights_are_poison_until_every_tensor_is_written(world: World) -> None:
    world.sleep(LEVEL_2)
    world.wake(WakePlan("blank", "keep"))
    assert set(world.weight_bytes) == {POISON}
    assert world.residency.missing() == ("embed", "layer.q", "layer.k", "mlp", "norm")
    for name in ("head", "layer.k", "mlp", "norm"):  # head is tied to embed
        world.residency.mark_written(name)
    assert (world.residency.missing(), world.where["weights"]) == (("layer.q",), "blank")
    world.residency.mark_written("layer.q")
    assert (world.residency.missing(), world.where["weights"]) == ((), "resident")


def test_weights_written_into_blank_memory_are_saved_whole_and_come_back(world: World) -> None:
    world.sleep(LEVEL_2)
    world.wake(WakePlan("blank", "commit"))
    world.write_everything(7)
    written = world.weight_bytes
    world.residency.save(LEVEL_1)
    assert world.residency.release(LEVEL_1)[0].saved_bytes == WEIGHTS_PAGES * PAGE
    world.wake(WAKE)
    assert world.weight_bytes == written
    world.residency.save(LEVEL_1)
    assert world.residency.release(LEVEL_1)[0].saved_bytes == 0


def test_blank_weights_cannot_be_offloaded(world: World) -> None:
    world.sleep(LEVEL_2)
    world.wake(WakePlan("blank", "keep"))
    for move in (world.residency.estimate, world.residency.save, world.residency.release):
        with pytest.raises(TransitionConflict, match="blank"):
            move(LEVEL_1)


def test_a_write_to_sleeping_or_unknown_tensors_is_refused(world: World) -> None:
    with pytest.raises(InvalidRequest, match="no tensor 'nonsense'"):
        world.residency.mark_written("nonsense")
    world.sleep(LEVEL_1)
    with pytest.raises(TransitionConflict, match="the weights are offloaded"):
        world.residency.mark_written("embed")


def test_a_save_that_failed_is_not_followed_by_a_release(world: World) -> None:
    """Would catch changes lost to the list of what an earlier save had written."""
    world.residency.save(LEVEL_1)
    world.write(0, 1)
    changed = world.weight_bytes
    world.backend.fail_next("write_file")
    with pytest.raises(BackendFailure):
        world.residency.save(LEVEL_1)
    with pytest.raises(InternalError):
        world.residency.release(LEVEL_1)
    assert world.weight_bytes == changed


def test_releasing_without_saving_is_a_bug_that_loses_nothing(world: World) -> None:
    before = world.weight_bytes
    with pytest.raises(InternalError):
        world.residency.release(LEVEL_1)
    assert world.weight_bytes == before


def test_waking_what_is_awake_changes_nothing(world: World) -> None:
    before = world.weight_bytes
    assert world.residency.restore(WAKE) == ()
    assert world.weight_bytes == before


def test_memory_for_all_tags_together_is_asked_before_anything_is_mapped(world: World) -> None:
    before = world.weight_bytes
    world.sleep(LEVEL_1)
    world.backend.clear()
    world.backend.available = world.weights.nbytes + KV_BYTES - 1
    with pytest.raises(MemoryExhausted, match="are available"):
        world.wake(WAKE)
    assert world.backend.steps == ["available_bytes"]
    world.backend.available = None
    world.wake(WAKE)
    assert world.weight_bytes == before


def test_no_room_for_saving_is_found_by_the_estimate_and_by_save(make_world) -> None:
    world = make_world("host")
    world.write(0, 1)
    changed = world.weight_bytes
    world.backend.available = PAGE - 1
    for move in (world.residency.estimate, world.residency.save):
        with pytest.raises(MemoryExhausted, match=f"{PAGE:,} bytes"):
            move(LEVEL_1)
    assert (world.where["weights"], world.weight_bytes) == ("resident", changed)


def fill_the_disk(world: World, monkeypatch) -> None:
    """Whatever is free now is taken; what the spill file owns and gives back is free again."""
    backing = world.residency._backing
    owned = lambda: os.fstat(backing._fd).st_blocks * 512 if backing._fd >= 0 else 0  # noqa: E731
    total = owned()
    monkeypatch.setattr(backing, "free_bytes", lambda: total - owned())


@pytest.mark.parametrize("backing", ["disk", "host"])
def test_changes_are_saved_again_in_place_on_a_full_disk(make_world, monkeypatch, backing: str) -> None:
    """Would catch a model that can be put to sleep once, and never again, because its own file fills the disk."""
    world = make_world(backing)
    world.write(0, 1)
    world.sleep(LEVEL_1)
    world.wake(WAKE)
    fill_the_disk(world, monkeypatch)
    world.write(0, 2)
    changed = world.weight_bytes
    assert world.residency.estimate(LEVEL_1).save_bytes == PAGE
    world.sleep(LEVEL_1)
    world.wake(WAKE)
    assert world.weight_bytes == changed
    world.write(PAGE, 2)
    for move in (world.residency.estimate, world.residency.save):
        with pytest.raises(MemoryExhausted):
            move(LEVEL_1)


@pytest.mark.parametrize("backing", ["disk", "host"])
def test_a_save_that_was_not_followed_by_a_release_is_room_for_the_next(make_world, monkeypatch, backing: str) -> None:
    """Would catch a retry that is refused because of what the first attempt wrote."""
    world = make_world(backing)
    world.write(0, 1)
    world.residency.save(LEVEL_1)
    fill_the_disk(world, monkeypatch)
    world.write(0, 2)
    changed = world.weight_bytes
    world.residency.estimate(LEVEL_1)
    world.sleep(LEVEL_1)
    world.wake(WAKE)
    assert world.weight_bytes == changed


def test_estimating_touches_nothing(world: World) -> None:
    world.write(0, 1)
    world.backend.clear()
    world.residency.estimate(LEVEL_1)
    assert set(world.backend.steps) <= {"written_ranges", "available_bytes"}


# --- verification --------------------------------------------------------------------------------


def test_full_verification_reads_every_clean_byte(world: World) -> None:
    assert world.residency.verify("full") == VerifyResult(WEIGHTS_PAGES * PAGE)
    world.write(PAGE, 1)
    assert world.residency.verify("full") == VerifyResult((WEIGHTS_PAGES - 3) * PAGE)
    assert world.residency.verify("off") == VerifyResult(0)


def test_verification_finds_an_image_that_changed_while_asleep(world: World, monkeypatch) -> None:
    world.sleep(LEVEL_1)
    path = world.residency.image.path / "weights.rank0.bin"
    path.chmod(0o644)
    content = path.read_bytes()
    path.write_bytes(content[: 5 * PAGE] + bytes([content[5 * PAGE] ^ 1]) + content[5 * PAGE + 1 :])
    try:
        with pytest.raises(ImageFailure, match="was changed while in use: 1 of 4 extents"):
            world.wake(WAKE)
        assert world.where == {"weights": "offloaded", "kv_cache": "discarded"}
        monkeypatch.setattr(world.residency.image, "require_intact", lambda: None)  # as damage that no time tells of
        world.wake(WAKE)
        assert world.residency.verify("full").bad_extents == (2,)
        assert world.residency.verify("sample").bad_extents == (2,)
        world.residency.undo_restore()
        assert world.where == {"weights": "offloaded", "kv_cache": "discarded"}
    finally:
        path.write_bytes(content)
        path.chmod(0o444)
    world.wake(WAKE)
    assert world.residency.verify("full").bad_extents == ()


def test_verification_covers_saved_extents_too(world: World) -> None:
    world.write(PAGE, 1)
    world.sleep(LEVEL_1)
    world.wake(WAKE)
    assert world.residency.verify("full") == VerifyResult(WEIGHTS_PAGES * PAGE)


# --- undoing, replacing, resetting ---------------------------------------------------------------


def test_an_undone_wake_can_be_repeated_and_undoing_twice_is_harmless(world: World) -> None:
    world.write(0, 1)
    changed = world.weight_bytes
    world.sleep(LEVEL_1)
    world.wake(WAKE)
    world.residency.undo_restore()
    assert world.where == {"weights": "offloaded", "kv_cache": "discarded"}
    world.residency.undo_restore()
    world.wake(WAKE)
    assert world.weight_bytes == changed


def test_undoing_after_a_failed_wake_does_not_undo_the_wake_before_it(world: World) -> None:
    before = world.weight_bytes
    world.sleep(LEVEL_1)
    world.wake(WakePlan("restore", "keep"))
    world.backend.available = 0
    with pytest.raises(MemoryExhausted):
        world.wake(WakePlan("keep", "commit"))
    world.residency.undo_restore()  # the controller asks every rank, and another one's wake succeeded
    assert (world.where["weights"], world.weight_bytes) == ("resident", before)


def test_an_undone_reload_leaves_what_was_saved(world: World) -> None:
    world.write(0, 1)
    changed = world.weight_bytes
    world.sleep(LEVEL_1)
    world.wake(RELOAD)
    assert world.weight_bytes != changed
    world.residency.undo_restore()
    world.wake(WAKE)
    assert world.weight_bytes == changed


def test_a_wake_cannot_be_undone_once_the_weights_were_released(world: World) -> None:
    """Would catch discarded weights that an undo, asked of every rank, declares offloaded again."""
    world.sleep(LEVEL_1)
    world.wake(WAKE)
    world.residency.release(LEVEL_2)  # as a reload does, which has nothing to save
    world.residency.undo_restore()
    assert world.where == {"weights": "discarded", "kv_cache": "discarded"}


def test_a_wake_cannot_be_undone_once_there_was_a_reset(world: World) -> None:
    """Would catch weights that the image brings back, and that an undo declares gone."""
    world.sleep(LEVEL_2)
    world.wake(RELOAD)
    world.residency.reset()
    world.residency.undo_restore()
    assert world.where == {"weights": "offloaded", "kv_cache": "discarded"}


@pytest.mark.parametrize("back", ["undo_restore", "reset"])
def test_nothing_is_missing_of_weights_that_are_not_blank_any_more(world: World, back: str) -> None:
    """Would catch a state that lists tensors to be written where none can be."""
    world.sleep(LEVEL_2)
    world.wake(WakePlan("blank", "keep"))
    assert world.residency.missing()
    getattr(world.residency, back)()
    assert (world.where["weights"], world.residency.missing()) == ("discarded", ())


def test_undoing_leaves_the_tag_that_was_awake_alone(world: World) -> None:
    before = world.weight_bytes
    world.sleep(SleepPlan("keep", "discard"))
    world.wake(WAKE)
    world.residency.undo_restore()
    assert (world.where, world.weight_bytes) == ({"weights": "resident", "kv_cache": "discarded"}, before)


def test_a_replaced_image_counts_from_the_next_reload_on(world: World) -> None:
    old = world.weight_bytes
    other = WeightImage.open(world.other_image_path)
    world.residency.replace_image(other)
    world.sleep(LEVEL_1)
    world.wake(WAKE)
    assert world.weight_bytes == old
    world.wake(RELOAD)
    assert world.weight_bytes == (world.other_image_path / "weights.rank0.bin").read_bytes()
    assert world.residency.verify("full") == VerifyResult(WEIGHTS_PAGES * PAGE)


def test_the_superseded_image_can_be_removed_once_nothing_can_bring_it_back(world: World) -> None:
    first = world.residency.image
    world.residency.replace_image(WeightImage.open(world.other_image_path))
    world.sleep(LEVEL_2)
    world.wake(RELOAD)
    assert not first.closed, "the reload could still be undone"
    world.sleep(LEVEL_1)
    assert first.closed


def test_an_image_of_another_layout_is_refused_by_name(world: World, tmp_path) -> None:
    def build(writer) -> None:
        writer.begin([TensorSpec("embed", (PAGE // 4,), "float32", "embed")])
        writer.put("embed", bytes(PAGE))

    other = ImageStore(tmp_path).open_or_build(ImageIdentity("x", "x", "float32"), build)
    with pytest.raises(InvalidRequest, match=r"tensor 'embed' should be bfloat16 \(2048,\).*is float32 \(1024,\)"):
        world.residency.replace_image(other)
    other.close()


def test_reset_keeps_clean_weights_and_is_idempotent(world: World) -> None:
    before = world.weight_bytes
    for _ in range(2):
        world.residency.reset()
        assert world.where == {"weights": "offloaded", "kv_cache": "discarded"}
        assert [state.resident_bytes for state in world.residency.states()] == [0, 0]
    world.wake(WAKE)
    assert world.weight_bytes == before


def test_reset_does_not_pretend_that_unsaved_changes_are_safe(world: World) -> None:
    world.write(0, 1)
    world.residency.reset()
    assert world.where["weights"] == "discarded"


def test_reset_keeps_changes_that_were_saved_and_not_touched_since(world: World) -> None:
    world.write(0, 1)
    changed = world.weight_bytes
    world.residency.save(LEVEL_1)
    world.residency.reset()
    world.wake(WAKE)
    assert world.weight_bytes == changed


def test_reset_forgets_a_save_that_later_writes_made_untrue(world: World) -> None:
    world.write(0, 1)
    world.residency.save(LEVEL_1)
    world.write(1, 2)
    world.residency.reset()
    assert world.where["weights"] == "discarded"


def test_closing_twice_is_harmless_and_gives_back_the_image(world: World) -> None:
    image = world.residency.image
    world.residency.close()
    world.residency.close()
    assert image.closed


def test_running_out_of_file_space_while_saving_leaves_it_awake(tmp_path) -> None:
    """With the real errno: the limit is set in a process of its own."""
    code = """
        import resource, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from memory_harness import LEVEL_1, PAGE, build_image
        from shuteye.errors import ShuteyeError
        from shuteye.memory.arena import Arena
        from shuteye.memory.backends.linux import LinuxBackend
        from shuteye.memory.image import ImageIdentity
        from shuteye.memory.image_store import ImageStore
        from shuteye.memory.residency import Residency
        from shuteye.state import SleepPlan, WakePlan

        root, backend = Path(sys.argv[1]), LinuxBackend()
        image = ImageStore(root).open_or_build(ImageIdentity("m", "1", "bfloat16"), build_image(1))
        arena = Arena.reserve(backend, tag="weights", nbytes=image.layout.nbytes)
        residency = Residency(backend=backend, weights=arena, image=image, spill_dir=root / "spill")
        residency.restore(WakePlan("restore"))
        arena.bytes_view(0, 1)[0] = 1
        arena.bytes_view(6 * PAGE, 1)[0] = 1
        before = bytes(arena.bytes_view(0, arena.nbytes))
        resource.setrlimit(resource.RLIMIT_FSIZE, (7 * PAGE - 1, resource.RLIM_INFINITY))
        try:
            residency.save(LEVEL_1)
        except ShuteyeError as error:
            print(type(error).__name__, residency.states()[0].residency)
        assert bytes(arena.bytes_view(0, arena.nbytes)) == before
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        residency.save(LEVEL_1)
        residency.release(SleepPlan("offload"))
        residency.restore(WakePlan("restore"))
        assert bytes(arena.bytes_view(0, arena.nbytes)) == before
        print("woke the same")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(Path(__file__).parents[1] / "helpers")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == ["MemoryExhausted resident", "woke the same"], result.stderr
