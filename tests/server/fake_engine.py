"""An engine without a model, for tests of the server: it repeats its prompt, one byte a token, and can sleep.

Knows the same table, policies and errors as the real one, as far as a caller can see them.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from shuteye.config import EngineConfig
from shuteye.engine.messages import check_rpc
from shuteye.errors import (
    DrainTimeout,
    EngineDead,
    EngineNotReady,
    InvalidRequest,
    ModelSleeping,
    PromptTooLong,
    QueueFull,
    ShuteyeError,
    SleepModeDisabled,
    TransitionConflict,
)
from shuteye.frontend.mailbox import Backlog
from shuteye.model_info import ModelInfo
from shuteye.state import (
    TAGS,
    EngineState,
    SchedulerStats,
    SleepReport,
    TagReport,
    TagResidency,
    TagState,
    UpdateReport,
    WakeReport,
)
from shuteye.tasks.base import OutputKind
from shuteye.tasks.generate.detokenizer import Detokenizer
from shuteye.tasks.generate.requests import CompletionOutput, FinishReason, Logprob, RequestOutput, SamplingParams
from shuteye.tasks.pool.inputs import PoolInputs, embeddings_of, score_job
from shuteye.tasks.pool.requests import (
    EmbeddingRequestOutput,
    PooledOutput,
    PoolingParams,
    PoolInput,
    ScoringRequestOutput,
)
from shuteye.tasks.transcribe.requests import TranscribeParams, Transcription
from shuteye.tokenizer import Tokenizer

NBYTES = {"weights": 1000, "kv_cache": 500}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{{ suffix|default('') }}"
)
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")


def byte_tokenizer(*, chat_template: str | None = CHATML) -> Tokenizer:
    """One token per byte, so that most characters are several tokens; plus two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    templates = {} if chat_template is None else {"default": chat_template}
    return Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"}, chat_templates=templates)


@dataclass
class Request:
    """A request that was admitted."""

    request_id: str
    aborted: bool = False


