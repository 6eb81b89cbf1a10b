"""The tensors of a checkpoint whose matrices are quantized, under the names that transformers' modules have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shuteye.errors import UnsupportedModel
from shuteye.matrices.kinds import MatrixKind
from shuteye.matrices.stored import StoredMatrix

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class QuantizedTensors:
    """What a checkpoint holds; nothing is read before it is asked for.

    Attributes:
        matrices: the quantized ones: what they are once packed, [rows, columns].
        floats: all others, by shape.
        read: gives one, either as it is stored or as float32; raises `UnsupportedModel` if it is damaged.
        rope_factors: what each rotary frequency is to be divided by [head_dim / 2]; None: they are the config's.
    """

    matrices: Mapping[str, tuple[MatrixKind, tuple[int, int]]]
    floats: Mapping[str, tuple[int, ...]]
    read: Callable[[str], StoredMatrix | NDArray[np.float32]]
    rope_factors: NDArray[np.float32] | None = None

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return HEAD not in self.matrices and HEAD not in self.floats


def fitted(name: str, tensors: QuantizedTensors, shapes: Mapping[str, tuple[int, ...]]) -> QuantizedTensors:
    """The tensors that a module needs.

    Quantizers are known to store biases of zeros where a model has none, and a head that is the embedding once more;
    these are left out.

    Args:
        name: of the checkpoint.
        shapes: of the module's parameters, tied ones only under the name of their owner.

    Raises:
        UnsupportedModel: some are missing, of other shapes, or more than the module has.
    """
    found = {each: shape for each, (_, shape) in tensors.matrices.items()} | dict(tensors.floats)
    more = {each for each in found.keys() - shapes.keys() if not _is_void(tensors, each)}
    wrong = {each for each in found.keys() & shapes.keys() if found[each] != tuple(shapes[each])}
    for what, names in (("missing", shapes.keys() - found.keys()), ("of another shape", wrong), ("unknown", more)):
        if names:
            raise UnsupportedModel(
                f"{name}: the checkpoint does not fit the model, {what}: {', '.join(sorted(names)[:5])}"
            )
    matrices = {each: facts for each, facts in tensors.matrices.items() if each in shapes}
    return replace(tensors, matrices=matrices, floats={each: found[each] for each in tensors.floats if each in shapes})


def _is_void(tensors: QuantizedTensors, name: str) -> bool:
    """Whether a tensor that no module needs changes nothing: zeros that are added, or the embedding as the head."""
    if name not in tensors.floats:
        return False
    if name == HEAD:
        return EMBEDDING in tensors.floats and np.array_equal(_floats(tensors, name), _floats(tensors, EMBEDDING))
    return name.endswith(".bias") and not _floats(tensors, name).any()


def _floats(tensors: QuantizedTensors, name: str) -> NDArray[np.float32]:
    found = tensors.read(name)
    assert isinstance(found, np.ndarray), f"{name} is quantized"
    return found
