"""`shuteye pull`: fetch a model and build its weight image, so that serving it starts at once.

Knows nothing of where models come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from shuteye.cli.terminal import ProgressBars, format_size, show
from shuteye.config import DEFAULT_MODEL, DType, default_cache_dir


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
    cache_dir: Annotated[
        Path | None,
        Parameter(help="Where weight images and fetched wheels live.", env_var="SHUTEYE_CACHE_DIR"),
    ] = None,
    offline: Annotated[
        bool, Parameter(help="Fetch nothing; build the image from what is here.", env_var="SHUTEYE_OFFLINE")
    ] = False,
) -> None:
    """Fetch a model and build its weight image."""
    from shuteye.models.binding import Origin
    from shuteye.models.converter import Order, obtain_image

    directory = cache_dir or default_cache_dir()
    with ProgressBars() as progress:
        image = obtain_image(Order(model, str(directory), revision, dtype, offline), progress)
    origin = Origin.of(image)
    show(f"{model} is ready: {origin.source_format} from {origin.source}")
    show(f"{format_size(image.layout.nbytes)} of weights in {image.identity.dtype} in {image.path}")
    image.close()