@dataclass
class FakeEngine:
    """See the module; `start_gate`, if given, is awaited by `start`; `break_after` tokens, `breakage` is raised.

    `aborts` every request before its prompt is computed.
    """

    config: EngineConfig
    tokenizer_: Tokenizer = field(default_factory=byte_tokenizer)
    token_delay_s: float = 0.0
    start_gate: asyncio.Event | None = None
    start_error: Exception | None = None
    breakage: Exception | None = None
    break_after: int = 2
    aborts: bool = False
    default_sampling: dict[str, float] = field(default_factory=dict)
    task: str = "generate"
    script: Sequence[str] = ()  # what choice i says, in place of its prompt

    def __post_init__(self) -> None:
        self.status: Literal["starting", "ready", "failed", "dead", "closed"] = "starting"
        self.failure: ShuteyeError | None = None
        self.hang: str | None = None
        self.state = EngineState()
        self.stats = SchedulerStats(num_blocks=10, num_free_blocks=10)
        self.running: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.seen: list[tuple[tuple[int, ...], SamplingParams]] = []
        self.held = 0
        self.reloaded: list[str | None] = []
        self.prefix_resets = 0
        self.restarts = 0
        self.updated: list[tuple[str, bytes | None]] = []
        self.wake_listener = lambda _outcome: None
        self._changed = asyncio.Condition()

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        if self.start_gate is not None:
            await self.start_gate.wait()
        await asyncio.sleep(0)
        if self.status == "closed":
            raise self.failure
        if self.start_error is not None:
            if isinstance(self.start_error, ShuteyeError):
                self.status, self.failure = "failed", self.start_error
            raise self.start_error
        self.status = "ready"
        self._push(weights="resident", kv_cache="resident")

    async def close(self, reason: ShuteyeError | None = None) -> None:
        if self.status != "closed":
            self.status = "closed"
            self.failure = self.failure or reason or EngineDead("The engine was closed.")
            if self.start_gate is not None:
                self.start_gate.set()
            await self._notify()

    async def restart(self) -> None:
        self.restarts += 1
        self.status, self.failure, self.hang = "starting", None, None
        await self.start()

    def listen_to_own_wakes(self, listener) -> None:
        self.wake_listener = listener

    async def die(self) -> None:
        """As if the engine process had been killed."""
        self.status, self.failure = "dead", EngineDead("The engine process ended (signal 9).")
        await self._notify()

    # --- what is known --------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        if self.failure is not None:
            raise self.failure
        if self.status == "starting":
            raise EngineNotReady("The model is still loading.")
        return ModelInfo(
            model=self.config.model,
            architecture="FakeForCausalLM",
            task=self.task,
            tokenizer_dir="",
            image_dir="",
            dtype="float32",
            vocab_size=self.tokenizer_.vocab_size,
            max_model_len=self.max_model_len,
            block_size=16,
            num_blocks=10,
            eos_token_ids=(),
            weights_bytes=NBYTES["weights"],
            kv_cache_bytes=NBYTES["kv_cache"],
            kv_bytes_per_token=1,
            default_sampling=self.default_sampling,
        )

    @property
    def max_model_len(self) -> int:
        return self.config.max_model_len or 512

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.info is not None
        return self.tokenizer_

    @property
    def is_sleeping(self) -> bool:
        return self.state.is_sleeping

    @property
    def is_paused(self) -> bool:
        return self.state.paused

    def _residency(self, tag: str) -> TagResidency:
        return next(state.residency for state in self.state.tags if state.tag == tag)

    def _push(
        self,
        *,
        paused: bool | None = None,
        refusing: bool | None = None,
        level: int | None = None,
        **residency: TagResidency,
    ) -> None:
        now = {tag: residency.get(tag) or self._residency(tag) for tag in TAGS}
        tags = tuple(
            TagState(
                tag=tag,
                residency=where,
                backing="image" if where == "offloaded" else None,
                nbytes=NBYTES[tag],
                resident_bytes=NBYTES[tag] if where in ("resident", "blank") else 0,
            )
            for tag, where in now.items()
        )
        is_paused = self.state.paused if paused is None else paused
        asleep = any(where != "resident" for where in now.values())
        self.state = EngineState(
            gate="closed" if asleep or is_paused else "open",
            paused=is_paused,
            level=level if asleep else None,
            tags=tags,
            missing=("lm_head.weight",) if now["weights"] == "blank" else (),
            refusing=self.state.refusing if refusing is None else refusing,
        )

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # --- generation -----------------------------------------------------------------------------

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        output_kind: OutputKind = "cumulative",
        backlog: Backlog | None = None,
    ) -> AsyncIterator[RequestOutput]:
        assert output_kind == "delta", "the server only asks for deltas"
        assert request_id is not None
        prompt_ids = tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        limit = self.max_model_len - len(prompt_ids) if params.max_tokens is None else params.max_tokens
        if limit < 1 or len(prompt_ids) + limit > self.max_model_len:
            raise PromptTooLong(f"{len(prompt_ids)} tokens do not fit {self.max_model_len}.", param="prompt")
        if request_id in self.running:
            raise InvalidRequest(f"A request with id {request_id!r} is running already.", param="request_id")
        request = Request(request_id, aborted=self.aborts)
        self.running[request_id] = request
        self.seen.append((prompt_ids, params))
        finished = False
        try:
            await self._admit()
            scheduled_at = time.monotonic()
            stream = [_Choice(self, index, prompt_ids, params, limit) for index in range(params.n)]
            while not finished:
                await self._gate(request)
                await asyncio.sleep(self.token_delay_s)
                outputs = tuple(choice.step(aborted=request.aborted) for choice in stream if choice.finished is None)
                finished = all(choice.finished for choice in stream)
                yield RequestOutput(
                    request_id,
                    None,
                    prompt_ids,
                    outputs,
                    finished,
                    num_cached_tokens=1,
                    scheduled_at=scheduled_at,
                    prompt_logprobs=None if self.aborts else _prompt_logprobs(prompt_ids, params.prompt_logprobs),
                )
        finally:
            self.running.pop(request_id, None)
            if not finished:
                self.aborted.append(request_id)
            await self._notify()

    async def embed(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        add_special_tokens: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        maker = PoolInputs(self.tokenizer, self.info, params or PoolingParams(), add_special_tokens=add_special_tokens)
        inputs = maker.inputs([prompts] if isinstance(prompts, str) else prompts)
        return embeddings_of(inputs, await self._pool(inputs))

    async def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> list[ScoringRequestOutput]:
        job = score_job(PoolInputs(self.tokenizer, self.info, params or PoolingParams()), queries, documents)
        return job.scores(await self._pool(job.inputs))

    async def transcribe(
        self,
        pcm: bytes,
        params: TranscribeParams | None = None,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncIterator[Transcription]:
        """Hears how many bytes there are, whatever is said."""
        await self._admit()
        await asyncio.sleep(self.token_delay_s)
        text = f"{len(pcm)} bytes"
        yield Transcription(request_id or "speech", text, "english", 1.0, (), num_tokens=1, finished=True)

    async def _pool(self, inputs: Sequence[PoolInput]) -> PooledOutput:
        """A row is two numbers: how many tokens the input has, and their sum; a score is the first one."""
        for each in inputs:
            if len(each.token_ids) > self.max_model_len:
                raise PromptTooLong(f"{len(each.token_ids)} tokens do not fit {self.max_model_len}.", param="input")
        await self._admit()
        await asyncio.sleep(self.token_delay_s)
        if self.breakage is not None:
            raise self.breakage
        rows = [array("f", [len(each.token_ids), sum(each.token_ids)]).tobytes() for each in inputs]
        return PooledOutput("pool", tuple(rows))

    async def _admit(self) -> None:
        if not self.is_sleeping:
            return
        if self.config.on_sleeping_request == "reject":
            raise ModelSleeping
        if self.config.on_sleeping_request == "wake":
            self.wake_listener(await self.wake_up())
            return
        if self.held >= self.config.hold_queue_size:
            raise QueueFull("The queue of held requests is full.")
        self.held += 1
        try:
            async with asyncio.timeout(self.config.hold_timeout_s), self._changed:
                await self._changed.wait_for(lambda: not self.is_sleeping)
        except TimeoutError:
            raise ModelSleeping from None
        finally:
            self.held -= 1

    async def _gate(self, request: Request) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.state.gate == "open" or request.aborted or self.failure)
        if self.failure is not None:
            raise self.failure

    # --- control --------------------------------------------------------------------------------

    def _check(self, tags: Sequence[str] | None = None, mode: str | None = None, level: int = 1) -> list[str]:
        if not self.config.enable_sleep_mode:
            raise SleepModeDisabled("Sleep mode is off.")
        if self.failure is not None:
            raise self.failure
        if level not in (0, 1, 2):
            raise InvalidRequest(f"level must be 0, 1 or 2, got {level}.", param="level")
        if mode not in (None, "abort", "wait", "keep"):
            raise InvalidRequest(f"mode must be abort, wait or keep, got {mode!r}.", param="mode")
        if tags is not None and (not tags or set(tags) - set(TAGS)):
            raise InvalidRequest(f"tags must be some of {TAGS}, got {tags}.", param="tags")
        return list(TAGS if tags is None else tags)

    async def _drain(self, mode: str | None, timeout_s: float | None) -> None:
        mode = mode or self.config.default_sleep_mode
        if mode == "abort":
            for request in self.running.values():
                request.aborted = True
            await self._notify()
        if mode != "keep":
            try:
                async with asyncio.timeout(timeout_s or self.config.drain_timeout_s), self._changed:
                    await self._changed.wait_for(lambda: not self.running)
            except TimeoutError:
                raise DrainTimeout("Requests outlasted the deadline.") from None

    async def sleep(
        self,
        level: int = 1,
        *,
        tags: Sequence[str] | None = None,
        mode: str | None = None,
        timeout_s: float | None = None,
    ) -> SleepReport:
        chosen = self._check(tags, mode, level)
        target = {"weights": "offloaded" if level == 1 else "discarded", "kv_cache": "discarded"}
        if level == 1 and self._residency("weights") == "discarded":
            raise TransitionConflict("The weights were discarded at level 2; wake up first.")
        moves = {tag: target[tag] for tag in chosen if self._residency(tag) != target[tag]}
        if not moves:
            return SleepReport(changed=False, level=level)
        if not self.is_sleeping:
            await self._drain(mode, timeout_s)
        freed = {tag: NBYTES[tag] for tag in moves if self._residency(tag) == "resident"}
        self._push(level=level, **moves)
        reports = tuple(TagReport(tag, moves[tag], freed_bytes=freed.get(tag, 0)) for tag in moves)
        return SleepReport(True, level, reports, freed_bytes=sum(freed.values()), residual_bytes=77, seconds=0.01)

    async def wake_up(self, tags: Sequence[str] | None = None) -> WakeReport:
        chosen = self._check(tags)
        asleep = [tag for tag in chosen if self._residency(tag) != "resident"]
        if not asleep:
            return WakeReport(changed=False)
        if chosen == ["kv_cache"] and self._residency("weights") in ("discarded", "blank"):
            raise TransitionConflict("The weights are not loaded: lm_head.weight is missing.")
        blank = tags is not None and set(chosen) == {"weights"} and self._residency("weights") == "discarded"
        self._push(**{tag: "blank" if blank and tag == "weights" else "resident" for tag in asleep})
        await self._notify()
        reports = tuple(TagReport(tag, self._residency(tag), restored_bytes=NBYTES[tag]) for tag in asleep)
        return WakeReport(True, reports, sum(NBYTES[tag] for tag in asleep), seconds=0.02, missing=self.state.missing)

    async def pause(self, mode: str | None = None, *, timeout_s: float | None = None) -> None:
        self._check(mode=mode)
        await self._drain(mode, timeout_s)
        self._push(paused=True, refusing=(mode or self.config.default_sleep_mode) != "keep")

    async def resume(self) -> None:
        self._check()
        if self.is_sleeping:
            raise TransitionConflict("Cannot resume while asleep; wake up first.")
        self._push(paused=False, refusing=False)
        await self._notify()

    async def reload_weights(self, path: str | None = None) -> UpdateReport:
        self._check()
        self.reloaded.append(path)
        return UpdateReport(updated=3, updated_bytes=NBYTES["weights"])

    async def update_weights_from_file(self, path: str) -> UpdateReport:
        self._check()
        if self._residency("weights") not in ("resident", "blank"):
            raise TransitionConflict("The weights are not mapped; wake them first.")
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be read: {error}.", param="path") from error
        self.updated.append((path, content))
        return UpdateReport(updated=1, updated_bytes=len(content))

    async def collective_rpc(self, method: str, args: Sequence[Any] = ()) -> list[Any]:
        self._check()
        check_rpc(method, tuple(args))
        return [{"residual_bytes": 77, "verify": {"verified_bytes": 5}}.get(method, [])]

    async def reset_prefix_cache(self) -> None:
        self._check()
        self.prefix_resets += 1


def _prompt_logprobs(prompt: tuple[int, ...], num_top: int | None) -> tuple[dict[int, Logprob] | None, ...] | None:
    """Token i of the prompt has log-probability -i and rank i + 1; token 0, if wanted, is the likeliest."""
    if num_top is None:
        return None
    likeliest = {0: Logprob(-0.1, 1, "!")} if num_top else {}
    scored = [{token: Logprob(float(-at), at + 1), **likeliest} for at, token in enumerate(prompt)]
    return (None, *scored[1:])


class _Choice:
    """One of a request's completions: the script, or the prompt over and over, choice i starting at its i-th token."""

    def __init__(
        self, engine: FakeEngine, index: int, prompt: tuple[int, ...], params: SamplingParams, limit: int
    ) -> None:
        self.finished: FinishReason | None = None
        self._engine, self._index, self._prompt, self._params, self._limit = engine, index, prompt, params, limit
        self._detokenizer = Detokenizer(
            engine.tokenizer_.decode_stream(skip_special_tokens=params.skip_special_tokens),
            stop_strings=params.stop_strings,
            include_stop_string=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )
        self._count = 0
        self._script: tuple[int, ...] = ()
        if engine.script:
            script = engine.script[index % len(engine.script)]
            self._script = tuple(engine.tokenizer_.encode(script, add_special_tokens=False))

    def step(self, *, aborted: bool) -> CompletionOutput:
        if aborted:
            self.finished = "abort"
            return CompletionOutput(self._index, self._detokenizer.finish(), (), "abort", logprobs=())
        engine, params = self._engine, self._params
        if engine.breakage is not None and self._count == engine.break_after:
            raise engine.breakage
        said = self._script[self._count :] or self._prompt[(self._index + self._count) % len(self._prompt) :]
        token = said[0]
        self._count += 1
        text = self._detokenizer.feed(token)
        stop_reason: str | int | None = self._detokenizer.stop_string
        if stop_reason is None and token in params.stop_token_ids and self._count > params.min_tokens:
            stop_reason = token
        if stop_reason is not None or self._count == len(self._script):
            self.finished = "stop"
        elif self._count == self._limit:
            self.finished = "length"
        if self.finished:
            text += self._detokenizer.finish()
        logprobs = None if params.logprobs is None else (self._logprobs(token, params.logprobs),)
        return CompletionOutput(self._index, text, (token,), self.finished, stop_reason, logprobs)

    def _logprobs(self, token: int, num_top: int) -> dict[int, Logprob]:
        """The chosen token is the second likeliest, so that it is not always among the top ones."""
        others = [other for other in range(num_top + 2) if other != token]
        ranked = [others[0], token, *others[1:]]
        kept = [token, *(other for rank, other in enumerate(ranked) if rank < num_top and other != token)]
        return {one: Logprob(-0.5 * (ranked.index(one) + 1), ranked.index(one) + 1) for one in kept}
