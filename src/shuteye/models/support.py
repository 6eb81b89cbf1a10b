"""Can this model generate correctly here? If not, why not: its own code is run once on meta and asked.

A config is enough; no weights are needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shuteye.errors import UnsupportedModel
from shuteye.models.attention import check_arguments
from shuteye.models.image_spec import AttentionSpec
from shuteye.models.modules import build_module, model_class, quiet, task_of
from shuteye.models.rank_module import RankModule
from shuteye.parallel.module_shards import ModulePlan

_IMPLEMENTATION = "shuteye_probe"
_NUM_TOKENS = 8
_GRID = 24
"""Positions on which a model's mask function is compared with ours when it has no window."""


@dataclass(frozen=True, slots=True)
class _Mask:
    """Stands for a mask the model asked for."""

    window: int | None


class _Recorder:
    """What one run asked for, by layer."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        self.windows: dict[int, int | None] = {}
        self.cached: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


_recorder: ContextVar[_Recorder | None] = ContextVar("shuteye_probe", default=None)


def probe_attention(config: Any) -> AttentionSpec:
    """Run the model of `config` on meta and record every call of attention, mask and cache.

    Raises:
        UnsupportedModel: it needs something that paged attention or a KV cache cannot give; the message says what.
    """
    with _examining(config) as recorder:
        module = build_module(config, dtype=torch.bfloat16, attention=_IMPLEMENTATION, buffers_on_meta=True)
        _refuse_unusual_positions(module)
        positions = torch.arange(_NUM_TOKENS, device="meta")[None]
        module(input_ids=positions, **_inputs(recorder), logits_to_keep=_wanted())
    return _facts(recorder, module.config.num_hidden_layers)


def probe_part(config: Any, plan: ModulePlan, attention: AttentionSpec) -> None:
    """Run a rank's part of the model of `config` on meta, as if other ranks were there.

    Args:
        attention: of the whole model.

    Raises:
        UnsupportedModel: its modules do not compute with parts of that size; the message says what.
    """
    with _examining(config) as recorder:
        module = build_module(config, dtype=torch.bfloat16, attention=_IMPLEMENTATION, buffers_on_meta=True)
        part = RankModule(module, plan, add_up=lambda _: None, side_by_side=lambda columns: columns)
        part.attach_tied_head()
        blank = torch.empty((_NUM_TOKENS, plan.split.hidden_size), dtype=torch.bfloat16, device="meta")
        positions = torch.arange(_NUM_TOKENS, device="meta")[None]
        found = part(positions, None if plan.embeds else blank, wanted=_wanted(), **_inputs(recorder))
    wanted = dict.fromkeys(plan.spec.layers, (len(plan.spec.kv_groups), attention.head_dim))
    if recorder.shapes != wanted or (not plan.has_head and (found.shape, found.dtype) != (blank.shape, blank.dtype)):
        raise UnsupportedModel(
            f"Layers of a part of model type {config.model_type!r} attend with {recorder.shapes} (heads, head size), "
            f"expected {wanted}, and give {found.dtype} {tuple(found.shape)}, expected {blank.dtype} "
            f"{tuple(blank.shape)} where another stage follows. Serve it from one rank: leave out tensor_parallel_size "
            "and pipeline_parallel_size."
        )


@contextmanager
def _examining(config: Any) -> Iterator[_Recorder]:
    """Whatever a model's own code stumbles over inside is why it is refused."""
    _register()
    with _recording() as recorder, quiet(), torch.no_grad():
        try:
            yield recorder
        except (UnsupportedModel, AssertionError):
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"Model type {config.model_type!r} could not be examined: {type(error).__name__}: {error}"
            ) from error


def _inputs(recorder: _Recorder) -> dict[str, Any]:
    positions = torch.arange(_NUM_TOKENS, device="meta")[None]
    return {"position_ids": positions, "cache": _cache_spy(recorder), "use_cache": True}


def _wanted() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, device="meta")


def _facts(recorder: _Recorder, num_layers: int) -> AttentionSpec:
    if sorted(recorder.shapes) != list(range(num_layers)):
        raise UnsupportedModel(
            f"Only layers {sorted(recorder.shapes)} of {num_layers} use attention with a KV cache: hybrid models "
            "(linear attention, convolution, shared caches) are not served."
        )
    if len(set(recorder.shapes.values())) != 1:
        raise UnsupportedModel(f"Its layers differ in KV heads and head size: {sorted(set(recorder.shapes.values()))}.")
    num_kv_heads, head_dim = recorder.shapes[0]
    windows = tuple(recorder.windows[index] for index in range(num_layers))
    return AttentionSpec(num_layers, num_kv_heads, head_dim, windows)


