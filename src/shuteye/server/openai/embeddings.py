"""POST /v1/embeddings and /pooling: OpenAI's and vLLM's shapes, of texts, token ids or conversations."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from msgspec import Struct, to_builtins
from pydantic import field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import new_request_id
from shuteye.server.http.admission import ModelRoute, needs_task, require_sequences
from shuteye.server.http.answers import JsonAnswer
from shuteye.server.openai.fields import Many, one_message
from shuteye.server.openai.pooling import PooledOutputs, PoolingFields, PoolingUsage, computed, usage_of
from shuteye.server.openai.prompts import Message, encode, render_chat
from shuteye.server.openai.vectors import VectorFields
from shuteye.tasks.pool.inputs import Prompt
from shuteye.tasks.pool.requests import ClassificationRequestOutput, EmbeddingOutput, EmbeddingRequestOutput

Conversations = Many[Message] | Many[Many[Message]]


class PooledBody(PoolingFields):
    """What is read: `input`, or `messages` through the chat template. Either may be one or a list of several."""

    input: str | Many[str] | Many[int] | Many[Many[int]] | Conversations | None = None
    messages: Conversations | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    _input_message = field_validator("input", mode="wrap")(
        one_message("a string, a list of strings, a list of token ids, a list of messages, or a list of such lists")
    )
    _messages_message = field_validator("messages", mode="wrap")(
        one_message("a non-empty list of messages, or a list of such lists")
    )

    @model_validator(mode="after")
    def _check_what_is_read(self) -> PooledBody:
        if (self.input is None) == (self.messages is None):
            raise InvalidRequest("Send exactly one of input and messages.", param="input")
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                param="continue_final_message",
            )
        return self

    async def prompts(self, context: ServerContext) -> list[Prompt]:
        """What is to be read: texts, or ids of conversations and of those that came as ids.

        Raises:
            InvalidRequest: there is nothing, or more than may be; the model has no chat template.
        """
        given = self.messages if self.messages is not None else self.input
        assert given is not None
        param = "input" if self.messages is None else "messages"
        if not given:
            raise InvalidRequest(f"The {param} is empty; send at least one text.", param=param)
        several: Sequence[Any] = [given] if isinstance(given, str) or isinstance(given[0], int | Message) else given
        require_sequences(context.config, len(several), param=param)
        self.require_affordable_padding(context, len(several))
        return [await self._rendered(each, context) if _is_conversation(each) else each for each in several]

    async def _rendered(self, messages: Sequence[Message], context: ServerContext) -> list[int]:
        tokenizer = context.engine.tokenizer
        text = await render_chat(
            tokenizer,
            messages,
            add_generation_prompt=bool(self.add_generation_prompt),
            template_kwargs=self.chat_template_kwargs or {},
            continue_final_message=bool(self.continue_final_message),
        )
        return await encode(tokenizer, text, add_special_tokens=bool(self.add_special_tokens), one_of_many=True)


def _is_conversation(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and isinstance(given[0], Message)


class EmbeddingBody(PooledBody, VectorFields):
    """POST /v1/embeddings."""

    dimensions: int | None = None


class PoolingBody(EmbeddingBody):
    """POST /pooling: the same, with a task that can only be the model's."""

    task: Literal["embed", "classify", "token_embed", "token_classify", "plugin"] | None = None


class EmbeddingDatum(Struct):
    """One vector: numbers, or base64 of their bytes."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class PoolingDatum(Struct):
    """One vector: numbers, or base64 of their bytes."""

    object: Literal["pooling"]
    index: int
    data: list[float] | str


class EmbeddingAnswer(Struct, kw_only=True):
    """POST /v1/embeddings (OpenAI's shape)."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[EmbeddingDatum]
    usage: PoolingUsage


class PoolingAnswer(Struct, kw_only=True):
    """POST /pooling (vLLM's shape)."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PoolingDatum]
    usage: PoolingUsage


router = APIRouter(route_class=ModelRoute)


@router.post("/v1/embeddings", response_model=None, dependencies=[needs_task("embed")])
async def embeddings(request: Request, body: EmbeddingBody, context: Context) -> Response:
    """Embeds one or more texts, token ids or conversations."""
    model, request_id, created = context.served_name(body.model), new_request_id("embd"), int(time.time())
    outputs = await _embedded(request, body, context)
    if body.is_binary:
        return _binary(body, [each.outputs for each in outputs], outputs, (request_id, created, model))
    data = [EmbeddingDatum("embedding", index, body.written(each.outputs)) for index, each in enumerate(outputs)]
    return JsonAnswer(EmbeddingAnswer(id=request_id, created=created, model=model, data=data, usage=usage_of(outputs)))


@router.post("/pooling", response_model=None, dependencies=[needs_task("embed", "classify", "score")])
async def pooling(request: Request, body: PoolingBody, context: Context) -> Response:
    """Embeds or classifies one or more texts, token ids or conversations, and answers in vLLM's shape."""
    model, request_id, created = context.served_name(body.model), new_request_id("pool"), int(time.time())
    outputs: PooledOutputs
    if _task_of(body, context) == "embed":
        outputs = embedded = await _embedded(request, body, context)
        vectors = [each.outputs for each in embedded]
    else:
        outputs = classified = await classes(request, body, context, dimensions=body.dimensions, embed_dtype=body.dtype)
        vectors = [EmbeddingOutput(array("f", each.outputs.probs).tobytes()) for each in classified]
    if body.is_binary:
        return _binary(body, vectors, outputs, (request_id, created, model))
    data = [PoolingDatum("pooling", index, body.written(each)) for index, each in enumerate(vectors)]
    return JsonAnswer(PoolingAnswer(id=request_id, created=created, model=model, data=data, usage=usage_of(outputs)))


def _task_of(body: PoolingBody, context: ServerContext) -> str:
    """What vLLM calls the model's task.

    Raises:
        InvalidRequest: another one was asked for.
    """
    served = "embed" if context.engine.info.task == "embed" else "classify"
    if body.task == "plugin":
        raise InvalidRequest("No IOProcessor plugin installed.", param="task")
    if body.task not in {None, served}:
        raise InvalidRequest(f"Unsupported task: {body.task!r} Supported tasks: {(served,)}", param="task")
    return served


def _binary(
    body: VectorFields, vectors: Sequence[EmbeddingOutput], outputs: PooledOutputs, about: tuple[str, int, str]
) -> Response:
    request_id, created, model = about
    usage = to_builtins(usage_of(outputs))
    return body.binary(vectors, {"id": request_id, "created": created, "model": model, "usage": usage})


async def _embedded(request: Request, body: EmbeddingBody, context: ServerContext) -> list[EmbeddingRequestOutput]:
    params = body.pooling_params(dimensions=body.dimensions, embed_dtype=body.dtype)
    prompts = await body.prompts(context)
    work = context.engine.embed(prompts, params, add_special_tokens=body.add_special_tokens is not False)
    return await computed(request, context, work)


async def classes(
    request: Request, body: PooledBody, context: ServerContext, **others: Any
) -> list[ClassificationRequestOutput]:
    """The classes of what the body has; `others` are more of `PoolingParams`."""
    params = body.pooling_params(**others)
    prompts = await body.prompts(context)
    work = context.engine.classify(prompts, params, add_special_tokens=body.add_special_tokens is not False)
    return await computed(request, context, work)
