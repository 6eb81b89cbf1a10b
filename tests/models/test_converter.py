"""Conversion in a process of its own: what it tells, how it ends, and what stays behind of it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from shuteye.errors import ImageFailure, InternalError, MemoryExhausted, ModelNotFound, UnsupportedModel
from shuteye.memory.image_store import ImageStore
from shuteye.models import converter
from shuteye.models.binding import Origin
from shuteye.models.converter import Done, Order, Refused, obtain_image
from shuteye.models.progress import Advanced, Failed, Finished, ProgressEvent, Started, no_progress

really_apart = converter.make_apart
"""What the suite replaces by a conversion in its own process."""


ENGINE = """
    import sys
    from pathlib import Path
    from shuteye.config import EngineConfig
    from shuteye.executors.inproc import InprocExecutor
    from shuteye.models.converter import Order, obtain_image

    image = obtain_image(Order(sys.argv[1], sys.argv[2]), print)
    print(image.identity.key, "transformers" in sys.modules)
    image.close()
    InprocExecutor(EngineConfig(model=sys.argv[1], cache_dir=Path(sys.argv[2]))).close()
    print("transformers" in sys.modules)
"""


@pytest.mark.slow
def test_a_conversion_leaves_no_transformers_in_the_engines_process(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Would catch an engine that sleeps with hundreds of megabytes of transformers and its leftovers."""
    command = [sys.executable, "-c", textwrap.dedent(ENGINE), str(tiny_checkpoint), str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout.splitlines()
    (image,) = ImageStore(tmp_path).list()
    assert lines[-2:] == [f"{image.key} False", "False"], "neither to make the image nor to serve it"
    assert lines[0] == str(Started(f"Reading the configuration and tokenizer of {tiny_checkpoint}"))
    assert sum(line.startswith("Advanced(") for line in lines) > 10, "every tensor"
    assert lines[-3] == str(Finished())


def test_an_error_of_the_other_process_arrives_as_it_was(tmp_path: Path) -> None:
    """Would catch a wrong name that ends in a traceback or as a bug of ours."""
    with pytest.raises(ModelNotFound, match="No model 'no-such-model'") as caught:
        really_apart(Order("no-such-model", str(tmp_path)), no_progress)
    assert caught.value.param == "model"


def test_an_image_that_is_there_is_opened_without_another_process(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    order = Order(str(tiny_checkpoint), str(tmp_path))
    first = obtain_image(order, no_progress)
    assert Origin.of(first) == Origin(f"path: {tiny_checkpoint}", "safetensors float32")
    monkeypatch.setattr(converter, "make_apart", None)
    second = obtain_image(order, no_progress)
    assert second.path == first.path
    first.close()
    second.close()


def other_text(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"', b"'", 1))


def older_format(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"format":2', b'"format":1'))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("tokenizer/tokenizer_config.json", Path.unlink, "tokenizer/tokenizer_config.json is missing"),
        (
            "tokenizer/tokenizer.json",
            lambda path: path.write_text(""),
            "tokenizer/tokenizer.json has 0 bytes instead of",
        ),
        ("config/config.json", Path.unlink, "config/config.json is missing"),
        ("index.json", older_format, "another version of shuteye made it"),
    ],
)
def test_an_image_that_lacks_something_is_rebuilt_and_the_log_says_why(
    tiny_checkpoint, tmp_path, caplog, name, damage, says
) -> None:
    """Would catch a model served with another tokenizer than its own, and images of older versions served unchecked."""
    order = Order(str(tiny_checkpoint), str(tmp_path))
    path = obtain_image(order, no_progress).path
    sealed = (path / name).read_bytes()
    (path / name).parent.chmod(0o755)
    (path / name).chmod(0o644)
    damage(path / name)
    image = obtain_image(order, no_progress)
    image.close()
    assert name == "index.json" or (image.path / name).read_bytes() == sealed
    assert ImageStore(tmp_path).verify(image.path.name).bad_extents == ()
    assert says in caplog.text


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "config/config.json"])
def test_an_image_with_another_file_in_it_is_refused(tiny_checkpoint, tmp_path, name) -> None:
    """Would catch a damaged tokenizer that is served silently."""
    order = Order(str(tiny_checkpoint), str(tmp_path))
    first = obtain_image(order, no_progress)
    first.close()
    (first.path / name).chmod(0o644)
    other_text(first.path / name)
    with pytest.raises(ImageFailure, match=f"{name} does not match its checksum.*images rm {first.path.name}"):
        obtain_image(order, no_progress)
    ImageStore(tmp_path).remove(first.path.name)
    obtain_image(order, no_progress).close()


