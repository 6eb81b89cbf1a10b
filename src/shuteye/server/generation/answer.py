"""Carries one generation from steps to bytes: all at once, or as a stream of events.

Knows nothing of OpenAI's shapes; a `ResponseWriter` writes them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, Protocol

from fastapi import Request, Response

from shuteye.server.context import ServerContext
from shuteye.server.generation.chunks import ChoiceAccumulator, ChunkWriter, Usage, encode_json
from shuteye.server.generation.run import Job, PromptOutput, first_of, run
from shuteye.server.http.events import EventStream, until_disconnect
from shuteye.server.http.middleware import current_request_id
from shuteye.tasks.generate.requests import CompletionOutput, Logprob

UsageIn = Literal["no chunk", "last chunk", "every chunk"]
"""Where a stream tells how many tokens it took."""


class ResponseWriter(Protocol):
    """How one route writes its answers; `index` numbers choices over all prompts."""

    @property
    def whole_object(self) -> str:
        """`object` of a whole answer."""
        ...

    @property
    def shows_token_ids(self) -> bool:
        """Whether tokens that complete no text are to be told, too."""
        ...

    @property
    def chunk_object(self) -> str:
        """`object` of a chunk."""
        ...

    def prompt_scored(self, prompt_index: int, logprobs: Sequence[Mapping[int, Logprob] | None]) -> None:
        """A prompt's log-probabilities, where they were asked for; known before any of its choices begins.

        Unless it was aborted before it was computed: then they never are.
        """
        ...

    def extra(self) -> dict[str, Any]:
        """What an answer carries beside its choices; a stream carries it in its first chunk."""
        ...

    def whole(self, index: int, transcript: ChoiceAccumulator) -> dict[str, Any]:
        """A finished choice."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """A streamed choice's first chunk, if it needs one before any text."""
        ...

    def delta(self, index: int, delta: CompletionOutput) -> dict[str, Any] | None:
        """What is new of a streamed choice; None if there is nothing to tell yet."""
        ...


def new_request_id(prefix: str) -> str:
    """An id in OpenAI's style: `cmpl-` or `chatcmpl-` and the HTTP request's id, as in vLLM."""
    return f"{prefix}-{current_request_id()}"


async def answer_whole(
    request: Request, context: ServerContext, job: Job, *, shape: ResponseWriter, model: str
) -> Response:
    """One JSON object, once everything is generated.

    Raises:
        ClientDisconnected: the client went first; the job was aborted.
        ShuteyeError: the engine refused or failed.
    """
    usage = Usage.of(job)
    transcripts = _best_of(job, await until_disconnect(request.receive, _collect(context, job, usage, shape)))
    choices = [shape.whole(index, transcript) for index, transcript in enumerate(transcripts)]
    body = _envelope(job, shape.whole_object, model) | {"choices": choices, "usage": usage.as_dict()} | shape.extra()
    return Response(encode_json(body), media_type="application/json")


def _best_of(job: Job, transcripts: Mapping[int, ChoiceAccumulator]) -> list[ChoiceAccumulator]:
    """The wanted choices in order of prompts; where only the best are, the likeliest per token come first."""
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
    context: ServerContext, job: Job, usage: Usage, shape: ResponseWriter
) -> dict[int, ChoiceAccumulator]:
    transcripts: dict[int, ChoiceAccumulator] = defaultdict(ChoiceAccumulator)
    async with aclosing(run(context, job)) as steps:
        async for prompt_index, output in steps:
            usage.add(prompt_index, output)
            if output.prompt_logprobs is not None:
                shape.prompt_scored(prompt_index, output.prompt_logprobs)
            for completion in output.outputs:
                transcripts[prompt_index * job.params.n + completion.index].add(completion)
    return transcripts


async def answer_stream(
    request: Request, context: ServerContext, job: Job, *, shape: ResponseWriter, model: str, usage_in: UsageIn
) -> Response:
    """A stream of events, begun only once the engine has admitted the job and given its first output.

    Raises:
        ClientDisconnected: the client went before that.
        ShuteyeError: the engine refused the job.
    """
    steps = run(context, job)
    first = await until_disconnect(request.receive, first_of(steps))
    writer = ChunkWriter(
        _envelope(job, shape.chunk_object, model),
        include_usage=usage_in != "no chunk",
        continuous_usage=usage_in == "every chunk",
    )
    return EventStream(_events(first, steps, job, shape=shape, writer=writer), source=steps, with_done=True)


def _envelope(job: Job, kind: str, model: str) -> dict[str, Any]:
    return {"id": job.request_id, "object": kind, "created": int(time.time()), "model": model}


async def _events(
    first: PromptOutput,
    rest: AsyncGenerator[PromptOutput, None],
    job: Job,
    *,
    shape: ResponseWriter,
    writer: ChunkWriter,
) -> AsyncGenerator[bytes, None]:
    usage = Usage.of(job)
    opened: set[int] = set()
    step: PromptOutput | None = first
    while step is not None:
        prompt_index, output = step
        usage.add(prompt_index, output)
        if output.prompt_logprobs is not None:
            shape.prompt_scored(prompt_index, output.prompt_logprobs)
        for completion in output.outputs:
            index = prompt_index * job.params.n + completion.index
            extra = None if opened else shape.extra()
            for choice in _choices(shape, index, completion, opened):
                yield writer.choice(choice, usage if writer.continuous_usage else None, extra)
                extra = None
        step = await anext(rest, None)
    if writer.include_usage:
        yield writer.usage(usage)


def _choices(
    shape: ResponseWriter, index: int, completion: CompletionOutput, opened: set[int]
) -> Iterator[dict[str, Any]]:
    if index not in opened:
        opened.add(index)
        opening = shape.opening(index)
        if opening is not None:
            yield opening
    if completion.text or completion.logprobs or completion.finish_reason is not None or shape.shows_token_ids:
        delta = shape.delta(index, completion)
        if delta is not None:
            yield delta
