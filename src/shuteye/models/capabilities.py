"""Can this model be served correctly? If not, why not.

Knows nothing of weights: a config is enough, because the model's own code is asked (see probe.py).
"""

from __future__ import annotations

import inspect
from typing import Any

from shuteye.errors import UnsupportedModel
from shuteye.models.blueprint import model_class
from shuteye.models.probe import AttentionFacts, probe_attention

_TASKS_BY_HEAD = {
    "ForCausalLM": "generate",
    "LMHeadModel": "generate",
    "ForSequenceClassification": "score",
    "ForTokenClassification": "classify",
    "ForSpeechSeq2Seq": "transcribe",
    "ForMaskedLM": "embed",
    "Model": "embed",
}


def task_of(config: Any) -> str:
    """What the checkpoint was made for, by the head that its config names; "generate" if it names none.

    Raises:
        UnsupportedModel: a task that is not served yet; the message names it.
    """
    architecture = (config.architectures or ["ForCausalLM"])[0]
    task = next((task for head, task in _TASKS_BY_HEAD.items() if architecture.endswith(head)), "another task")
    if task != "generate":
        raise UnsupportedModel(f"{architecture} is a model for {task!r}; only text generation is served so far.")
    return task


def check(config: Any) -> AttentionFacts:
    """What attention and KV cache must be made for, if the model of `config` can be served correctly.

    Raises:
        UnsupportedModel: it cannot; the message says why.
    """
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"Model type {config.model_type!r} is an encoder-decoder; only decoders are served.")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModel(f"Model type {config.model_type!r} is multimodal; only text models are served.")
    if getattr(config, "quantization_config", None) is not None:
        method = _quantization_method(config.quantization_config)
        raise UnsupportedModel(
            f"The checkpoint is quantized ({method}), which is not read; use the unquantized one or a .gguf file."
        )
    task_of(config)
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


def _quantization_method(quantization: Any) -> str:
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "unknown method"))
    return str(getattr(quantization, "quant_method", "unknown method"))
