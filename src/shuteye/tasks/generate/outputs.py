"""Turns what the engine did for each sequence into the outputs of the jobs that callers gave.

Deltas in, `RequestOutput`s out, and which sequences to abort. Parameters that name tokens are checked against the
vocabulary here, where the tokenizer is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from shuteye.errors import ErrorInfo, InvalidRequest, info_of, refusal
from shuteye.tasks.base import Deltas, Job, OutputKind, Processed, RequestDelta, TaskOutputs
from shuteye.tasks.generate.detokenizer import Detokenizer
from shuteye.tasks.generate.logprob_limits import LogprobLimits
from shuteye.tasks.generate.requests import (
    CompletionOutput,
    FinishReason,
    GenerateRequest,
    Logprob,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from shuteye.tokenizer import Tokenizer
from shuteye.typed_fields import require_instance


@dataclass(frozen=True, slots=True)
class GenerationJob(Job[RequestOutput]):
    """One prompt to complete, `params.n` times.

    Attributes:
        prompt: a text or token ids; ids once it is prepared.
        text: of the prompt, where that was given as text.
    """

    prompt: str | Sequence[int]
    params: SamplingParams
    output_kind: OutputKind = "cumulative"
    text: str | None = None

    @property
    def deltas(self) -> Deltas | None:
        """See `Job.deltas`."""
        return DELTAS if self.output_kind == "delta" else None


@dataclass(slots=True)
class _Completion:
    """One of a request's n sequences. Lists grow until they are delivered as a delta, which empties them."""

    index: int
    engine_id: str
    detokenizer: Detokenizer
    begun: bool = False
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class _Request:
    """What a caller asked for: one prompt, n completions. `engine_id` is its name in the engine."""

    request_id: str
    engine_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    output_kind: OutputKind
    completions: list[_Completion] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    known_prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    num_cached_tokens: int = 0
    scheduled_at: float | None = None

    @property
    def finished(self) -> bool:
        return all(completion.finished for completion in self.completions)

    def score_prompt(self, logprobs: Iterable[dict[int, Logprob]]) -> None:
        """Take what more became known of the prompt; once that is all, every output tells it."""
        self.prompt_logprobs += logprobs
        if self.params.prompt_logprobs is not None and len(self.prompt_logprobs) >= len(self.prompt_token_ids):
            self.known_prompt_logprobs = tuple(self.prompt_logprobs)

    @property
    def unfinished_ids(self) -> tuple[str, ...]:
        return tuple(completion.engine_id for completion in self.completions if not completion.finished)


