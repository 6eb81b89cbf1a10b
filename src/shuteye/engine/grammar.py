"""The grammars of constrained requests: compiled in the background, followed token by token, told as token masks.

Knows nothing of logits or scheduling. llguidance, and the tokenizer it needs, are loaded when the first such request
comes, and dropped by a sleep that leaves none: most engines never need them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shuteye.errors import InvalidRequest, ShuteyeError
from shuteye.memory.heap import return_free_heap
from shuteye.outputs import ErrorInfo, RequestDelta
from shuteye.plans import StepPlan, TokenMask
from shuteye.request import JSON_WHITESPACE, GenerateRequest, StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CACHED = 128
"""Compiled grammars kept for requests that ask for the same again."""


@dataclass(slots=True)
class _Following:
    """One running request. Before `starts_after` has come, its tokens are free."""

    matcher: LLMatcher
    wanted: StructuredOutputsParams
    started: bool

    def take(self, token_ids: Sequence[int]) -> str | None:
        """Follow tokens; what is wrong, if they do not fit or the grammar proved too complex."""
        for token_id in token_ids:
            if self.started:
                self.matcher.consume_token(token_id)
            elif token_id == self.wanted.starts_after:
                self.started = True
        return self.matcher.get_error() if self.matcher.is_error() else None


class Grammars:
    """Compiles the grammar of a request, then follows what it generates.

    A request comes in through `compile`, and back through `compiled` once its grammar is ready; from then on it is
    followed, over preemptions and sleeps, until `forget`.

    Args:
        tokenizer_dir: holds tokenizer.json.
        vocab_size: width of the logits.
        eos_token_ids: what a mask allows where the grammar lets the output end.
    """

    def __init__(self, *, tokenizer_dir: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._new_compiler = partial(_Compiler, tokenizer_dir, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self._compiler: _Compiler | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shuteye-grammar")  # starts with its first work
        self._compiling: dict[str, tuple[GenerateRequest, Future[LLMatcher]]] = {}
        self._following: dict[str, _Following] = {}

    @property
    def is_idle(self) -> bool:
        """True if no request is compiled or followed."""
        return not self._compiling and not self._following

    @property
    def num_compiling(self) -> int:
        """How many requests `compiled` has yet to give back."""
        return len(self._compiling)

    # --- on the way in --------------------------------------------------------------------------

    def compile(self, request: GenerateRequest) -> None:
        """Begin to compile a request's grammar, off this thread.

        Raises:
            InvalidRequest: the id is in use.
        """
        wanted = request.params.structured_outputs
        assert wanted is not None, "a request without a grammar needs none compiled"
        if request.request_id in self._compiling:
            raise InvalidRequest(
                f"Request id {request.request_id!r} is in use; wait for it to end or choose another.",
                param="request_id",
            )
        if self._compiler is None:
            self._compiler = self._new_compiler()
        self._compiling[request.request_id] = (request, self._thread.submit(self._compiler.matcher, wanted))

    def compiled(self, *, patience_s: float) -> list[tuple[GenerateRequest, ShuteyeError | None]]:
        """Requests whose grammar is ready, and those whose grammar is wrong, with the error; each once.

        Args:
            patience_s: how long to wait for the first of them.
        """
        if patience_s > 0:
            wait([future for _request, future in self._compiling.values()], patience_s, FIRST_COMPLETED)
        done = [(request, future) for request, future in self._compiling.values() if future.done()]
        outcomes: list[tuple[GenerateRequest, ShuteyeError | None]] = []
        for request, future in done:
            del self._compiling[request.request_id]
            wanted = request.params.structured_outputs
            assert wanted is not None
            try:
                matcher = future.result()
            except ShuteyeError as error:
                outcomes.append((request, error))
            else:
                started = wanted.starts_after is None
                self._following[request.request_id] = _Following(matcher, wanted, started=started)
                outcomes.append((request, None))
        return outcomes

    def abort(self, request_ids: Iterable[str]) -> list[RequestDelta]:
        """End those of the named requests that are still being compiled."""
        found = [request_id for request_id in request_ids if self._compiling.pop(request_id, None)]
        return [RequestDelta(request_id, finish_reason="abort") for request_id in found]

    def abort_all(self) -> list[RequestDelta]:
        """End every request that is still being compiled."""
        return self.abort(tuple(self._compiling))

    # --- while running --------------------------------------------------------------------------

    def masked(self, plan: StepPlan) -> StepPlan:
        """The plan, with a mask for every request that is about to sample under a grammar."""
        if not self._following:
            return plan
        masks = [
            TokenMask(chunk.request_id, following.matcher.compute_bitmask())
            for chunk in plan.chunks
            if chunk.sample and (following := self._following.get(chunk.request_id)) and following.started
        ]
        return replace(plan, masks=tuple(masks)) if masks else plan

    def follow(self, deltas: Sequence[RequestDelta]) -> list[RequestDelta]:
        """Take what a step did; a request whose grammar failed ends with an error in place of its delta."""
        if not self._following:
            return list(deltas)
        return [self._followed(delta) if delta.request_id in self._following else delta for delta in deltas]

    def _followed(self, delta: RequestDelta) -> RequestDelta:
        following = self._following[delta.request_id]
        wrong = following.take(delta.token_ids)
        if wrong is None:
            return delta
        return RequestDelta(delta.request_id, error=_info(_refusal(following.wanted, wrong)))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop the state of requests that ended; unknown ids are ignored."""
        for request_id in request_ids:
            self._following.pop(request_id, None)

    # --- rest -----------------------------------------------------------------------------------

    def rest(self) -> None:
        """Give back the memory of everything that was compiled, unless some request needs it; off this thread."""
        if self._compiler is not None and self.is_idle:
            compiler, self._compiler = self._compiler, None
            self._thread.submit(compiler.drop)


