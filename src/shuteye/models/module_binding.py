"""A transformers module bound to an image and its arena: every parameter a view, every buffer real."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shuteye.errors import ImageFailure
from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.memory.layout import Slot
from shuteye.models.binding import slot_names_of
from shuteye.models.packed_weight import PackedWeight
from shuteye.models.tensors import buffers_of, slot_view


def bind_module(module: Any, image: WeightImage, arena: Arena, *, native: bool = True) -> None:
    """Give every parameter of a module without weights its place in `arena`, and every kept buffer its values.

    Args:
        arena: has the image's layout; need not be resident yet.
        native: let native kernels compute with quantized weights where they can be used.

    Raises:
        ImageFailure: image and module disagree; the message names the tensors.
    """
    _bind_parameters(module, image, arena, native=native)
    _bind_buffers(module, buffers_of(image))
    _require_complete(module, image)


def _bind_parameters(module: Any, image: WeightImage, arena: Arena, *, native: bool) -> None:
    """Tied parameters become one and the same, as the image says, whatever the config does."""
    slot_names = slot_names_of(image)
    bound: dict[str, nn.Parameter] = {}
    for name, blank in list(module.named_parameters(remove_duplicate=False)):
        slot = image.layout.slots.get(slot_names.get(name, ""))
        if slot is None or slot.shape != tuple(blank.shape):
            raise ImageFailure(
                f"{image.path} has {'no tensor ' if slot is None else 'another shape of '}{name!r}, which "
                f"{type(module).__name__} needs as {tuple(blank.shape)}. Remove the image to have it rebuilt."
            )
        if slot.name not in bound:
            bound[slot.name] = _parameter(arena, slot, native=native)
        owner, leaf = _owner(module, name)
        owner.register_parameter(leaf, bound[slot.name])


def _parameter(arena: Arena, slot: Slot, *, native: bool) -> nn.Parameter:
    """What a module is to have for a tensor of its own."""
    if slot.matrix_kind.is_quantized:
        packed: Any = PackedWeight.of_slot(arena, slot, native=native)
        return packed  # type: ignore[no-any-return]  # to torch it is one
    return nn.Parameter(slot_view(arena, slot), requires_grad=False)


def _bind_buffers(module: Any, buffers: dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        owner, leaf = _owner(module, name)
        owner.register_buffer(leaf, buffer, persistent=True)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _require_complete(module: nn.Module, image: WeightImage) -> None:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    assert not (blank := [name for name, tensor in tensors if tensor.is_meta]), f"still without memory: {blank}"
    slot_names = slot_names_of(image)
    bound = {slot_names[name] for name, _ in module.named_parameters(remove_duplicate=False)}
    unused = set(image.layout.slots) - bound
    if unused:
        raise ImageFailure(
            f"{image.path} has tensors that {type(module).__name__} does not know: {', '.join(sorted(unused)[:5])}. "
            "Remove the image to have it rebuilt."
        )
