"""Can this model generate correctly here? If not, why not.

Knows nothing of weights: a config is enough, because the model's own code is asked (see probe.py).
"""

from __future__ import annotations

import inspect
from typing import Any

from shuteye.errors import UnsupportedModel
from shuteye.models.probe import AttentionFacts, probe_attention
from shuteye.models.tasks import model_class, task_of


def check(config: Any) -> AttentionFacts:
    """What attention and KV cache must be made for, if the model of `config` can generate correctly.

    Raises:
        UnsupportedModel: it cannot; the message says why.
    """
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"Model type {config.model_type!r} is an encoder-decoder; only decoders are served.")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModel(f"Model type {config.model_type!r} is multimodal; only text models are served.")
    refuse_quantized(config)
    task = task_of(config)
    if task != "generate":
        raise UnsupportedModel(f"{config.architectures[0]} is a model for {task!r}, not one that generates.")
    _check_class(model_class(config))
    return probe_attention(config)


def refuse_quantized(config: Any) -> None:
    """Refuse checkpoints with packed weights.

    Raises:
        UnsupportedModel: names the method.
    """
    if getattr(config, "quantization_config", None) is not None:
        method = _quantization_method(config.quantization_config)
        raise UnsupportedModel(
            f"The checkpoint is quantized ({method}), which is not read; use the unquantized one or a .gguf file."
        )


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


def _quantization_method(quantization: Any) -> str:
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "unknown method"))
    return str(getattr(quantization, "quant_method", "unknown method"))
