"""`shuteye images`: list, remove and verify weight images.

Knows nothing of how images are made.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from shuteye.cli.sizes import format_size
from shuteye.cli.terminal import show, show_json, table
from shuteye.config import default_cache_dir
from shuteye.errors import ImageFailure, InvalidRequest

if TYPE_CHECKING:
    from shuteye.memory.image_store import ImageStore, ImageSummary

app = App(name="images", help="List, remove and verify weight images.", help_epilogue="Example: shuteye images ls")

CacheDir = Annotated[Path | None, Parameter(help="Where images live.", env_var="SHUTEYE_CACHE_DIR")]
Keys = Annotated[tuple[str, ...], Parameter(help="Keys as `ls` shows them, or the beginning of one.", negative="")]


def _store(cache_dir: Path | None) -> ImageStore:
    from shuteye.memory.image_store import ImageStore

    return ImageStore(cache_dir or default_cache_dir())


@app.command(name="ls", help_epilogue="Example: shuteye images ls --json")
def list_images(
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """List weight images."""
    images = _store(cache_dir).list()
    if as_json:
        show_json([asdict(image) for image in images])
    elif images:
        show(table(("KEY", "MODEL", "DTYPE", "SIZE ", "LAST USED", "STATE"), map(_row, images)))
    else:
        show("No images.")


def _row(image: ImageSummary) -> tuple[str, ...]:
    used = datetime.fromtimestamp(image.last_used).astimezone().strftime("%Y-%m-%d %H:%M")
    state = f"damaged: {image.damage}" if image.damage else "in use" if image.in_use else ""
    return (image.key, image.source, image.dtype, format_size(image.nbytes), used, state)


@app.command(name="rm", help_epilogue="Example: shuteye images rm --all")
def remove_images(
    keys: Keys = (),
    /,
    *,
    everything: Annotated[
        bool, Parameter(name="--all", negative="", help="Remove every image that is not in use.")
    ] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Remove weight images; each is built again when its model is next loaded."""
    store = _store(cache_dir)
    if bool(keys) == everything:
        raise InvalidRequest("Name the images to remove, as `shuteye images ls` shows them, or give --all.")
    for key in keys or [image.key for image in store.list() if not image.in_use]:
        show(f"Removed {key}: {format_size(store.remove(key))}.")


@app.command(name="verify", help_epilogue="Example: shuteye images verify")
def verify_images(keys: Keys = (), /, *, cache_dir: CacheDir = None) -> int:
    """Read whole images, all if none is named, and compare them with their checksums; exit status 1 if any differs."""
    store = _store(cache_dir)
    return max([_verify(store, key) for key in keys or [image.key for image in store.list()]], default=0)


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
