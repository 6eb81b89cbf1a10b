"""Somebody writes to the image under a running engine: no token comes of it, and the engine says what happened."""

import contextlib
import mmap
import os
import shlex
import subprocess
import sys
import textwrap

import pytest

from shuteye import LLM
from shuteye.calls import ReloadCall, SleepCall, UpdateCall, WakeCall
from shuteye.cli import main as cli
from shuteye.errors import EngineFaulted, SleepFailed, VerificationFailed, WakeFailed

PROMPT = tuple(range(5, 45))


@pytest.fixture
def weights_file(harness):
    return harness.worker._image.path / "weights.rank0.bin"


@pytest.fixture
def harness(make_harness, tmp_path):
    """With an image of its own, to be spoilt."""
    return make_harness(cache_dir=tmp_path, verify_wake="off")


@contextlib.contextmanager
def overwritten(path, begin=0, end=None):
    """Every byte in [begin, end) another, in place; as it was afterwards."""
    content = path.read_bytes()
    path.chmod(0o644)
    end = len(content) if end is None else end
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(bytes(byte ^ 0x55 for byte in content[begin:end]))
    try:
        yield
    finally:
        with path.open("r+b") as file:
            file.write(content)


def beside_an_update(harness):
    """Write a tensor; where its extent begins, and up to where the file still lies under that extent."""
    layout = harness.worker._image.layout
    extent = max(layout.extents, key=lambda extent: extent.nbytes)
    slot = max((slot for slot in layout.slots.values() if slot.end <= extent.end), key=lambda slot: slot.offset)
    assert extent.offset + mmap.PAGESIZE < slot.offset
    harness.call(UpdateCall(named_tensors=[(slot.name, harness.tensors()[slot.name].clone())]))
    return extent.offset, extent.offset + mmap.PAGESIZE


def test_an_image_overwritten_while_it_is_served(harness, weights_file):
    """Would catch garbage that is served until the next sleep, and a recovery that trusts a sample."""
    before = harness.generate(PROMPT)
    with overwritten(weights_file):
        with pytest.raises(VerificationFailed, match=r"was changed while in use.*differ from their checksums"):
            harness.generate(PROMPT)
        assert "was changed while in use" in harness.core.state.faulted
        with pytest.raises(EngineFaulted):
            harness.generate(PROMPT)
        with pytest.raises(WakeFailed, match="was changed while in use"):
            harness.call(WakeCall())
        assert harness.core.state.gate == "closed"
    assert harness.call(WakeCall()).verified == "full"
    assert harness.generate(PROMPT) == before


def test_an_image_overwritten_in_the_middle_of_a_step(harness, weights_file, monkeypatch):
    """Would catch tokens of a step that began on good memory."""
    runner = harness.worker._runner
    execute = runner.execute

    def spoiling(plan, *, prove=None):
        stack.enter_context(overwritten(weights_file))
        return execute(plan, prove=prove)

    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(runner, "execute", spoiling)
        with pytest.raises(VerificationFailed):
            harness.generate(PROMPT)
    assert harness.tokens["generate-0"] == []
    assert harness.core.state.faulted


def test_an_overwritten_page_beside_an_updated_one_is_noticed(harness, weights_file):
    """Would catch a look that skips whole extents because one page of them was written."""
    with overwritten(weights_file, *beside_an_update(harness)), pytest.raises(VerificationFailed):
        harness.generate(PROMPT)


def test_reading_or_touching_the_image_file_is_no_fault(harness, weights_file):
    """Would catch a server that goes down because somebody ran chmod, touch or a backup."""
    before = harness.generate(PROMPT)
    for change in (lambda: weights_file.chmod(0o600), weights_file.touch, lambda: os.link(weights_file, "linked")):
        with contextlib.chdir(weights_file.parent.parent):
            change()
        assert harness.generate(PROMPT) == before


