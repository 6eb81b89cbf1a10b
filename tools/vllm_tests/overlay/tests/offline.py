"""In the place of the runner of vLLM's offline tests: `shuteye.LLM`, in this process, called as theirs is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import vllm.outputs
from in_place import stand_in
from transformers import AutoTokenizer
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams as TheirParams

import shuteye
from shuteye.errors import ShuteyeError
from shuteye.tasks.generate.requests import RequestOutput

vllm.outputs.RequestOutput = RequestOutput  # type: ignore[misc]

_KEPT = ("max_model_len", "seed", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size")
"""Options that mean the same here; the others say how vLLM computes."""


class VllmRunner:
    """What vLLM's tests make an engine with."""

    def __init__(self, model_name: str, **options: Any) -> None:
        kept = {name: options[name] for name in _KEPT if options.get(name) is not None}
        if options.get("distributed_executor_backend") == "ray":
            kept["distributed_executor_backend"] = "ray"
        self._engine = shuteye.LLM(stand_in(model_name), **({"max_model_len": 1024} | kept))
        self.llm = Offline(self._engine, model_name)

    def __enter__(self) -> VllmRunner:
        return self

    def __exit__(self, *_error: object) -> None:
        self._engine.close()


class Offline:
    """vLLM's `LLM`: its arguments become ours, and our errors theirs."""

    def __init__(self, engine: shuteye.LLM, model: str) -> None:
        self._engine = engine
        self._model = model
        self.llm_engine = self

    def generate(
        self, prompts: Any, sampling_params: Any = None, *, priority: Any = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Complete every prompt."""
        given = [prompts] if isinstance(prompts, str | dict) else prompts
        texts = [each["prompt_token_ids"] if isinstance(each, dict) else each for each in given]
        return self._asked(self._engine.generate, texts, sampling_params, priority)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        priority: Any = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer every conversation."""
        conversations = [messages] if isinstance(messages[0], dict) else messages
        return self._asked(self._engine.chat, conversations, sampling_params, priority, **chat_template_kwargs or {})

    def _asked(
        self, ask: Callable[..., list[RequestOutput]], prompts: Sequence[Any], params: Any, priority: Any, **more: Any
    ) -> list[RequestOutput]:
        with _their_errors():
            return ask(prompts, _with_priority(_ours(params), priority, len(prompts)), **more)

    def collective_rpc(self, method: Any, *arguments: Any) -> list[Any]:
        """Ask every rank."""
        with _their_errors():
            return self._engine.collective_rpc(method, *arguments)

    def get_tokenizer(self) -> Any:
        """The one of transformers."""
        return AutoTokenizer.from_pretrained(self._model)

    def get_num_unfinished_requests(self) -> int:
        """Requests that run or wait."""
        return len(self._engine._engine.request_ids)


@contextmanager
def _their_errors() -> Iterator[None]:
    try:
        yield
    except ShuteyeError as error:
        raise VLLMValidationError(error.message, parameter=error.param) from error


def _ours(params: Any) -> Any:
    if params is None:
        return None
    if not isinstance(params, TheirParams):
        return [_ours(each) for each in params]
    usual = TheirParams()
    said = {name: getattr(params, name) for name in params.__struct_fields__ if not name.startswith("_")}
    fields = {
        name: value
        for name, value in said.items()
        if value != getattr(usual, name) and name in shuteye.SamplingParams.__dataclass_fields__
    }
    if (structure := params.structured_outputs) is not None:
        names = ("json", "json_object", "regex", "choice", "grammar", "disable_any_whitespace", "whitespace_pattern")
        wanted = {name: getattr(structure, name) for name in names if getattr(structure, name) is not None}
        fields["structured_outputs"] = shuteye.StructuredOutputsParams(**wanted)
    return shuteye.SamplingParams(**fields)


def _with_priority(params: Any, priority: Any, count: int) -> Any:
    """A request's priority is beside its parameters in vLLM, one for all or one for each."""
    if priority is None:
        return params
    if not isinstance(priority, int) and len(priority) != count:
        raise VLLMValidationError(f"{len(priority)} priorities for {count} prompts.", parameter="priority")
    each = params if isinstance(params, list) else [params or shuteye.SamplingParams()] * count
    wanted = [priority] * count if isinstance(priority, int) else priority
    return [replace(one, priority=its) for one, its in zip(each, wanted, strict=True)]
