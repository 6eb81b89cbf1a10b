"""Transformers modules: which class computes a checkpoint, and one of it without weights, our attention chosen."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from shuteye.errors import UnsupportedModel

SERVED_TASKS = ("generate", "embed", "score", "classify", "transcribe")

_TASKS_BY_HEAD = {
    "ForCausalLM": "generate",
    "LMHeadModel": "generate",
    "ForSequenceClassification": "score",
    "ForTokenClassification": "token_classify",
    "ForConditionalGeneration": "transcribe",
    "ForSpeechSeq2Seq": "transcribe",
    "ForMaskedLM": "embed",
    "Model": "embed",
}

_MAPPINGS = {
    "generate": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "embed": "MODEL_MAPPING",
    "score": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "classify": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "transcribe": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
}
_WHAT = {
    "generate": "causal language model",
    "embed": "plain model",
    "score": "model for sequence classification",
    "classify": "model for sequence classification",
    "transcribe": "speech model",
}


def task_of(config: Any, *, sentence_transformers: bool = False) -> str:
    """What the checkpoint was made for, by the head that its config names; "generate" if it names none.

    Args:
        sentence_transformers: the checkpoint says how its states are pooled, so that it embeds, whatever its head.

    Raises:
        UnsupportedModel: a task that is not served; the message names it.
    """
    architecture = (config.architectures or ["ForCausalLM"])[0]
    task = next((task for head, task in _TASKS_BY_HEAD.items() if architecture.endswith(head)), "another task")
    if task == "transcribe" and type(config) not in _mapping("transcribe"):
        task = "another task"  # T5 and its like have a head of the same name
    if sentence_transformers and task == "generate":
        task = "embed"
    if task == "score" and config.num_labels != 1:
        task = "classify"
    if task not in SERVED_TASKS:
        raise UnsupportedModel(f"{architecture} is a model for {task!r}; served are {', '.join(SERVED_TASKS)}.")
    return task


def model_class(config: Any, task: str = "generate") -> type[Any]:
    """The class of transformers for `config` and `task`.

    Raises:
        UnsupportedModel: there is none.
    """
    found = _mapping(task).get(type(config), None)
    if found is None:
        raise UnsupportedModel(
            f"Model type {config.model_type!r} has no {_WHAT[task]} in transformers "
            f"(the checkpoint names {', '.join(config.architectures or ['nothing'])})."
        )
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def model_options(found: type[Any], task: str) -> dict[str, Any]:
    """What the class is to be told beside its config: no pooler, which embeddings do not use."""
    has_pooler = "add_pooling_layer" in inspect.signature(found.__init__).parameters
    return {"add_pooling_layer": False} if task == "embed" and has_pooler else {}


def _mapping(task: str) -> Any:
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, _MAPPINGS[task])


# --- modules without weights ----------------------------------------------------------------------


def build_module(
    config: Any, *, dtype: torch.dtype, attention: str, buffers_on_meta: bool = False, task: str = "generate"
) -> Any:
    """A module in eval mode whose parameters are on meta and need no gradients.

    Buffers are computed for real, as the model's constructor does (`inv_freq` is in no checkpoint), unless
    `buffers_on_meta`. The config is copied: the choice of attention is kept on it.
    """
    from transformers import initialization

    config = copy.deepcopy(config)
    if task == "generate":
        config.pad_token_id = None  # nothing is padded; some models look for it in every input
    found = model_class(config, task)
    options = model_options(found, task)
    device = torch.device("meta" if buffers_on_meta else "cpu")
    with _parameters_on_meta(), initialization.no_init_weights(), device:
        module = found._from_config(config, dtype=dtype, attn_implementation=attention, **options)
    return module.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters registered inside are moved to meta before anything has touched their memory."""

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.device.type == "meta":
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    hook: Callable[..., Any] = to_meta
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and log lines off the terminal; ours replace them."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    verbosity, bars, gguf_bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), gguf_reader.tqdm
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    gguf_reader.tqdm = logging.tqdm  # it alone ignores transformers' switch
    try:
        yield
    finally:
        gguf_reader.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def tied_names(module: Any) -> dict[str, str]:
    """Tied parameter → the parameter whose memory it shares, by full names, chains resolved."""
    ties: dict[str, str] = dict(module.all_tied_weights_keys)
    return {name: _resolve(ties, name) for name in ties}


def _resolve(ties: dict[str, str], name: str) -> str:
    while name in ties:
        name = ties[name]
    return name
