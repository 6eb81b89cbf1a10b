"""What callers of `embed` and `score` give and get, in terms of the inputs and rows that the engine knows.

Knows nothing of how inputs reach the engine; used alike by `LLM` and `AsyncEngine`.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import TypeVar

from shuteye.errors import InvalidRequest
from shuteye.model_info import ModelInfo
from shuteye.tasks.pool.requests import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PooledOutput,
    PoolingParams,
    PoolInput,
    ScoringOutput,
    ScoringRequestOutput,
)
from shuteye.tokenizer import LONG_TEXT, Tokenizer
from shuteye.typed_fields import require_instance

Prompt = str | Sequence[int]
Texts = str | Sequence[str]

T = TypeVar("T")


def as_list(texts: Texts) -> list[str]:
    """Texts as a list, however they were given."""
    return [texts] if isinstance(texts, str) else list(texts)


@dataclass(frozen=True, slots=True)
class PoolInputs:
    """Turns texts into inputs for the loaded model.

    Attributes:
        add_special_tokens: whether texts get the tokens that the model was trained to see around them.

    Raises:
        InvalidRequest: `params` are something else.
    """

    tokenizer: Tokenizer
    info: ModelInfo
    params: PoolingParams
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        require_instance(self.params, PoolingParams, param="pooling_params")

    def inputs(self, prompts: Sequence[Prompt]) -> tuple[PoolInput, ...]:
        """One input per prompt, cut if the parameters say so.

        Raises:
            InvalidRequest: a token id outside of the vocabulary, or a text that is not Unicode.
        """
        limit = self._limit()
        return tuple(self._input(prompt, limit) for prompt in prompts)

    def _input(self, prompt: Prompt, limit: int | None) -> PoolInput:
        if isinstance(prompt, str):
            return self._encode(prompt, None, limit)
        vocab_size = self.info.vocab_size
        outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise InvalidRequest(f"Token id {outside} is outside of the vocabulary of {vocab_size}.", param="input")
        return PoolInput(tuple(prompt[:limit]))

    def pairs(self, queries: Sequence[str], documents: Sequence[str]) -> tuple[PoolInput, ...]:
        """One input per pair of texts, for a model that reads both at once."""
        limit = self._limit()
        return tuple(self._encode(query, document, limit) for query, document in zip(queries, documents, strict=True))

    def _encode(self, text: str, pair: str | None, limit: int | None) -> PoolInput:
        token_ids, type_ids = self.tokenizer.encode_pair(
            text, pair, max_length=limit, add_special_tokens=self.add_special_tokens
        )
        return PoolInput(tuple(token_ids), tuple(type_ids) if any(type_ids) else ())

    def _limit(self) -> int | None:
        """Tokens that an input is cut to, None for those that must fit as they are."""
        wanted, context = self.params.truncate_prompt_tokens, self.info.max_model_len
        if wanted is not None and wanted > context:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {wanted}, but this model's context is {context} tokens; -1 cuts to that.",
                param="truncate_prompt_tokens",
            )
        return context if wanted == -1 else wanted


def embeddings_of(inputs: Sequence[PoolInput], output: PooledOutput) -> list[EmbeddingRequestOutput]:
    """One embedding per input, in their order."""
    return [
        EmbeddingRequestOutput(
            f"{output.request_id}-{index}", each.token_ids, EmbeddingOutput(row), scheduled_at=output.scheduled_at
        )
        for index, (each, row) in enumerate(zip(inputs, output.rows, strict=True))
    ]


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Pairs of texts on their way to scores.

    Attributes:
        inputs: what the engine computes.
        compared: per score, the two inputs whose embeddings are compared; None if each input is a pair.
    """

    inputs: tuple[PoolInput, ...]
    params: PoolingParams
    compared: tuple[tuple[int, int], ...] | None = None

    def scores(self, output: PooledOutput) -> list[ScoringRequestOutput]:
        """One score per pair, in their order."""
        if self.compared is None:
            found = [(each.token_ids, array("f", row)[0]) for each, row in zip(self.inputs, output.rows, strict=True)]
        else:
            vectors = [array("f", row) for row in output.rows]
            found = [
                (self.inputs[one].token_ids + self.inputs[other].token_ids, sum(map(mul, vectors[one], vectors[other])))
                for one, other in self.compared
            ]
        return [
            ScoringRequestOutput(
                f"{output.request_id}-{index}", token_ids, ScoringOutput(score), scheduled_at=output.scheduled_at
            )
            for index, (token_ids, score) in enumerate(found)
        ]


def score_job(maker: PoolInputs, queries: Texts, documents: Texts) -> ScoreJob:
    """How the loaded model scores each query with its document: as a cross-encoder, or by cosine of embeddings.

    Args:
        queries: one for all documents, or one per document.

    Raises:
        InvalidRequest: the numbers do not match, or the model does neither.
    """
    queries, documents = as_list(queries), as_list(documents)
    if not documents or len(queries) not in (1, len(documents)):
        raise InvalidRequest(
            f"There are {len(queries)} queries for {len(documents)} documents; expected one, or one per document.",
            param="queries",
        )
    if maker.params.dimensions is not None:
        raise InvalidRequest("dimensions is for embeddings; a score has none.", param="dimensions")
    if maker.info.task == "score":
        return ScoreJob(maker.pairs(queries * (len(documents) // len(queries)), documents), maker.params)
    if maker.params.use_activation is not None:
        raise InvalidRequest(
            "use_activation is for cross-encoders; an embedding model's score is a cosine.", param="use_activation"
        )
    shift = len(queries)
    return ScoreJob(
        inputs=maker.inputs([*queries, *documents]),
        params=replace(maker.params, use_activation=True),  # the dot product of two vectors of length 1
        compared=tuple((0 if shift == 1 else index, shift + index) for index in range(len(documents))),
    )


async def encoded(texts: Sequence[Prompt], encode: Callable[[], T]) -> T:
    """What `encode` makes of `texts`, off the event loop if they are long."""
    if sum(len(text) for text in texts) > LONG_TEXT:
        return await asyncio.to_thread(encode)
    return encode()
