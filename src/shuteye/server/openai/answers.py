"""The shapes of answers, for the OpenAPI document alone: routes write their answers without them, as that is faster.

Knows nothing of how an answer comes about. Fields may be added to an answer; those here are always there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from shuteye.model_info import ModelInfo
from shuteye.state import EngineState, SchedulerStats, TagReport


class ErrorDetail(BaseModel):
    """What went wrong; the error of a sleeping model has no `param`."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorAnswer(BaseModel):
    """Every error (OpenAI's shape)."""

    error: ErrorDetail


class UsageAnswer(BaseModel):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessageAnswer(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None


class ChatChoiceAnswer(BaseModel):
    """One of `n` answers."""

    index: int
    message: ChatMessageAnswer
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatAnswer(BaseModel):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoiceAnswer]
    usage: UsageAnswer


class CompletionChoiceAnswer(BaseModel):
    """One of `n` continuations of one prompt."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str


class CompletionAnswer(BaseModel):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoiceAnswer]
    usage: UsageAnswer


class EmbeddingDatum(BaseModel):
    """One vector: numbers, or base64 of their float32 bytes."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class ResponseAnswer(BaseModel):
    """Answer of POST /v1/responses; `output` holds reasoning, messages and function calls."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    model: str


class EmbeddingAnswer(BaseModel):
    """POST /v1/embeddings (OpenAI's shape)."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingDatum]
    usage: UsageAnswer


class PoolingDatum(BaseModel):
    """One vector: numbers, or base64 of their float32 bytes."""

    object: Literal["pooling"]
    index: int
    data: list[float] | str


class PoolingAnswer(BaseModel):
    """POST /pooling (vLLM's shape)."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PoolingDatum]
    usage: UsageAnswer


class ScoreDatum(BaseModel):
    """How well two texts go together."""

    object: Literal["score"]
    index: int
    score: float


class ScoreAnswer(BaseModel):
    """POST /score (vLLM's shape)."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreDatum]
    usage: UsageAnswer


class RankedAnswer(BaseModel):
    """One document, by its place in the request; its text unless `return_documents` is false."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class RerankAnswer(BaseModel):
    """POST /rerank (Cohere's and Jina's shape); the best first."""

    id: str
    model: str
    results: list[RankedAnswer]
    usage: UsageAnswer


class ModelAnswer(BaseModel):
    """One served name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class TranscriptionAnswer(BaseModel):
    """Answer of POST /v1/audio/transcriptions; `verbose_json` has more, the other formats are text."""

    text: str
    usage: dict[str, Any]


class ModelsAnswer(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelAnswer]


class TokensAnswer(BaseModel):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class TextAnswer(BaseModel):
    """Answer of POST /detokenize."""

    prompt: str


class AliveAnswer(BaseModel):
    """Answer of GET /ping, and of GET /health with 200."""

    status: Literal["ok"]


class UnhealthyAnswer(BaseModel):
    """Answer of GET /health with 503; `error` is there unless the model loads."""

    status: Literal["loading", "faulted", "hung", "dead", "failed", "closed"]
    error: ErrorDetail | None = None


class VersionAnswer(BaseModel):
    """Answer of GET /version."""

    version: str


class ReadyAnswer(BaseModel):
    """Answer of GET /ready; `reason` is there unless it is ready."""

    ready: bool
    reason: str | None = None


class StateAnswer(BaseModel):
    """Answer of GET /state."""

    status: Literal["starting", "ready", "hung", "failed", "dead", "closed"]
    failure: str | None
    models: list[str]
    is_sleeping: bool
    is_paused: bool
    ready: bool
    state: EngineState
    waking: dict[str, Any]
    model: ModelInfo | None
    stats: SchedulerStats


class SleepAnswer(BaseModel):
    """Answer of POST /sleep: vLLM's `status` and `level`, the tags that were asked for, and what was measured."""

    status: Literal["sleeping"]
    tags: list[str] | None
    tag_reports: list[TagReport]
    changed: bool
    level: int
    freed_bytes: int
    residual_bytes: int
    seconds: float
    aborted_requests: int
    held_requests: int


class WakeAnswer(BaseModel):
    """Answer of POST /wake_up: vLLM's `status` and `tags` (those that were asked for), and what was measured."""

    status: Literal["awake", "sleeping"]
    tags: list[str] | None
    tag_reports: list[TagReport]
    changed: bool
    restored_bytes: int
    verified: str
    verified_bytes: int
    canary: bool
    weights_source: str | None
    missing: list[str]
    seconds: float


class SleepingAnswer(BaseModel):
    """Answer of GET /is_sleeping."""

    is_sleeping: bool


class PausedAnswer(BaseModel):
    """Answer of GET /is_paused."""

    is_paused: bool


class DoneAnswer(BaseModel):
    """Answer of control calls that have no report."""

    status: str


class RpcAnswer(BaseModel):
    """One result a rank."""

    results: list[Any]


class RestartAnswer(BaseModel):
    """The engine that was dead is loaded again."""

    status: str
    seconds: float
