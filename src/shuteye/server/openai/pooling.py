"""What the routes of models that embed, score or classify share: fields of their bodies, counts, and what is timed.

As with generation, a field is used, known to be harmless, or refused.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Literal, TypeVar

from fastapi import Request
from msgspec import Struct
from pydantic import BaseModel, ConfigDict, Field, model_validator

from shuteye.server.context import ServerContext
from shuteye.server.http.admission import require_prompt_tokens
from shuteye.server.http.events import until_disconnect
from shuteye.server.openai.fields import settle_unsupported
from shuteye.tasks.pool.requests import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingParams,
    ScoringRequestOutput,
)

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "activation": (), "chat_template": (), "chat_template_kwargs": ({},), "embed_dtype": ("float32",),
    "endianness": ("native", "little"), "instruction": (), "label_token_ids": (), "max_chunks_per_doc": (),
    "media_io_kwargs": ({},), "messages": (), "mm_processor_kwargs": ({},), "normalize": (), "priority": (0,),
    "rank_fields": (["text"],), "softmax": (), "task": (),
}  # fmt: skip
"""Fields that would change the answer, each with the values that ask for nothing; null is always one."""

PooledOutputs = Sequence[EmbeddingRequestOutput | ScoringRequestOutput | ClassificationRequestOutput]
OutputT = TypeVar("OutputT", EmbeddingRequestOutput, ScoringRequestOutput, ClassificationRequestOutput)


class PoolingFields(BaseModel):
    """Fields of all of these routes; None means that the caller did not say. Nothing is cached, salted or not."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    padding: Literal["max_length", "do_not_pad"] | None = None
    use_activation: bool | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)

    @model_validator(mode="before")
    @classmethod
    def _settle_unsupported(cls, body: Any) -> Any:
        return settle_unsupported(body, cls.model_fields, unsupported=UNSUPPORTED)

    def pooling_params(self, **others: Any) -> PoolingParams:
        """What the caller said.

        Args:
            others: fields of the route's own.

        Raises:
            InvalidRequest: a value is out of range.
        """
        return PoolingParams(
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            use_activation=self.use_activation,
            truncation_side=self.truncation_side or "right",
            padding=self.padding,
            **others,
        )

    def require_affordable_padding(self, context: ServerContext, count: int) -> None:
        """Refuse to fill up more inputs than one request may have tokens.

        Raises:
            InvalidRequest: says how many there would be.
        """
        if self.padding != "max_length":
            return
        cut, longest = self.truncate_prompt_tokens, context.engine.info.max_model_len
        require_prompt_tokens(count * (longest if cut is None or cut < 1 else min(cut, longest)), param="padding")


class PoolingUsage(Struct):
    """Token counts of one request; nothing is generated."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


def usage_of(outputs: PooledOutputs) -> PoolingUsage:
    """How many tokens were read."""
    count = sum(len(output.prompt_token_ids) for output in outputs)
    return PoolingUsage(count, count)


async def computed(request: Request, context: ServerContext, work: Coroutine[Any, Any, list[OutputT]]) -> list[OutputT]:
    """What comes of `work`, timed; given up when the client goes."""
    with context.metrics.request() as timer:
        outputs = await until_disconnect(request.receive, work)
        timer.finish(num_prompt_tokens=usage_of(outputs).prompt_tokens, scheduled_at=outputs[0].scheduled_at)
    return outputs