@pytest.mark.parametrize("repaired", ["before anybody looked", "after a step had failed", "before a sleep"])
def test_updates_lost_with_a_truncated_image_are_noticed(harness, weights_file, repaired):
    """Would catch the image's weights under an update's name: cutting a file short takes written pages along, too,

    and `cp` of the very same bytes begins with that.
    """
    from_image = harness.generate(PROMPT)
    name = "model.norm.weight"
    harness.call(UpdateCall(named_tensors=[(name, -harness.tensors()[name].clone())]))
    assert harness.generate(PROMPT) != from_image
    content = weights_file.read_bytes()
    weights_file.chmod(0o644)
    if repaired == "after a step had failed":
        os.truncate(weights_file, 0)
        with pytest.raises(VerificationFailed):
            harness.generate(PROMPT)
    weights_file.write_bytes(content)
    if repaired == "before a sleep":
        with pytest.raises(SleepFailed, match="updates"):
            harness.call(SleepCall(1))
    with pytest.raises((VerificationFailed, EngineFaulted)):
        harness.generate(PROMPT)
    report = harness.call(WakeCall())
    assert (report.verified, "+" in report.weights_source) == ("full", False)
    assert harness.generate(PROMPT) == from_image


def test_an_updated_model_goes_on_when_its_image_file_is_read_or_touched(harness, weights_file):
    """Would catch updates that are given up because of a chmod."""
    name = "model.norm.weight"
    harness.call(UpdateCall(named_tensors=[(name, -harness.tensors()[name].clone())]))
    updated = harness.generate(PROMPT)
    weights_file.chmod(0o600)
    assert harness.generate(PROMPT) == updated
    harness.call(SleepCall(1))
    weights_file.touch()
    harness.call(WakeCall())
    assert harness.generate(PROMPT) == updated


def test_an_image_overwritten_while_asleep(harness, weights_file):
    """Would catch a wake without verification that serves what it found."""
    before = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    with overwritten(weights_file):
        with pytest.raises(WakeFailed, match="was changed while in use"):
            harness.call(WakeCall())
        assert harness.core.state.level == 1
        assert not harness.core.state.faulted
    harness.call(WakeCall())
    assert harness.generate(PROMPT) == before


def test_an_overwritten_image_is_not_reloaded_and_the_weights_stay(harness, weights_file):
    """Would catch a reload that gives the weights up before it looks at what is to replace them."""
    before = harness.generate(PROMPT)
    with overwritten(weights_file), pytest.raises(EngineFaulted, match="was changed while in use"):
        harness.call(ReloadCall())
    assert harness.core.state.level is None
    harness.call(WakeCall())
    assert harness.generate(PROMPT) == before


def test_an_overwritten_page_beside_an_updated_one_is_not_saved(harness, weights_file):
    """Would catch a sleep that makes a checksummed copy of garbage."""
    place = beside_an_update(harness)
    with overwritten(weights_file, *place), pytest.raises(SleepFailed, match="was changed while in use"):
        harness.call(SleepCall(1))
    assert harness.core.state.gate == "open"


def test_nothing_is_written_over_an_image_that_was_changed(harness, weights_file):
    """Would catch an update of a few pages beside garbage, or beside pages that are no more."""
    place = beside_an_update(harness)
    before = harness.core._executor.call("weights_source")
    with overwritten(weights_file, *place), pytest.raises(EngineFaulted):
        harness.call(UpdateCall(named_tensors=[("model.norm.weight", harness.tensors()["model.norm.weight"].clone())]))
    assert harness.core._executor.call("weights_source") == before