def test_orphans_are_swept_when_an_image_is_opened(tiny_checkpoint, tmp_path) -> None:
    """Would catch what a killed build left or fetch left that stays until the same model is wanted again."""
    left = [tmp_path / "images" / ".other-bfloat16-0123.abcd", tmp_path / "wheels" / ".fetch-killed"]
    for directory in left:
        directory.mkdir(parents=True)
    obtain_image(Order(str(tiny_checkpoint), str(tmp_path)), no_progress).close()
    assert [directory for directory in left if directory.exists()] == []


def test_offline_a_model_that_is_not_here_is_refused_at_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(converter, "make_apart", None)
    with pytest.raises(ModelNotFound, match="offline"):
        obtain_image(Order("no-one/nothing", str(tmp_path), offline=True), no_progress)


def test_progress_of_the_process_is_passed_on_up_to_its_end() -> None:
    lines = [Started("Reading", None), Finished(), Started("Writing", 7), Advanced(7), Failed("full"), Done("key")]
    told: list[ProgressEvent] = []
    file = io.BytesIO(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    assert converter._follow(file, told.append) == Done("key")
    assert told == lines[:-1]
    assert converter._follow(io.BytesIO(), told.append) is None


@pytest.mark.parametrize(
    ("program", "expected", "says"),
    [
        ("raise SystemExit(3)", InternalError, "status 3"),
        ("import os; os.kill(os.getpid(), 9)", MemoryExhausted, "SIGKILL"),
        ("import os; os.kill(os.getpid(), 15)", ImageFailure, "SIGTERM"),
        (
            """print('{"type":"Refused","kind":"UnsupportedModel","message":"no","param":null}')""",
            UnsupportedModel,
            "no",
        ),
    ],
)
def test_however_the_process_ends_the_error_is_ours(monkeypatch, tmp_path, program, expected, says) -> None:
    """Would catch a conversion that was killed for memory and is told as "engine died"."""
    monkeypatch.setattr(converter, "_command", lambda _order: (sys.executable, "-S", "-c", program))
    with pytest.raises(expected, match=says) as caught:
        really_apart(Order("m", str(tmp_path)), no_progress)
    assert type(caught.value) is expected


def test_an_interrupt_ends_the_process_and_what_it_had_begun(monkeypatch, tmp_path) -> None:
    """Would catch Ctrl-C that leaves a conversion running, or its files."""
    begun = tmp_path / "begun"
    program = f"""
        import pathlib, signal, sys, time
        begun = pathlib.Path({str(begun)!r})
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        begun.touch()
        try:
            print('{{"type":"Started","label":"x","total":null}}', flush=True)
            time.sleep(60)
        finally:
            begun.unlink()
    """
    monkeypatch.setattr(converter, "_command", lambda _order: (sys.executable, "-S", "-c", textwrap.dedent(program)))

    def interrupt(_event: ProgressEvent) -> None:
        assert begun.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        really_apart(Order("m", str(tmp_path)), interrupt)
    assert not begun.exists()


def test_the_command_names_the_parent_and_the_order(tmp_path) -> None:
    *_, parent, order = converter._command(Order("m", str(tmp_path), dtype="float32"))
    assert int(parent) == os.getpid()
    assert msgspec.json.decode(order, type=Order) == Order("m", str(tmp_path), dtype="float32")


def test_a_refusal_is_told_by_name(tmp_path, monkeypatch) -> None:
    def refuse(_order: Order, _progress: object) -> str:
        raise UnsupportedModel("no", param="model")

    monkeypatch.setattr(converter, "make", refuse)
    assert converter._outcome(Order("m", str(tmp_path)), no_progress) == Refused("UnsupportedModel", "no", "model")
