"""Llama-like decoders as one flat loop: what transformers' modules compute, without the modules.

A model that is not recognised to the last detail keeps its modules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shuteye.matrices.bfloat16 import float32_of
from shuteye.models.flat_weights import FlatWeights
from shuteye.models.native_loop import NativeLoop
from shuteye.native import MAX_TOKENS, available

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache
    from shuteye.models.torch_loop import TorchLoop
    from shuteye.tasks.generate.runner import PackedBatch

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Types whose layer is exactly that of the loop: pre-norm, rotary positions, gated SiLU; nothing scaled or clipped."""

INVERSE_FREQUENCIES = "model.rotary_emb.inv_freq"
"""The buffer that the loop needs: float32 [head_dim / 2]."""


@dataclass(frozen=True, slots=True)
class FusedSpec:
    """What the loop must know beside tensors; an image keeps it, so that later loads need no module.

    Attributes:
        attention_scale: of the attention logits.
        rotary_scale: of cosines and sines (YaRN's attention factor; 1 elsewhere).
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    attention_scale: float
    rotary_scale: float


def recognise(module: Any) -> FusedSpec | None:
    """The facts of a transformers module that the loop can stand in for; None for any other."""
    config = module.config
    if config.model_type not in MODEL_TYPES or config.hidden_act != "silu":
        return None
    attention = module.model.layers[0].self_attn
    return FusedSpec(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        norm_eps=config.rms_norm_eps,
        attention_scale=attention.scaling,
        rotary_scale=module.model.rotary_emb.attention_scaling,
    )


_LAYER = re.compile(r"^(?:.*?\.)?(?:layers|h|blocks)\.\d+(?=\.)")


def group_of(name: str) -> str:
    """The layer a tensor belongs to (`model.layers.3`), or its own module: what is brought in together."""
    match = _LAYER.match(name)
    return match[0] if match else name.rpartition(".")[0]


class FusedDecoder:
    """The whole model of a packed step: by native kernels where they are to be had, else in torch.

    Args:
        frequencies: inverse frequencies of the rotation, float32 [head_dim / 2].
        windows: per layer, how many positions back a token sees, itself included; None sees all.
        native: whether to use the native kernels if they can be used here.

    Attributes:
        native_tokens: the largest step that the native kernels compute at once; 0 if they are not used.
    """

    def __init__(
        self,
        facts: FusedSpec,
        weights: FlatWeights,
        frequencies: NDArray[np.float32],
        windows: Sequence[int | None],
        *,
        native: bool = True,
    ) -> None:
        self._loop: NativeLoop | TorchLoop
        if native and NativeLoop.computes(facts, weights.dtype):
            self.native_tokens = MAX_TOKENS
            self._loop = NativeLoop(facts, weights, frequencies)
            return
        from shuteye.models.torch_loop import TorchLoop

        self.native_tokens = 0
        self._loop = TorchLoop(facts, weights, frequencies, windows, native=native and available())

    def forward(self, batch: PackedBatch, kv_cache: KVCache) -> NDArray[np.float32]:
        """Compute a step: logits [num_sampled, vocab_size]."""
        return float32_of(self._loop.compute(batch, kv_cache))
