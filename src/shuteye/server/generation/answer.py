"""Carries one generation from the engine's outputs to bytes: all at once, or as a stream of events.

Knows nothing of the shape of a choice; a `ResponseWriter` writes them.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fastapi import Request, Response
from msgspec import UNSET, Struct, UnsetType, structs

from shuteye.server.context import ServerContext
from shuteye.server.generation.run import Job, Prompt, PromptOutput, first_of, run
from shuteye.server.http.answers import JsonAnswer, encode_json
from shuteye.server.http.events import EventStream, event, until_disconnect
from shuteye.server.http.middleware import current_request_id
from shuteye.tasks.generate.logprob_limits import is_wide
from shuteye.tasks.generate.requests import CompletionOutput, FinishReason, Logprob, RequestOutput

UsageIn = Literal["no chunk", "last chunk", "every chunk"]
"""Where a stream tells how many tokens it took."""


class PromptTokensDetails(Struct):
    """How many tokens of the prompt were computed before."""

    cached_tokens: int


class UsageAnswer(Struct):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@dataclass(slots=True)
class Usage:
    """Tokens of one HTTP request so far, over all of its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)
    counts_output: bool = True

    @classmethod
    def of(cls, job: Job) -> Usage:
        """Before anything is generated."""
        return cls(sum(len(prompt.token_ids) for prompt in job.prompts), counts_output=not job.echoes_only)

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Count one delta output."""
        if self.counts_output:
            self.completion_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        self.cached_tokens[prompt_index] = max(self.cached_tokens.get(prompt_index, 0), output.num_cached_tokens)

    def answer(self) -> UsageAnswer:
        """OpenAI's `usage` object."""
        total = self.prompt_tokens + self.completion_tokens
        details = PromptTokensDetails(sum(self.cached_tokens.values()))
        return UsageAnswer(self.prompt_tokens, self.completion_tokens, total, details)


@dataclass(slots=True)
class ChoiceAccumulator:
    """All of one choice so far."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Mapping[int, Logprob]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: CompletionOutput) -> None:
        """Append what is new."""
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs or ())
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason

    @property
    def mean_logprob(self) -> float:
        """How likely the tokens were, by their log-probabilities, which must have been asked for."""
        found = [position[token_id].logprob for token_id, position in zip(self.token_ids, self.logprobs, strict=True)]
        return sum(found) / max(1, len(found))

    @property
    def text(self) -> str:
        """Everything generated."""
        return "".join(self.texts)


@dataclass(slots=True, kw_only=True)
class ResponseWriter(ABC):
    """How one route writes its answers; `index` numbers choices over all prompts.

    Attributes:
        answer: the Struct of a whole answer.
        chunk: the Struct of a stream's chunks.
        shows_token_ids: token ids are part of the answer, also of tokens that complete no text.
        prompt_logprobs: by prompt, where they were asked for; known before any of its choices begins, unless the prompt
            was aborted before it was computed: then they never are.
    """

    answer: ClassVar[Callable[..., Struct]]
    chunk: ClassVar[Callable[..., Any]]

    prompts: tuple[Prompt, ...]
    shows_token_ids: bool = False
    prompt_logprobs: dict[int, Sequence[Mapping[int, Logprob] | None]] = field(default_factory=dict)

    @abstractmethod
    def whole(self, index: int, transcript: ChoiceAccumulator) -> Struct:
        """A finished choice."""

    def opening(self, _index: int) -> Struct | None:
        """A streamed choice's first chunk, if it needs one before any text."""
        return None

    @abstractmethod
    def delta(self, index: int, delta: CompletionOutput) -> Struct | None:
        """What is new of a streamed choice; None if there is nothing to tell yet."""

    def extra(self) -> dict[str, Any]:
        """What an answer carries beside its choices; a stream carries it in the chunk that opens its first choice."""
        return {}


def new_request_id(prefix: str) -> str:
    """An id in OpenAI's style: `cmpl-` or `chatcmpl-` and the HTTP request's id, as in vLLM."""
    return f"{prefix}-{current_request_id()}"


