"""Models of the hub: fetched once, whole or not at all, and then found without it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import COMMIT, FakeHub, listening
from huggingface_hub import constants

from shuteye.errors import ModelNotFound
from shuteye.models.sources import resolve_source
from shuteye.testing import tiny_model

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two files with an index, and a README, which is not wanted."""
    from safetensors.torch import load_file, save_file

    path = tiny_model(tmp_path_factory.mktemp("hub") / "model")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], SHARD: names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "README.md").write_text("hello")
    return path


@pytest.fixture
def hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub(sharded)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with listening(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield hub


def snapshot(tmp_path: Path) -> Path:
    return tmp_path / "hub-cache" / "models--someone--tiny" / "snapshots" / COMMIT


def test_what_was_fetched_is_found_again_without_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    """Would catch a model that cannot be served offline because a README, which nobody needs, was not fetched, or
    because it was fetched under another name than it is looked for.
    """
    first = resolve_source(hub.model, cache_dir=tmp_path)
    assert first.origin == f"hub: someone/tiny at {COMMIT[:12]}"
    assert SHARD in os.listdir(first.path)
    assert "README.md" not in os.listdir(first.path)
    asked = len(hub.asked)
    assert resolve_source(hub.model, cache_dir=tmp_path) == first
    assert resolve_source(hub.model, cache_dir=tmp_path, offline=True) == first
    assert len(hub.asked) == asked


NEEDED = (SHARD, "model.safetensors.index.json", "config.json")


@pytest.mark.parametrize(
    ("missing", "tree"),
    [*((name, True) for name in (*NEEDED, "tokenizer.json")), *((name, False) for name in NEEDED)],
)
def test_half_a_snapshot_is_fetched_further_online_and_refused_offline(
    hub: FakeHub, tmp_path: Path, missing: str, tree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch half a sharded checkpoint that counts as whole, and fails later with a bare FileNotFoundError."""
    whole = resolve_source(hub.model, cache_dir=tmp_path)
    (whole.path / missing).unlink()
    if not tree:  # the hub's list of files, which an older huggingface_hub did not keep
        for file in (tmp_path / "hub-cache" / "models--someone--tiny" / "trees").iterdir():
            file.unlink()
        monkeypatch.setattr(huggingface_hub._tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    with pytest.raises(ModelNotFound, match=rf"only partly.*{missing}.*pull") as caught:
        resolve_source(hub.model, cache_dir=tmp_path, offline=True)
    assert "\n" not in caught.value.message
    assert resolve_source(hub.model, cache_dir=tmp_path) == whole
    assert (whole.path / missing).is_file()


def test_a_fetch_that_breaks_off_leaves_nothing_that_counts_as_whole(hub: FakeHub, tmp_path: Path) -> None:
    hub.broken = {SHARD}
    with pytest.raises(ModelNotFound, match="someone/tiny"):
        resolve_source(hub.model, cache_dir=tmp_path)
    with pytest.raises(ModelNotFound, match=f"only partly.*{SHARD}"):
        resolve_source(hub.model, cache_dir=tmp_path, offline=True)
    hub.broken = set()
    resolve_source(hub.model, cache_dir=tmp_path)
    assert snapshot(tmp_path).joinpath(SHARD).is_file()