class _Compiler:
    """Texts of schemas, expressions and grammars → matchers at their beginning. Used by one thread at a time."""

    def __init__(self, tokenizer_dir: str, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_dir = tokenizer_dir
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, wanted: StructuredOutputsParams) -> LLMatcher:
        """A matcher of its own for one request.

        Raises:
            InvalidRequest: the grammar is wrong or too complex, or the model cannot end its output.
        """
        from llguidance import LLMatcher

        grammar = _grammar_text(wanted)
        found = self._cache.get(grammar)
        if found is None:
            found = LLMatcher(self._loaded_tokenizer(wanted.param), grammar, log_level=0)
            if found.is_error():
                raise _refusal(wanted, found.get_error())
            self._cache[grammar] = found
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(grammar)
        return found.deep_copy()

    def drop(self) -> None:
        """Forget everything and give its memory back to the system."""
        self._cache.clear()
        self._tokenizer = None
        return_free_heap()

    def _loaded_tokenizer(self, param: str) -> LLTokenizer:
        if self._tokenizer is None:
            if not self._eos_token_ids:
                raise InvalidRequest(
                    f"{param} is not supported with this model: it has no end-of-sequence token to end with.",
                    param=param,
                )
            from llguidance import LLTokenizer

            text = Path(self._tokenizer_dir, "tokenizer.json").read_text(encoding="utf-8")
            self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        return self._tokenizer


def _grammar_text(wanted: StructuredOutputsParams) -> str:
    """The grammar in llguidance's own form; most errors in it are found only when it is compiled."""
    from llguidance import LLMatcher, grammar_from

    try:
        if wanted.json_object:
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_json_options(wanted))
        if wanted.json is not None:
            return LLMatcher.grammar_from_json_schema(_schema(wanted.json), overrides=_json_options(wanted))
        if wanted.regex is not None:
            return LLMatcher.grammar_from_regex(wanted.regex)
        if wanted.choice is not None:
            return grammar_from("choice", json.dumps(list(wanted.choice)))
        assert wanted.grammar is not None
        return grammar_from("grammar", wanted.grammar)
    except ValueError as error:
        raise _refusal(wanted, str(error)) from error


def _schema(given: str | dict[str, Any]) -> dict[str, Any]:
    schema = json.loads(given) if isinstance(given, str) else given
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON schema is an object, got {given!r}")  # noqa: TRY004 (the caller's value, not ours)
    return schema


def _json_options(wanted: StructuredOutputsParams) -> Any:
    if wanted.disable_any_whitespace:
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": wanted.whitespace_pattern or JSON_WHITESPACE}


def _refusal(wanted: StructuredOutputsParams, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{wanted.param} cannot be used: {' '.join(reason.split())}", param=wanted.param)


def _info(error: ShuteyeError) -> ErrorInfo:
    return ErrorInfo(kind=type(error).__name__, message=error.message, param=error.param)
