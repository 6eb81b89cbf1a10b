"""Weight images for whoever serves them: opened if there, else fetched and converted in a process of its own.

Converting takes transformers, and several times the memory that serving does; all of it is
given back when the process ends. `python -m shuteye.models.converter PARENT ORDER` is that process: ORDER is JSON, and
what it has to tell goes to stdout, one JSON object a line.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import msgspec

from shuteye.config import DType, EngineConfig, Quantization
from shuteye.errors import ImageFailure, InternalError, MemoryExhausted, ModelNotFound, ShuteyeError, rebuild
from shuteye.memory.cache_dir import sweep_orphans
from shuteye.memory.image import WeightImage
from shuteye.memory.image_store import ImageStore
from shuteye.models.fused import FusedSpec
from shuteye.models.native_loop import NativeLoop
from shuteye.models.progress import Progress, ProgressEvent
from shuteye.native import available
from shuteye.parallel.shards import ONE_RANK, RankPlace
from shuteye.processes import die_with_parent

logger = logging.getLogger(__name__)

END_GRACE_S = 10.0
"""How long a process that is told to end may take to delete what it has begun."""


@dataclass(frozen=True, slots=True)
class Order:
    """Which image is wanted; the fields are those of `EngineConfig`, `cache_dir` as text so that it can travel.

    Attributes:
        place: whose part of the model.
        packed: see `ImageForm`; whether the native kernels are to read the image.
    """

    model: str
    cache_dir: str
    revision: str | None = None
    dtype: DType = "auto"
    offline: bool = False
    place: RankPlace = ONE_RANK
    quantization: Quantization = "auto"
    packed: bool = field(default_factory=available)

    @classmethod
    def of(cls, config: EngineConfig, place: RankPlace, *, model: str | None = None) -> Order:
        """The image that an engine needs for a rank.

        Args:
            model: another checkpoint than the config's; its revision is not the config's then.
        """
        revision = config.revision if model in (None, config.model) else None
        cache_dir = str(config.cache_dir)
        return cls(
            model=model or config.model,
            cache_dir=cache_dir,
            revision=revision,
            dtype=config.dtype,
            offline=config.offline,
            place=place,
            quantization=config.quantization,
            packed=config.kernels != "torch" and available(),
        )


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The end: an error, by class name."""

    kind: str
    message: str
    param: str | None


class Done(msgspec.Struct, frozen=True, tag=True):
    """The end: the image is there, under this key."""

    key: str


Line = ProgressEvent | Refused | Done


def obtain_image(order: Order, progress: Progress) -> WeightImage:
    """The image of `order`, opened; made first, in a process of its own, if there is none that can be used.

    Raises:
        ModelNotFound: nothing of that name; the message says what was tried.
        UnsupportedModel: it cannot be served, or its files are damaged.
        ImageFailure: the image cannot be written, the process that makes it was ended by something else, or a file
            beside the weights is not what it was.
        MemoryExhausted: there was not enough memory to convert it.
    """
    cache_dir = Path(order.cache_dir)
    sweep_orphans(cache_dir)
    store = ImageStore(cache_dir)
    image = _open_present(order, store) or store.open_key(make_apart(order, progress))
    try:
        image.require_files_unchanged()
    except BaseException:
        image.close()
        raise
    return image


Computing = Literal["native", "torch", "modules"]
"""What computes a model: native kernels, the flat loop in torch, or transformers' modules, which need torch, too."""


def computing_of(order: Order) -> Computing:
    """What computes the model of an image that is there; of one that is yet to be made `native`."""
    try:
        image = _open_known(order, ImageStore(Path(order.cache_dir)))
    except ShuteyeError:  # whoever obtains it says so
        return "native"
    if image is None:
        return "native"
    with closing(image):
        fused = image.metadata.get("fused")
        if fused is None:
            return "modules"
        computes = order.packed and NativeLoop.computes(msgspec.convert(fused, FusedSpec), str(image.metadata["dtype"]))
        return "native" if computes else "torch"


def _open_present(order: Order, store: ImageStore) -> WeightImage | None:
    """The image, if it is there, can be used, and its checkpoint is known without asking anybody."""
    try:
        return _open_known(order, store)
    except ModelNotFound:
        if order.offline:
            raise
    except ImageFailure as failure:
        logger.warning("The weight image of %s is rebuilt. %s", order.model, failure.message)
    return None


