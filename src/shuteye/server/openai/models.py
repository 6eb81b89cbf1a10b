"""What needs no weights and works while asleep: GET /v1/models, POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from msgspec import Struct
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext, contexts_of
from shuteye.server.http.answers import JsonAnswer
from shuteye.server.http.auth import InferenceRoute
from shuteye.server.openai.fields import Many, settle_unsupported
from shuteye.server.openai.prompts import Message, encode, render_chat, require_known
from shuteye.server.openai.tools import Tool, available_tools
from shuteye.tokenizer import LONG_TEXT, Tokenizer

router = APIRouter(route_class=InferenceRoute)


class ModelAnswer(Struct, kw_only=True):
    """One served name; how its weights and its KV cache are held is known once they are loaded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["shuteye"] = "shuteye"
    root: str
    parent: None = None
    max_model_len: int | None
    weights_format: str | None = None
    bits_per_weight: float | None = None
    kv_cache_dtype: str | None = None


class ModelsAnswer(Struct, kw_only=True):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


@router.get("/v1/models", response_model=None)
async def list_models(request: Request) -> Response:
    """All served names."""
    cards = [_card(name, context) for context in contexts_of(request.app) for name in context.model_names]
    return JsonAnswer(ModelsAnswer(data=cards))


@router.get("/v1/models/{name:path}", response_model=None)
async def retrieve_model(name: str, request: Request) -> Response:
    """One served name, which may hold slashes."""
    return JsonAnswer(_card(name, contexts_of(request.app).named(name)))


def _card(name: str, context: ServerContext) -> ModelAnswer:
    engine = context.engine
    loaded = engine.status != "starting" and engine.failure is None
    card = ModelAnswer(
        id=name, created=context.created, root=engine.config.model, max_model_len=engine.config.max_model_len
    )
    if loaded:
        info = engine.info
        card.max_model_len = info.max_model_len
        card.weights_format, card.bits_per_weight = info.weights_format, info.bits_per_weight
        card.kv_cache_dtype = info.kv_cache_dtype or None
    return card


_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "chat_template": (), "media_io_kwargs": ({},), "mm_processor_kwargs": ({},),
}  # fmt: skip
"""Fields that would change the tokens, each with the values that ask for nothing; null is always one."""

_ONE_OF_TWO: JsonDict = {
    "oneOf": [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
    ]
}


class TokenizeBody(BaseModel):
    """A text, or a conversation to be rendered first (vLLM's shape)."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_ONE_OF_TWO)

    model: str | None = None
    prompt: str | None = None
    messages: Many[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Many[Tool] | None = None

    @model_validator(mode="before")
    @classmethod
    def _settle_unsupported(cls, body: Any) -> Any:
        return settle_unsupported(body, cls.model_fields, unsupported=_UNSUPPORTED)

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Send either prompt or messages.", param="prompt")
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt cannot both be true.", param="continue_final_message"
            )
        return self


class DetokenizeBody(BaseModel):
    """Token ids."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: Many[int]

    @model_validator(mode="before")
    @classmethod
    def _settle_unsupported(cls, body: Any) -> Any:
        return settle_unsupported(body, cls.model_fields, unsupported={})


class TokenizerAnswer(Struct):
    """Answer of GET /tokenizer_info (vLLM's names)."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    vocab_size: int
    model_max_length: int
    chat_template: str | None


class TokensAnswer(Struct):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class TextAnswer(Struct):
    """Answer of POST /detokenize."""

    prompt: str


@router.get("/tokenizer_info", response_model=None)
async def tokenizer_info(context: Context) -> Response:
    """What is known of the tokenizer, its chat template included."""
    tokenizer = context.engine.tokenizer
    template = tokenizer.template_source() if tokenizer.has_chat_template else None
    answer = TokenizerAnswer(
        tokenizer_class=type(tokenizer).__name__,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        vocab_size=tokenizer.vocab_size,
        model_max_length=context.engine.info.max_model_len,
        chat_template=template,
    )
    return JsonAnswer(answer)


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeBody, context: Context) -> Response:
    """Token ids of a text; special tokens are added to a text by default, to a rendered conversation not."""
    context.served_name(body.model)
    tokenizer = context.engine.tokenizer
    text = body.prompt
    if body.messages is not None:
        text = await render_chat(
            tokenizer,
            body.messages,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            template_kwargs=body.chat_template_kwargs or {},
            tools=available_tools(body.tools, None),
            continue_final_message=body.continue_final_message,
        )
    assert text is not None
    add_special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    tokens = await encode(tokenizer, text, add_special_tokens=add_special)
    spelled = await _spelled(tokenizer, tokens) if body.return_token_strs else None
    return JsonAnswer(TokensAnswer(len(tokens), context.engine.info.max_model_len, tokens, spelled))


async def _spelled(tokenizer: Tokenizer, tokens: list[int]) -> list[str | None]:
    if len(tokens) > LONG_TEXT:
        return await asyncio.to_thread(lambda: [tokenizer.id_to_token(token) for token in tokens])
    return [tokenizer.id_to_token(token) for token in tokens]


@router.post("/detokenize", response_model=None)
async def detokenize(body: DetokenizeBody, context: Context) -> Response:
    """The text of token ids, special tokens included."""
    context.served_name(body.model)
    engine = context.engine
    require_known(body.tokens, engine.info.vocab_size, param="tokens")
    if len(body.tokens) > LONG_TEXT:
        text = await asyncio.to_thread(engine.tokenizer.decode, body.tokens, skip_special_tokens=False)
    else:
        text = engine.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return JsonAnswer(TextAnswer(text))