class OutputProcessor(TaskOutputs[GenerationJob]):
    """Fans jobs out into engine-side sequences, and their deltas in again. One per engine client."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, limits: LogprobLimits | None = None) -> None:
        self._tokenizer = tokenizer
        self._limits = limits or LogprobLimits(vocab_size)
        self._vocab_size = vocab_size
        self._requests: dict[str, _Request] = {}
        self._completions: dict[str, tuple[_Request, _Completion]] = {}  # unfinished ones, by engine-side id

    @property
    def has_unfinished(self) -> bool:
        """True while some request awaits output."""
        return bool(self._requests)

    def prepare(self, job: GenerationJob) -> GenerationJob:
        """The job with token ids for its prompt, and with its parameters as the engine takes them.

        Raises:
            InvalidRequest: the prompt is no text and no ids of this model's tokens, or parameters are something else.
        """
        require_instance(job.params, SamplingParams, param="sampling_params")
        params = resolve_token_params(job.params, self._tokenizer, vocab_size=self._vocab_size)
        if isinstance(job.prompt, str):
            job = replace(job, prompt=self._tokenizer.encode(job.prompt), text=job.prompt)
        else:
            _require_token_ids(job.prompt, self._vocab_size)
        return replace(job, params=self._limits.resolved(params, num_prompt_tokens=len(job.prompt)))

    def add(self, request_id: str, job: GenerationJob, *, engine_id: str) -> list[GenerateRequest]:
        """Follow a prepared job; the sequences to submit to the engine: itself, or "<id>/<index>" for n > 1.

        Raises:
            InvalidRequest: the id, or one derived from it, is in use.
        """
        assert not isinstance(job.prompt, str), "the job was not prepared"
        params = job.params
        request = _Request(request_id, engine_id, job.text, tuple(job.prompt), params, job.output_kind)
        children = _fan_out(request)
        taken = [child.request_id for child in children if child.request_id in self._completions]
        if taken or request_id in self._requests:
            raise InvalidRequest(
                f"Request id {request_id!r} is in use; wait for it to end or choose another.", param="request_id"
            )
        request.score_prompt(())  # a prompt of one token has nothing to wait for
        self._requests[request_id] = request
        for index, child in enumerate(children):
            completion = _Completion(index, child.request_id, self._new_detokenizer(params))
            request.completions.append(completion)
            self._completions[child.request_id] = (request, completion)
        return children

    def process(self, deltas: Iterable[RequestDelta]) -> Processed:
        """Take what the engine did; deltas of sequences that are not followed (any more) are ignored."""
        touched: dict[str, _Request] = {}
        aborts: list[str] = []
        errors: list[tuple[str, ErrorInfo]] = []
        for delta in deltas:
            request, completion = self._completions.get(delta.request_id, (None, None))
            if request is None or completion is None:
                continue
            error = delta.error or self._try_apply(request, completion, delta)
            if error is not None:
                touched.pop(request.request_id, None)
                ended = delta.request_id if delta.finished else None
                aborts += [engine_id for engine_id in self.abort(request.request_id) if engine_id != ended]
                errors.append((request.request_id, error))
                continue
            if delta.prompt_logprobs:
                continue
            touched[request.request_id] = request
            if completion.finished:
                del self._completions[completion.engine_id]
                if not delta.finished:
                    aborts.append(completion.engine_id)
        outputs = [output for request in touched.values() if (output := self._output(request)) is not None]
        return Processed(outputs=tuple(outputs), aborts=tuple(aborts), errors=tuple(errors))

    def note_started(self, started: Iterable[tuple[str, float]]) -> None:
        """Sequences got their place in the batch, each at its monotonic second; a request's is that of its first."""
        for engine_id, at in started:
            request, _ = self._completions.get(engine_id, (None, None))
            if request is not None and request.scheduled_at is None:
                request.scheduled_at = at

    def abort(self, request_id: str) -> list[str]:
        """Stop following a request, if it is known; the engine-side ids to abort."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        for engine_id in request.unfinished_ids:
            del self._completions[engine_id]
        return list(request.unfinished_ids)

    def engine_ids(self, request_id: str) -> tuple[str, ...]:
        """The engine-side ids of a request that are unfinished; none if it is not known."""
        request = self._requests.get(request_id)
        return request.unfinished_ids if request else ()

    def _new_detokenizer(self, params: SamplingParams) -> Detokenizer:
        return Detokenizer(
            self._tokenizer.decode_stream(skip_special_tokens=params.skip_special_tokens),
            stop_strings=params.stop_strings,
            include_stop_string=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    # --- one delta -------------------------------------------------------------------------------

    def _try_apply(self, request: _Request, completion: _Completion, delta: RequestDelta) -> ErrorInfo | None:
        """Take a delta; an error if that went wrong, which ends this request alone."""
        try:
            self._apply(request, completion, delta)
        except Exception as error:  # noqa: BLE001 (told to the caller, and logged)
            return info_of(refusal(error, "Reading what was generated"))
        return None

    def _apply(self, request: _Request, completion: _Completion, delta: RequestDelta) -> None:
        if delta.prompt_logprobs:
            request.score_prompt(map(self._logprobs, delta.prompt_logprobs))
            return
        if completion.index == 0 and not completion.begun:
            request.num_cached_tokens = delta.num_cached_tokens
        completion.begun = True
        hidden = self._hidden_token(request.params, delta)
        for position, token_id in enumerate(delta.token_ids):
            completion.token_ids.append(token_id)
            if delta.logprobs and request.params.reports_logprobs:
                completion.logprobs.append(self._logprobs(delta.logprobs[position]))
            if position != hidden:
                completion.texts.append(completion.detokenizer.feed(token_id))
            if completion.detokenizer.stop_string is not None:
                break
        if delta.finish_reason is not None:
            completion.texts.append(completion.detokenizer.finish())
        stop_string = completion.detokenizer.stop_string
        completion.finish_reason = delta.finish_reason if stop_string is None else "stop"
        completion.stop_reason = delta.stop_token_id if stop_string is None else stop_string

    def _hidden_token(self, params: SamplingParams, delta: RequestDelta) -> int | None:
        """Position in the delta of the token whose text is not shown: an eos, or a special stop token, at its end.

        "The returned output will contain the stop tokens unless the stop tokens are special" (vLLM's SamplingParams).
        """
        if delta.finish_reason != "stop" or params.include_stop_str_in_output:
            return None
        if delta.stop_token_id is not None and not self._tokenizer.is_special(delta.stop_token_id):
            return None
        return len(delta.token_ids) - 1

    def _logprobs(self, at: TokenLogprobs) -> dict[int, Logprob]:
        return {
            token_id: Logprob(logprob=logprob, rank=rank, decoded_token=self._tokenizer.token_text(token_id))
            for token_id, logprob, rank in zip(at.token_ids, at.logprobs, at.ranks, strict=True)
        }

    # --- one output ------------------------------------------------------------------------------

    def _output(self, request: _Request) -> RequestOutput | None:
        """What to deliver for a request that changed; forgets it once finished."""
        finished = request.finished
        if finished:
            self._requests.pop(request.request_id)
        elif request.output_kind == "final_only":
            return None
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=_new_outputs(request) if request.output_kind == "delta" else _all_outputs(request),
            finished=finished,
            num_cached_tokens=request.num_cached_tokens,
            scheduled_at=request.scheduled_at,
            prompt_logprobs=request.known_prompt_logprobs,
        )


def _fan_out(request: _Request) -> list[GenerateRequest]:
    params = request.params
    if params.n == 1:
        return [GenerateRequest(request.engine_id, request.prompt_token_ids, params)]
    return [
        GenerateRequest(
            request_id=f"{request.engine_id}/{index}",
            prompt_token_ids=request.prompt_token_ids,
            params=replace(
                params,
                n=1,
                seed=None if params.seed is None else params.seed + index,
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,  # once is enough
            ),
        )
        for index in range(params.n)
    ]


def _all_outputs(request: _Request) -> tuple[CompletionOutput, ...]:
    return tuple(_completion_output(request, completion) for completion in request.completions)


def _new_outputs(request: _Request) -> tuple[CompletionOutput, ...]:
    """What was not delivered yet, per completion that has any; it is forgotten here."""
    outputs = []
    for completion in request.completions:
        # An abort brings no token, yet must be told: the text flushed at the end, empty or not, is what tells it.
        if completion.texts or completion.token_ids:
            outputs.append(_completion_output(request, completion))
            completion.texts, completion.token_ids, completion.logprobs = [], [], []
    return tuple(outputs)


def _completion_output(request: _Request, completion: _Completion) -> CompletionOutput:
    return CompletionOutput(
        index=completion.index,
        text="".join(completion.texts),
        token_ids=tuple(completion.token_ids),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        logprobs=tuple(completion.logprobs) if request.params.reports_logprobs else None,
    )


# --- several delta outputs -----------------------------------------------------------------------


def _joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    completions: dict[int, list[CompletionOutput]] = {}
    for output in outputs:
        for completion in output.outputs:
            completions.setdefault(completion.index, []).append(completion)
    parts = (completions[index] for index in sorted(completions))
    return replace(outputs[-1], outputs=tuple(map(_joined_completion, parts)))


def _joined_completion(parts: Sequence[CompletionOutput]) -> CompletionOutput:
    last = parts[-1]
    return replace(
        last,
        text="".join(part.text for part in parts),
        token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
        logprobs=None if last.logprobs is None else tuple(found for part in parts for found in part.logprobs or ()),
    )


def _num_entries(output: RequestOutput) -> int:
    return sum(len(completion.token_ids) + sum(map(len, completion.logprobs or ())) for completion in output.outputs)


DELTAS = Deltas(join=_joined, weigh=_num_entries)


def _require_token_ids(given: object, vocab_size: int) -> None:
    if not isinstance(given, Sequence) or not all(isinstance(token, int) for token in given):
        raise InvalidRequest(
            f"A prompt must be a text or a list of token ids, got {type(given).__name__}.", param="prompt"
        )
    outside = next((token for token in given if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise InvalidRequest(
            f"Token id {outside} is out of vocabulary; ids go from 0 to {vocab_size - 1}.", param="prompt"
        )


def resolve_token_params(params: SamplingParams, tokenizer: Tokenizer, *, vocab_size: int) -> SamplingParams:
    """The parameters as the engine takes them.

    Raises:
        InvalidRequest: a token id that the model does not know; `param` names the field.
    """
    _require_known(params.logprob_token_ids or (), vocab_size, param="logprob_token_ids")
    if params.logit_bias is None and params.allowed_token_ids is None and not params.bad_words:
        return params
    _require_known(params.logit_bias or (), vocab_size, param="logit_bias")
    _require_known(params.allowed_token_ids or (), vocab_size, param="allowed_token_ids")
    if params.allowed_token_ids is not None:
        params = replace(params, allowed_token_ids=tuple(dict.fromkeys(params.allowed_token_ids)))
    bad = [sequence for word in params.bad_words for sequence in _spellings(word, tokenizer)]
    return replace(params, bad_token_ids=tuple(bad))


def _require_known(token_ids: Iterable[int], vocab_size: int, *, param: str) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{param} names token {token_id}, which is not in the vocabulary; ids go from 0 to {vocab_size - 1}.",
                param=param,
            )


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A word's tokens at the beginning of a text, and within one if they differ in the first token only (as vLLM)."""
    opening = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
    within = tuple(tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False))
    if not opening:
        raise InvalidRequest(f"bad_words has {word!r}, which is no token of this model.", param="bad_words")
    if len(within) == len(opening) and within[0] != opening[0]:
        return [opening, within]
    return [opening]
