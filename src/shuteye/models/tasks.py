"""What a checkpoint was made for, and the class of transformers that computes it.

Knows nothing of weights, nor of whether a model of that task can be served.
"""

from __future__ import annotations

import inspect
from typing import Any

from shuteye.errors import UnsupportedModel

SERVED_TASKS = ("generate", "embed", "score", "transcribe")

_TASKS_BY_HEAD = {
    "ForCausalLM": "generate",
    "LMHeadModel": "generate",
    "ForSequenceClassification": "score",
    "ForTokenClassification": "classify",
    "ForConditionalGeneration": "transcribe",
    "ForSpeechSeq2Seq": "transcribe",
    "ForMaskedLM": "embed",
    "Model": "embed",
}

_MAPPINGS = {
    "generate": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "embed": "MODEL_MAPPING",
    "score": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "transcribe": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
}
_WHAT = {
    "generate": "causal language model",
    "embed": "plain model",
    "score": "model for sequence classification",
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
