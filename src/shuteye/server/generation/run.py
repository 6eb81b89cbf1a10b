"""Runs one HTTP request's prompts on the engine and merges their outputs, timed.

Knows nothing of OpenAI's API, nor of how a client is answered.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from shuteye.errors import RequestAborted
from shuteye.frontend.beam_search import beam_search
from shuteye.frontend.mailbox import Backlog
from shuteye.server.context import ServerContext
from shuteye.tasks.generate.beams import BeamSearchParams
from shuteye.tasks.generate.requests import RequestOutput, SamplingParams

_RUNS = itertools.count(1)

STARTED_AT_ONCE = 16
"""Prompts of one request that are submitted before the event loop turns to others."""

T = TypeVar("T")

PromptOutput = tuple[int, RequestOutput]
"""Which prompt, and what is new for it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine takes it, and its text if the caller gave, or wants back, text."""

    token_ids: Sequence[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """All that one HTTP request asks of the engine; prompt i runs under the id `{request_id}-{i}-{run}`.

    `run` tells two HTTP requests apart that carry the same X-Request-Id.

    Attributes:
        best: how many of each prompt's `params.n` completions are wanted, by mean log-probability; None means all.
        beams: the completions are those that a beam search finds.
        echoes_only: what is generated, a single token, is not wanted.
    """

    request_id: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    best: int | None = None
    beams: BeamSearchParams | None = None
    echoes_only: bool = False
    run: str = field(default_factory=lambda: f"{next(_RUNS):x}")


def run(context: ServerContext, job: Job) -> AsyncGenerator[PromptOutput, None]:
    """Delta outputs of all prompts as they come; closing it aborts whatever still runs.

    Raises:
        RequestAborted: more of them waited to be taken than may, over all prompts.
        ShuteyeError: the engine refused or failed.
    """
    backlog = Backlog()
    sources = [_run_one(context, job, index, backlog) for index in range(len(job.prompts))]
    return sources[0] if len(sources) == 1 else _merge(sources)


async def _run_one(
    context: ServerContext, job: Job, index: int, backlog: Backlog
) -> AsyncGenerator[PromptOutput, None]:
    request_id = f"{job.request_id}-{index}-{job.run}"
    prompt = job.prompts[index].token_ids
    if job.beams is None:
        outputs = context.engine.generate(
            prompt, job.params, request_id=request_id, output_kind="delta", backlog=backlog
        )
    else:
        outputs = _searched(context, prompt, job.beams, request_id)
    params = job.params
    context.metrics.observe_params(n=params.n, max_tokens=params.max_tokens)
    with context.metrics.request() as timer:
        async with aclosing(outputs):
            async for output in outputs:
                timer.observe(output)
                if context.config.on_abort == "error":
                    _refuse_aborted(output)
                yield index, output


def _refuse_aborted(output: RequestOutput) -> None:
    """Raise RequestAborted in place of a last output that a sleep, a pause or an operator has cut off."""
    if any(completion.finish_reason == "abort" for completion in output.outputs):
        raise RequestAborted("The request was ended before it was finished; send it again.")


async def _searched(
    context: ServerContext, prompt: Sequence[int], beams: BeamSearchParams, request_id: str
) -> AsyncGenerator[RequestOutput, None]:
    yield await beam_search(context.engine, prompt, beams, request_id=request_id)


async def _merge(sources: Sequence[AsyncGenerator[PromptOutput, None]]) -> AsyncGenerator[PromptOutput, None]:
    """Steps of all sources, each in its order; while nobody takes them, the sources wait."""
    queue: asyncio.Queue[PromptOutput | int] = asyncio.Queue(maxsize=len(sources))  # an int says which source ended
    tasks: list[asyncio.Task[None]] = []
    running = len(sources)
    try:
        for index, source in enumerate(sources):
            tasks.append(asyncio.create_task(_pump(index, source, queue)))
            if len(tasks) % STARTED_AT_ONCE == 0:  # submitting takes a while, and others are to be served in between
                await asyncio.sleep(0)
        while running:
            item = await queue.get()
            if isinstance(item, int):
                await tasks[item]
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int, source: AsyncGenerator[PromptOutput, None], queue: asyncio.Queue[PromptOutput | int]
) -> None:
    try:
        async with aclosing(source):
            async for step in source:
                await queue.put(step)
    except Exception:
        await queue.put(index)
        raise
    await queue.put(index)


async def take_all(context: ServerContext, job: Job, take: Callable[[PromptOutput], Iterable[object]]) -> None:
    """Have an answer take everything that is generated; the events that it makes of it are for nobody."""
    async with aclosing(run(context, job)) as steps:
        async for step in steps:
            for _event in take(step):
                pass


async def first_of(steps: AsyncGenerator[T, None]) -> T:
    """The first step, which comes before any byte is sent, so that errors of admission have a status."""
    try:
        return await anext(steps)
    except StopAsyncIteration:
        raise AssertionError("the engine ended a request without any output") from None