async def answer_whole(
    request: Request, context: ServerContext, job: Job, *, writer: ResponseWriter, model: str
) -> Response:
    """One JSON object, once everything is generated.

    Raises:
        ClientDisconnected: the client went first; the job was aborted.
        ShuteyeError: the engine refused or failed.
    """
    usage = Usage.of(job)
    transcripts = _best_of(job, await until_disconnect(request.receive, _collect(context, job, usage, writer)))

    def written() -> Response:
        answer = writer.answer(
            id=job.request_id,
            created=int(time.time()),
            model=model,
            choices=[writer.whole(index, transcript) for index, transcript in enumerate(transcripts)],
            usage=usage.answer(),
            **writer.extra(),
        )
        return JsonAnswer(answer)

    return await asyncio.to_thread(written) if is_wide(job.params) else written()


def _best_of(job: Job, transcripts: Mapping[int, ChoiceAccumulator]) -> list[ChoiceAccumulator]:
    """The wanted choices in order of prompts; where only the best are, by their mean log-probability."""
    ordered = [transcripts[index] for index in sorted(transcripts)]
    if job.best is None:
        return ordered
    groups = [ordered[begin : begin + job.params.n] for begin in range(0, len(ordered), job.params.n)]
    return [
        transcript
        for group in groups
        for transcript in sorted(group, key=lambda one: one.mean_logprob, reverse=True)[: job.best]
    ]


async def _collect(
    context: ServerContext, job: Job, usage: Usage, writer: ResponseWriter
) -> dict[int, ChoiceAccumulator]:
    transcripts: dict[int, ChoiceAccumulator] = defaultdict(ChoiceAccumulator)
    async with aclosing(run(context, job)) as steps:
        async for prompt_index, output in steps:
            usage.add(prompt_index, output)
            if output.prompt_logprobs is not None:
                writer.prompt_logprobs[prompt_index] = output.prompt_logprobs
            for completion in output.outputs:
                transcripts[prompt_index * job.params.n + completion.index].add(completion)
    return transcripts


async def answer_stream(
    request: Request, context: ServerContext, job: Job, *, writer: ResponseWriter, model: str, usage_in: UsageIn
) -> Response:
    """A stream of events, begun only once the engine has admitted the job and given its first output.

    Raises:
        ClientDisconnected: the client went before that.
        ShuteyeError: the engine refused the job.
    """
    steps = run(context, job)
    first = await until_disconnect(request.receive, first_of(steps))
    events = _events(first, steps, job, writer=writer, model=model, usage_in=usage_in)
    return EventStream(events, source=steps, with_done=True)


async def _events(
    first: PromptOutput,
    rest: AsyncGenerator[PromptOutput, None],
    job: Job,
    *,
    writer: ResponseWriter,
    model: str,
    usage_in: UsageIn,
) -> AsyncGenerator[bytes, None]:
    usage = Usage.of(job)
    no_usage: UnsetType | None = UNSET if usage_in == "no chunk" else None
    chunk = writer.chunk(id=job.request_id, created=int(time.time()), model=model, choices=[], usage=no_usage)
    opened: set[int] = set()
    step: PromptOutput | None = first
    while step is not None:
        prompt_index, output = step
        before = usage.answer()
        usage.add(prompt_index, output)
        if output.prompt_logprobs is not None:
            writer.prompt_logprobs[prompt_index] = output.prompt_logprobs
        for completion in output.outputs:
            index = prompt_index * job.params.n + completion.index
            if index not in opened:
                extra = {} if opened else writer.extra()
                opened.add(index)
                if (opening := writer.opening(index)) is not None:
                    opened_with = structs.replace(chunk, choices=[opening], **extra)
                    if usage_in == "every chunk":
                        opened_with.usage = before  # no token of this step is told yet
                    yield event(encode_json(opened_with))
            if completion.text or completion.logprobs or completion.finish_reason is not None or writer.shows_token_ids:
                choice = writer.delta(index, completion)
                if choice is not None:
                    chunk.choices = [choice]
                    if usage_in == "every chunk":
                        chunk.usage = usage.answer()
                    yield event(encode_json(chunk))
        step = await anext(rest, None)
    if usage_in != "no chunk":
        chunk.choices, chunk.usage = [], usage.answer()
        yield event(encode_json(chunk))
