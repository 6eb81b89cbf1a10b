"""Ranks that are taken to be on other machines: what they are sent, and what is fetched from them."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from shuteye.calls import ReloadCall, SleepCall, UpdateCall, UpdateFromFileCall, WakeCall
from shuteye.errors import InvalidRequest, ShuteyeError
from shuteye.executors import file_copies
from shuteye.executors.file_copies import FileCopies
from shuteye.testing import tiny_model

PROMPT = (5, 300, 9, 11, 60)


@pytest.fixture(scope="module")
def shared(open_ranks):
    return open_ranks("TP 2")


@pytest.fixture
def ranks(shared, monkeypatch):
    monkeypatch.setattr(shared.executor._launcher, "away", lambda: {1: 1}, raising=True)
    monkeypatch.setattr(file_copies, "CHUNK_BYTES", 100_000)
    yield shared
    shared.wake()
    shared.call(ReloadCall())


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    model = tiny_model(tmp_path_factory.mktemp("other") / "model", seed=7)
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if name != "lm_head.weight"}


def descriptors(ranks):
    return [len(os.listdir(f"/proc/{ranks.pid(rank)}/fd")) for rank in (0, 1)]


@pytest.mark.parametrize("how", ["tensors", "file", "directory", "into blank weights"])
def test_an_update_reaches_ranks_that_cannot_read_our_files(ranks, harness, tensors, tmp_path, how):
    """Would catch a rank that is given a path of another machine, and copies that stay in its memory."""
    harness.call(UpdateCall(tensors.items()))
    expected = harness.generate(PROMPT)
    before = descriptors(ranks)
    names = sorted(tensors)
    for number, some in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in some}, tmp_path / f"part-{number}.safetensors")
    if how == "into blank weights":
        ranks.call(SleepCall(2))
        ranks.call(WakeCall(tags=["weights"]))
    match how:
        case "tensors" | "into blank weights":
            call = UpdateCall(tensors.items())
        case "directory":
            call = UpdateFromFileCall(str(tmp_path))
        case "file":
            save_file(tensors, tmp_path / "all.safetensors")
            call = UpdateFromFileCall(str(tmp_path / "all.safetensors"))
    report = ranks.call(call)
    assert report.updated == len(tensors)
    assert report.missing == ()
    ranks.wake()
    assert ranks.generate(PROMPT) == expected
    assert descriptors(ranks) == before


def test_a_wrong_update_of_several_files_changes_nothing(ranks, harness, tensors, tmp_path):
    """Would catch the first file written before the second one is looked at."""
    expected = ranks.generate(PROMPT)
    name, tensor = next(iter(tensors.items()))
    save_file({name: tensor}, tmp_path / "a.safetensors")
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "b.safetensors")
    before = descriptors(ranks)
    with pytest.raises(InvalidRequest, match="has shape"):
        ranks.call(UpdateFromFileCall(str(tmp_path)))
    assert ranks.generate(PROMPT) == expected
    assert descriptors(ranks) == before


def test_a_file_that_is_not_there_is_refused(ranks, tmp_path):
    with pytest.raises(InvalidRequest, match="cannot be read on the server's host"):
        ranks.call(UpdateFromFileCall(str(tmp_path / "nothing.safetensors")))
    assert ranks.core.state.faulted is None


def test_a_machine_gets_a_file_once(tmp_path, monkeypatch):
    """Would catch a copy for each rank, or one that lacks its end."""
    monkeypatch.setattr(file_copies, "CHUNK_BYTES", 4)
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    asked = []

    def call(ranks, verb, args):
        asked.append((tuple(ranks), verb, args))
        return [f"/proc/{ranks[0]}"] * len(ranks)

    with FileCopies(call, {2: 2, 3: 2, 4: 4}) as copies:
        assert copies.paths(file, range(5)) == {0: str(file), 1: str(file), 2: "/proc/2", 3: "/proc/2", 4: "/proc/4"}
    for holder in (2, 4):
        chunks = [args for ranks, verb, args in asked if ranks == (holder,) and verb == "receive"]
        assert b"".join(content for _, content in chunks) == b"0123456789"
        assert {number for number, _ in chunks} == {0}
    assert asked[-1] == ((2, 4), "forget_received", ())


def test_an_empty_file_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with FileCopies(lambda ranks, *_: ["there"] * len(ranks), {1: 1}) as copies:
        assert copies.paths(tmp_path / "file", [1]) == {1: "there"}


def test_a_tokenizer_that_is_elsewhere_is_fetched(ranks, monkeypatch, tmp_path):
    """Would catch a server that looks for rank 0's files on its own disk."""
    monkeypatch.setattr(ranks.executor._launcher, "away", lambda: {0: 0})
    monkeypatch.setattr(
        ranks.executor, "_config", type(ranks.executor._config)(**{"cache_dir": tmp_path, "tensor_parallel_size": 2})
    )
    theirs = Path(ranks.executor.outcomes("facts")[0].tokenizer_dir)
    for _ in range(2):
        ours = Path(ranks.executor.call("facts")[0].tokenizer_dir)
        assert ours.is_relative_to(tmp_path)
        assert {path.name: path.read_bytes() for path in ours.iterdir()} == {
            path.name: path.read_bytes() for path in theirs.iterdir()
        }
    assert [path.name for path in ours.parent.iterdir()] == [ours.name]


def test_a_machine_without_room_is_an_error_and_no_fault(ranks, tensors, monkeypatch):
    def full(_ranks, verb, _args):
        raise ShuteyeError(f"no room for {verb}")

    monkeypatch.setattr(ranks.executor, "_call_some", full)
    with pytest.raises(ShuteyeError, match="no room for receive"):
        ranks.call(UpdateCall(tensors.items()))
    monkeypatch.undo()
    assert ranks.core.state.faulted is None
