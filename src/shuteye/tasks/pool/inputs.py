"""What callers of `embed`, `classify` and `score` give and get, in terms of the inputs and rows that the engine knows.

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
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    EmbedDtype,
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
            raise InvalidRequest(
                f"Token id {outside} is out of vocabulary; ids go from 0 to {vocab_size - 1}.", param="input"
            )
        kept = prompt if limit is None or len(prompt) <= limit else self._cut(prompt, limit)
        return PoolInput(self._padded(tuple(kept)))

    def _cut(self, prompt: Sequence[int], limit: int) -> Sequence[int]:
        return prompt[:limit] if self.params.truncation_side == "right" else prompt[len(prompt) - limit :]

    def queries_and_documents(self, queries: Sequence[str], documents: Sequence[str]) -> tuple[PoolInput, ...]:
        """One input per text, for a model whose embeddings are compared: the queries, then the documents."""
        limit, params = self._limit(), self.params
        both = ((queries, params.max_tokens_per_query), (documents, params.max_tokens_per_doc))
        return tuple(self._encode(text, None, limit, of_text=longest) for texts, longest in both for text in texts)

    def pairs(self, queries: Sequence[str], documents: Sequence[str]) -> tuple[PoolInput, ...]:
        """One input per pair of texts, for a model that reads both at once."""
        limit = self._limit()
        return tuple(self._encode(query, document, limit) for query, document in zip(queries, documents, strict=True))

    def _encode(self, text: str, pair: str | None, limit: int | None, *, of_text: int = 0) -> PoolInput:
        params = self.params
        token_ids, type_ids = self.tokenizer.encode_pair(
            text,
            pair,
            max_length=limit,
            max_lengths=(of_text, 0) if pair is None else (params.max_tokens_per_query, params.max_tokens_per_doc),
            cut=params.truncation_side,
            add_special_tokens=self.add_special_tokens,
        )
        padded = self._padded(tuple(token_ids))
        if not any(type_ids):
            return PoolInput(padded)
        return PoolInput(padded, (*type_ids, *(0,) * (len(padded) - len(type_ids))))

    def _padded(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        if self.params.padding != "max_length":
            return token_ids
        fill = self.tokenizer.pad_token_id
        if fill is None:
            raise InvalidRequest("This model's tokenizer has no token to pad with.", param="padding")
        return (*token_ids, *(fill,) * (self.longest - len(token_ids)))

    @property
    def longest(self) -> int:
        """Tokens that an input may have, and has if it is padded."""
        return self._limit() or self.info.max_model_len

    def _limit(self) -> int | None:
        """Tokens that an input is cut to, None for those that must fit as they are."""
        wanted, context = self.params.truncate_prompt_tokens, self.info.max_model_len
        if wanted is not None and wanted > context:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {wanted}, but this model's context is {context} tokens. Please request a "
                "smaller truncation size. -1 cuts to the context.",
                param="truncate_prompt_tokens",
            )
        return context if wanted == -1 else wanted


def embeddings_of(
    inputs: Sequence[PoolInput], output: PooledOutput, dtype: EmbedDtype = "float32"
) -> list[EmbeddingRequestOutput]:
    """One embedding per input, in their order."""
    return [
        EmbeddingRequestOutput(
            f"{output.request_id}-{index}",
            each.token_ids,
            EmbeddingOutput(row, dtype),
            scheduled_at=output.scheduled_at,
        )
        for index, (each, row) in enumerate(zip(inputs, output.rows, strict=True))
    ]


def classes_of(
    inputs: Sequence[PoolInput], output: PooledOutput, labels: Sequence[str]
) -> list[ClassificationRequestOutput]:
    """What each input is, in their order."""
    return [
        ClassificationRequestOutput(
            f"{output.request_id}-{index}", each.token_ids, _classified(row, labels), scheduled_at=output.scheduled_at
        )
        for index, (each, row) in enumerate(zip(inputs, output.rows, strict=True))
    ]


def _classified(row: bytes, labels: Sequence[str]) -> ClassificationOutput:
    probs = array("f", row).tolist()
    best = max(range(len(probs)), key=probs.__getitem__)
    return ClassificationOutput(probs, labels[best] if best < len(labels) else None)


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
    for name in ("dimensions", "embed_dtype"):
        if getattr(maker.params, name) != getattr(PoolingParams(), name):
            raise InvalidRequest(f"{name} is for embeddings; a score has none.", param=name)
    if maker.info.task not in {"score", "embed"}:
        raise InvalidRequest(f"{maker.info.model!r} is a model for the task {maker.info.task!r}; it scores nothing.")
    if maker.info.task == "score":
        return ScoreJob(maker.pairs(queries * (len(documents) // len(queries)), documents), maker.params)
    if maker.params.use_activation is not None:
        raise InvalidRequest(
            "use_activation is for cross-encoders; an embedding model's score is a cosine.", param="use_activation"
        )
    shift = len(queries)
    return ScoreJob(
        inputs=maker.queries_and_documents(queries, documents),
        params=replace(maker.params, use_activation=True),  # the dot product of two vectors of length 1
        compared=tuple((0 if shift == 1 else index, shift + index) for index in range(len(documents))),
    )


async def encoded(texts: Sequence[Prompt], encode: Callable[[], T]) -> T:
    """What `encode` makes of `texts`, off the event loop if they are long."""
    if sum(len(text) for text in texts) > LONG_TEXT:
        return await asyncio.to_thread(encode)
    return encode()
