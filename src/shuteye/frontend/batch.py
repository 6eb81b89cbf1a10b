"""Many prompts at once, for callers who wait for all of them: what `LLM` does on its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from shuteye.audio import Audio, samples_from
from shuteye.errors import InvalidRequest
from shuteye.frontend.engine import Engine
from shuteye.tasks.base import Job
from shuteye.tasks.generate.outputs import GenerationJob
from shuteye.tasks.generate.requests import RequestOutput, SamplingParams
from shuteye.tasks.pool.inputs import Prompt
from shuteye.tasks.transcribe.outputs import TranscriptionJob
from shuteye.tasks.transcribe.requests import TranscribeParams, Transcription

OutputT = TypeVar("OutputT")

Message = Mapping[str, Any]
ParamsList = SamplingParams | Sequence[SamplingParams] | None


async def generate(engine: Engine, prompts: str | Sequence[Prompt], params: ParamsList) -> list[RequestOutput]:
    """Complete every prompt; see `LLM.generate`."""
    _require_prompts(prompts)
    prompt_list: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
    each = _one_each(SamplingParams() if params is None else params, len(prompt_list))
    return await last_of_all(
        engine, [GenerationJob(*pair, "final_only") for pair in zip(prompt_list, each, strict=True)]
    )


async def chat(
    engine: Engine,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    params: ParamsList,
    template_kwargs: Mapping[str, Any],
) -> list[RequestOutput]:
    """Answer one conversation, or each of several; see `LLM.chat`."""
    _require_messages(messages)
    one = bool(messages) and isinstance(messages[0], Mapping)
    conversations: Any = [messages] if one else messages
    tokenizer = engine.tokenizer
    prompts = [
        tokenizer.encode(tokenizer.apply_chat_template(conversation, **template_kwargs), add_special_tokens=False)
        for conversation in conversations
    ]
    return await generate(engine, prompts, params)


async def transcribe(
    engine: Engine, audio: Audio | Sequence[Audio], params: TranscribeParams | None, prompt: str | None
) -> list[Transcription]:
    """Write down what is said in every piece of audio; see `LLM.transcribe`."""
    pieces: Any = audio if isinstance(audio, list | tuple) else [audio]
    params = TranscribeParams() if params is None else params
    return await last_of_all(
        engine, [TranscriptionJob(samples_from(each), params, prompt, "final_only") for each in pieces]
    )


async def last_of_all(engine: Engine, jobs: Sequence[Job[OutputT]], *, request_id: str | None = None) -> list[OutputT]:
    """The last output of every job, in their order; the first that is refused or fails aborts the others."""
    names = [None if request_id is None else f"{request_id}.{index}" for index in range(len(jobs))]
    tasks = [asyncio.create_task(_last(engine, job, name)) for job, name in zip(jobs, names, strict=True)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _last(engine: Engine, job: Job[OutputT], request_id: str | None) -> OutputT:
    async with aclosing(engine.stream(job, request_id=request_id)) as outputs:
        return [output async for output in outputs][-1]


def _require_prompts(given: object) -> None:
    """Refuse what is no list: the keys of a dict would be completed as texts."""
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise InvalidRequest(
            f"prompts must be a text, or a list of texts or of lists of token ids, got {type(given).__name__}.",
            param="prompts",
        )


def _require_messages(given: Any) -> None:
    if (
        isinstance(given, str)
        or not isinstance(given, Sequence)
        or not all(isinstance(each, Mapping | Sequence) for each in given)
    ):
        raise InvalidRequest(f"messages must be a list of messages, got {type(given).__name__}.", param="messages")


def _one_each(given: object, count: int) -> Sequence[Any]:
    """Parameters for `count` prompts; whether they are parameters at all, whoever takes them looks."""
    params = list(given) if isinstance(given, list | tuple) else [given] * count
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} sampling_params for {count} prompts.", param="sampling_params")
    return params
