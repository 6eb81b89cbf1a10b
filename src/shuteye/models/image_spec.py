"""What an image's metadata says of a model that generates. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from shuteye.models.binding import CommonSpec
from shuteye.models.fused import FusedSpec


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a KV cache and paged attention must be made for.

    Attributes:
        windows: per layer, how many positions back a token sees, itself included; None sees all.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class ImageSpec(CommonSpec):
    """The facts.

    Attributes:
        eos_token_ids: the tokens that end an answer, by generation config and config.
        default_sampling: what the checkpoint's generation config recommends.
        fused: what the flat loop must know, if it can stand in for the modules.
    """

    eos_token_ids: tuple[int, ...]
    default_sampling: dict[str, float]
    attention: AttentionSpec
    fused: FusedSpec | None