def _refuse_unusual_positions(module: Any) -> None:
    """Positions must be counted from 0, and embedded without regard to the other sequences of a batch."""
    for part in module.modules():
        if hasattr(part, "create_position_ids_from_input_ids"):
            raise UnsupportedModel(f"{type(part).__name__} counts positions from its padding token, not from 0.")
        kinds = getattr(part, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                raise UnsupportedModel(
                    f"Its rotary embedding ({kind!r}) depends on the longest sequence of a batch, "
                    "which would let requests change each other's output."
                )


# --- what the model meets instead of the real things ----------------------------------------------


def _probing_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    recorder = _recorder.get()
    assert recorder is not None
    check_arguments({"dropout": dropout, **others})
    layer = getattr(module, "layer_idx", None)
    if layer is None or layer in recorder.shapes:
        raise UnsupportedModel(f"{type(module).__name__} does not say which layer it is, or attends twice in one.")
    if not isinstance(attention_mask, _Mask) or is_causal is False:
        raise UnsupportedModel(f"Layer {layer} attends without a causal mask.")
    if sliding_window not in (None, attention_mask.window):
        raise UnsupportedModel(f"Layer {layer} names a window of {sliding_window}, but masks {attention_mask.window}.")
    written = recorder.cached.get(layer)
    if written is None or written[0] is not key or written[1] is not value:
        raise UnsupportedModel(f"Layer {layer} does not attend to the keys and values that it puts into the cache.")
    if key.shape != value.shape or key.shape[-1] != query.shape[-1] or query.shape[1] % key.shape[1]:
        raise UnsupportedModel(
            f"Keys {tuple(key.shape)} and values {tuple(value.shape)} of layer {layer} differ in shape "
            "(multi-head latent attention is not served)."
        )
    recorder.shapes[layer] = (key.shape[1], key.shape[-1])
    recorder.windows[layer] = attention_mask.window
    return query.transpose(1, 2), None


def _probing_mask(mask_function: Callable[..., torch.Tensor], local_size: int | None = None, **_: Any) -> _Mask:
    """Compare the model's own mask, position by position, with the two that paged attention can do."""
    size = _GRID if local_size is None else max(_GRID, 2 * local_size + 2)
    # Around a window's edge the rows tell most; all of them would be quadratic.
    queries = torch.tensor(sorted({*range(min(size, _GRID)), *range(max(0, size - _GRID), size)}))
    keys = torch.arange(size)
    zero = torch.zeros((), dtype=torch.int64)
    seen = torch.as_tensor(mask_function(zero, zero, queries[:, None], keys[None])).expand(len(queries), size)
    behind = queries[:, None] - keys[None]
    if torch.equal(seen, behind >= 0):
        return _Mask(None)
    if local_size is not None and torch.equal(seen, (behind >= 0) & (behind < local_size)):
        return _Mask(local_size)
    raise UnsupportedModel(
        "Its attention mask is neither causal nor a causal sliding window (chunked or bidirectional)."
    )


def _cache_spy(recorder: _Recorder) -> Any:
    from transformers.cache_utils import Cache

    class CacheSpy(Cache):  # type: ignore[misc]  # transformers is untyped
        """A cache that can do keys and values, and refuses to be asked for any other state."""

        def __init__(self) -> None:
            pass

        is_compileable = False

        def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
            recorder.cached[layer_idx] = (key_states, value_states)
            return key_states, value_states

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

        def get_query_offset(self, layer_idx: int = 0) -> int:
            return 0

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return query_length, 0

        # Mask functions look here for the first layer of a kind.
        is_sliding: ClassVar[tuple[bool, ...]] = ()
        is_linear: ClassVar[tuple[bool, ...]] = ()
        is_dummy: ClassVar[tuple[bool, ...]] = ()

        def __getattr__(self, name: str) -> Any:
            raise UnsupportedModel(f"It keeps state other than keys and values (it asks its cache for `{name}`).")

    return CacheSpy()


@contextmanager
def _recording() -> Iterator[_Recorder]:
    recorder = _Recorder()
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def _register() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_IMPLEMENTATION, _probing_attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, _probing_mask)


def check(config: Any) -> AttentionSpec:
    """What attention and KV cache must be made for, if the model of `config` can generate correctly.

    Raises:
        UnsupportedModel: it cannot; the message says why.
    """
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"Model type {config.model_type!r} is an encoder-decoder; only decoders are served.")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModel(f"Model type {config.model_type!r} is multimodal; only text models are served.")
    task = task_of(config)
    if task != "generate":
        raise UnsupportedModel(f"{config.architectures[0]} is a model for {task!r}, not one that generates.")
    _check_class(model_class(config))
    return probe_attention(config)


def _check_class(found: Any) -> None:
    name = found.__name__
    if found._is_stateful:
        raise UnsupportedModel(f"{name} keeps a recurrent state (state-space or linear attention), not a KV cache.")
    if not found._supports_attention_backend:
        raise UnsupportedModel(f"{name} does not route its attention through transformers' AttentionInterface.")
    accepted = inspect.signature(found.forward).parameters
    missing = [needed for needed in ("position_ids", "logits_to_keep") if needed not in accepted]
    if missing:
        raise UnsupportedModel(f"{name} cannot be told {' and '.join(missing)}, which packed batches need.")