TRUNCATED = """
    import os, sys
    from pathlib import Path
    from core_harness import CoreHarness
    from shuteye.config import EngineConfig
    from shuteye.engine.core import EngineCore
    from shuteye.calls import RpcCall, SleepCall, UpdateCall, WakeCall
    from shuteye.errors import ShuteyeError
    from shuteye.executors.inproc import InprocExecutor
    from shuteye.memory.backends.linux import LinuxBackend

    config = EngineConfig(
        sys.argv[1], dtype="float32", enable_sleep_mode=True, kv_cache_memory=1 << 20, max_model_len=256,
        num_threads=1, cache_dir=Path(sys.argv[2]), verify_wake="full",
    )
    backend = LinuxBackend()
    harness = CoreHarness(EngineCore(config, InprocExecutor(config, backend=backend)), backend)
    path = harness.worker._image.path / "weights.rank0.bin"
    path.chmod(0o644)
    content, prompt = path.read_bytes(), range(5, 45)

    def refused(work):
        try:
            work()
        except ShuteyeError as error:
            return type(error).__name__
        return "nothing"

    for updated in (False, True):
        if updated:
            one = [(name, tensor.clone()) for name, tensor in harness.tensors().items() if "layers.0" in name][:1]
            harness.call(UpdateCall(named_tensors=one))
        before = harness.generate(prompt)
        os.truncate(path, 4096)
        if updated:
            print(refused(lambda: harness.call(RpcCall("verify", ("full",)))))
        print(refused(lambda: harness.generate(prompt)), bool(harness.core.state.faulted))
        print(refused(lambda: harness.call(WakeCall())))
        path.write_bytes(content)
        harness.call(WakeCall())
        assert harness.generate(prompt) == before
    harness.call(SleepCall(1))
    os.truncate(path, 4096)
    print(refused(lambda: harness.call(WakeCall())), harness.core.state.level)
    path.write_bytes(content)
    harness.call(WakeCall())
    assert harness.generate(prompt) == before
    harness.core._executor.close()
"""


def test_a_truncated_image_does_not_kill_the_process(tiny_checkpoint, tmp_path):
    """Would catch SIGBUS, with which the kernel answers whoever touches a page that the file no longer has."""
    code = textwrap.dedent(TRUNCATED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path])}
    command = [sys.executable, "-c", code, str(tiny_checkpoint), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        *("VerificationFailed True", "WakeFailed"),
        *("ImageFailure", "VerificationFailed True", "WakeFailed"),
        "WakeFailed 1",
    ]


def test_the_advice_about_a_damaged_image_works_as_written(tiny_checkpoint, tiny_options, tmp_path, capsys):
    """Would catch advice that the engine itself stands in the way of, and a fault that hides before it is mended."""
    options = tiny_options | {"cache_dir": tmp_path / "a cache", "enable_sleep_mode": True}
    with LLM(str(tiny_checkpoint), **options) as llm:
        before = llm.generate([list(PROMPT)])[0].outputs[0].token_ids
        (file,) = options["cache_dir"].glob("images/*/weights.rank0.bin")
        file.chmod(0o644)
        with file.open("r+b") as opened:
            opened.write(b"\x55" * mmap.PAGESIZE)
        with pytest.raises(VerificationFailed):
            llm.generate([list(PROMPT)])
        for _ in range(2):
            with pytest.raises(WakeFailed) as caught:
                llm.wake_up()
            assert "retry" not in caught.value.message
            assert llm.is_sleeping
            assert "was changed while in use" in llm.state.faulted
            with pytest.raises(EngineFaulted, match="was changed while in use"):
                llm.generate([list(PROMPT)])
        advice = caught.value.message
    assert "End the server or program that serves it, run `" in advice
    command = shlex.split(advice.split("`")[1])
    assert command[0] == "shuteye"
    assert cli.run(command[1:]) == 0, capsys.readouterr().err
    with LLM(str(tiny_checkpoint), **options) as llm:
        assert llm.generate([list(PROMPT)])[0].outputs[0].token_ids == before
        assert llm.state.faulted is None


def test_a_wake_that_found_a_changed_image_does_not_close_the_other_ways(harness, weights_file):
    """Would catch weights that are at hand, and cannot be written over an image that is needed no more."""
    before = harness.generate(PROMPT)
    tensors = {name: tensor.clone() for name, tensor in harness.tensors().items()}
    harness.call(SleepCall(2))
    with overwritten(weights_file):
        with pytest.raises(WakeFailed, match="was changed while in use"):
            harness.call(WakeCall())
        harness.call(WakeCall(tags=("weights",)))
        harness.call(UpdateCall(named_tensors=list(tensors.items())))
        harness.call(WakeCall())
        assert harness.generate(PROMPT) == before