def _open_known(order: Order, store: ImageStore) -> WeightImage | None:
    """The image, if it is there and its checkpoint is.

    Raises:
        ModelNotFound: that is not on this machine.
        ImageFailure: the image cannot be used.
    """
    from shuteye.models.formats.dtypes import served_dtype
    from shuteye.models.image_form import ImageForm
    from shuteye.models.image_identity import identity_of
    from shuteye.models.sources import resolve_source

    source = resolve_source(order.model, revision=order.revision, cache_dir=Path(order.cache_dir), offline=True)
    form = ImageForm(order.quantization, order.packed)
    return store.open(identity_of(source, served_dtype(source, order.dtype), order.place, form))


def make(order: Order, progress: Progress) -> str:
    """Fetch and convert in this process; the image's key."""
    from shuteye.models.sources import resolve_source

    cache_dir = Path(order.cache_dir)
    source = resolve_source(
        order.model, revision=order.revision, cache_dir=cache_dir, offline=order.offline, progress=progress
    )
    from shuteye.models.image_builder import open_image  # torch takes seconds, which a name that is wrong need not
    from shuteye.models.image_form import ImageForm

    form = ImageForm(order.quantization, order.packed)
    store = ImageStore(cache_dir)
    image = open_image(source, dtype=order.dtype, store=store, progress=progress, place=order.place, form=form)
    image.close()
    return image.identity.key


def make_apart(order: Order, progress: Progress) -> str:
    """`make` in a process of its own, which ends with this one."""
    with _ended(subprocess.Popen(_command(order), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None
        last = _follow(process.stdout, progress)
        code = process.wait()
    if isinstance(last, Done):
        return last.key
    if isinstance(last, Refused):
        raise rebuild(last.kind, last.message, last.param)
    raise _unexpected_end(order.model, code)


def _command(order: Order) -> tuple[str, ...]:
    return (
        sys.executable,
        "-P",
        "-m",
        "shuteye.models.converter",
        str(os.getpid()),
        msgspec.json.encode(order).decode(),
    )


def _unexpected_end(model: str, code: int) -> ShuteyeError:
    what = f"The process that converted {model!r}"
    if code == -signal.SIGKILL:
        return MemoryExhausted(
            f"{what} was killed (SIGKILL), as the system does when memory runs out. "
            "Free memory, or convert with `shuteye pull` where there is more."
        )
    if code < 0:
        return ImageFailure(f"{what} was ended by {signal.Signals(-code).name} before it was done. Try again.")
    return InternalError(f"{what} ended with status {code} before it was done; stderr says why.")


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Whatever happens here, such as Ctrl-C, the process is gone afterwards, and what it had begun is deleted."""
    with process:
        try:
            yield process
        except BaseException:
            process.terminate()
            try:
                process.wait(END_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def _follow(lines: IO[bytes], progress: Progress) -> Refused | Done | None:
    """Pass on what is told of progress; the last line is what came of it, or None if there was none."""
    decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)
    for line in lines:
        match decoder.decode(line):
            case Refused() | Done() as end:
                return end
            case event:
                progress(event)
    return None


# --- the process itself -----------------------------------------------------------------------------


def _stdout_for_us_alone() -> IO[bytes]:
    """Our own copy of stdout; whatever else prints there goes to stderr."""
    file = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return file


def _outcome(order: Order, progress: Progress) -> Line:
    try:
        return Done(make(order, progress))
    except ShuteyeError as error:
        return Refused(type(error).__name__, error.message, error.param)
    except MemoryError:
        return Refused(MemoryExhausted.__name__, f"There is not enough memory to convert {order.model!r}.", None)


def main() -> None:
    """Make one image, tell how it goes, and end."""
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever started us decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was begun is deleted
    file = _stdout_for_us_alone()

    def tell(line: Line) -> None:
        file.write(msgspec.json.encode(line) + b"\n")
        file.flush()

    tell(_outcome(msgspec.json.decode(sys.argv[2], type=Order), tell))


if __name__ == "__main__":
    main()
