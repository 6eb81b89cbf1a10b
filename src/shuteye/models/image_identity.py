"""What the image of a checkpoint is filed under: known without reading its weights, or importing torch."""

from __future__ import annotations

from dataclasses import replace

from shuteye.memory.image import ImageIdentity
from shuteye.models.image_form import AS_STORED, ImageForm
from shuteye.models.sources import ModelSource
from shuteye.parallel.shards import ONE_RANK, RankPlace

RECIPE = 6
"""Part of every image's identity: to be raised when the same checkpoint is to give another image, or other shards."""


def identity_of(
    source: ModelSource, dtype: str, place: RankPlace = ONE_RANK, form: ImageForm = AS_STORED
) -> ImageIdentity:
    """The identity of the image of `source` in `dtype`, or of a rank's part of it."""
    label = replace(form, packed=form.packed or dtype == "float32").label  # float32 lies in rows either way
    return ImageIdentity(source.name, f"{source.fingerprint}.{RECIPE}", dtype, place.label, label)
