"""The grammars of constrained requests: compiled in the background, followed token by token, told as token masks.

llguidance, and the tokenizer it needs, are loaded when the first such request comes, and dropped by a sleep that leaves
none: most engines never need them.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shuteye.errors import InvalidRequest, QueueFull, ShuteyeError, info_of, refusal
from shuteye.heap import return_free_heap
from shuteye.tasks.base import RequestDelta, id_in_use
from shuteye.tasks.generate.plans import StepPlan, TokenMask
from shuteye.tasks.generate.requests import JSON_WHITESPACE, GenerateRequest, StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CACHED = 128
"""Compiled grammars kept for requests that ask for the same again."""

MIN_STACK_BYTES = 1 << 26
STACK_BYTES_PER_TEXT_BYTE = 4096
"""The compiler recurses over rules that refer to each other, and a stack that overflows ends the process: it has a
thread whose stack is eight times what the worst grammar found took. Only what is used of it costs memory."""


@dataclass(frozen=True, slots=True)
class _Compiling:
    """One request on its way in."""

    request: GenerateRequest
    matcher: Future[LLMatcher]
    deadline: float  # monotonic seconds

    @property
    def wanted(self) -> StructuredOutputsParams:
        wanted = self.request.params.structured_outputs
        assert wanted is not None, "a request without a grammar needs none compiled"
        return wanted

    def given_up(self) -> ShuteyeError:
        """What to tell the caller once the deadline is over; its own grammar is at fault if it has been begun."""
        if self.matcher.cancel():
            return QueueFull("The grammars of other requests are still being compiled; try again later.")
        return _refusal(self.wanted, "compiling it takes longer than --grammar-timeout-s; make it simpler.")


@dataclass(slots=True)
class _Following:
    """One running request. Before `starts_after` has come, its tokens are free. `failure` is what ends it early."""

    matcher: LLMatcher
    wanted: StructuredOutputsParams
    started: bool
    failure: ShuteyeError | None = None

    def mask(self) -> bytes:
        """Which tokens may come next; none if the grammar failed, since what is sampled then is not shown."""
        try:
            return self.matcher.compute_bitmask()
        except Exception as error:  # noqa: BLE001 (a bug in the library; told to the caller)
            self.failure = refusal(error, "Following the grammar")
            return b""

    def take(self, token_ids: Sequence[int]) -> None:
        """Follow tokens; they may not fit, or the grammar may prove too complex."""
        try:
            for token_id in token_ids:
                if self.started:
                    self.matcher.consume_token(token_id)
                elif token_id == self.wanted.starts_after:
                    self.started = True
            if self.matcher.is_error():
                self.failure = _refusal(self.wanted, self.matcher.get_error())
        except Exception as error:  # noqa: BLE001 (as above)
            self.failure = refusal(error, "Following the grammar")


class Grammars:
    """Compiles the grammar of a request, then follows what it generates.

    A request comes in through `compile`, and back through `compiled` once its grammar is ready; from then on it is
    followed, over preemptions and sleeps, until `forget`.

    Args:
        tokenizer_dir: holds tokenizer.json.
        vocab_size: width of the logits.
        eos_token_ids: what a mask allows where the grammar lets the output end.
        max_bytes: length of a grammar's text.
        timeout_s: how long a request waits for its grammar; nothing can stop a compiler that has begun.
    """

    def __init__(
        self, *, tokenizer_dir: str, vocab_size: int, eos_token_ids: Sequence[int], max_bytes: int, timeout_s: float
    ) -> None:
        self._new_compiler = partial(_Compiler, tokenizer_dir, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self._compiler: _Compiler | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._compiling: dict[str, _Compiling] = {}
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

    def check(self, request: GenerateRequest) -> None:
        """Refuse what costs too much to be compiled.

        Raises:
            InvalidRequest: the grammar's text is too long, or none.
        """
        wanted = request.params.structured_outputs
        if wanted is None:
            return
        try:
            nbytes = _text_bytes(wanted)
        except Exception as error:
            raise refusal(error, wanted.param, param=wanted.param) from error
        if nbytes > self._max_bytes:
            raise InvalidRequest(
                f"{wanted.param} has {nbytes:,} bytes; this server compiles up to {self._max_bytes:,} bytes "
                "(--max-grammar-bytes).",
                param=wanted.param,
            )

    def compile(self, request: GenerateRequest) -> None:
        """Begin to compile a request's grammar, off this thread.

        Raises:
            InvalidRequest: the id is in use.
        """
        if request.request_id in self._compiling:
            raise id_in_use(request.request_id)
        wanted = request.params.structured_outputs
        assert wanted is not None, "a request without a grammar needs none compiled"
        if self._compiler is None:
            self._compiler = self._new_compiler()
        if self._thread is None:
            self._thread = _deep_thread(max(MIN_STACK_BYTES, STACK_BYTES_PER_TEXT_BYTE * self._max_bytes))
        matcher = self._thread.submit(self._compiler.matcher, wanted)
        self._compiling[request.request_id] = _Compiling(request, matcher, time.monotonic() + self._timeout_s)

    def compiled(self, *, wait_s: float) -> list[tuple[GenerateRequest, ShuteyeError | None]]:
        """Requests whose grammar is ready, and those whose grammar is wrong, with the error; each once.

        Args:
            wait_s: how long to wait for the first of them.
        """
        if wait_s > 0:
            wait([each.matcher for each in self._compiling.values()], wait_s, FIRST_COMPLETED)
        now = time.monotonic()
        over = [each for each in self._compiling.values() if each.matcher.done() or each.deadline <= now]
        return [(each.request, self._outcome(each)) for each in over]

    def _outcome(self, each: _Compiling) -> ShuteyeError | None:
        del self._compiling[each.request.request_id]
        if not each.matcher.done():
            return each.given_up()
        error = each.matcher.exception()
        if error is not None:
            return refusal(error, each.wanted.param, param=each.wanted.param)
        started = each.wanted.starts_after is None
        self._following[each.request.request_id] = _Following(each.matcher.result(), each.wanted, started=started)
        return None

    def abort(self, request_ids: Iterable[str]) -> list[RequestDelta]:
        """End those of the named requests that are still being compiled; what has not begun never is."""
        found = {request_id: each for request_id in request_ids if (each := self._compiling.pop(request_id, None))}
        for each in found.values():
            each.matcher.cancel()
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
            TokenMask(chunk.request_id, mask)
            for chunk in plan.chunks
            if chunk.sample
            and (following := self._following.get(chunk.request_id))
            and following.started
            and (mask := following.mask())
        ]
        return replace(plan, masks=tuple(masks)) if masks else plan

    def follow(self, deltas: Sequence[RequestDelta]) -> list[RequestDelta]:
        """Take what a step did; a request whose grammar failed ends with an error in place of its delta."""
        if not self._following:
            return list(deltas)
        return [self._followed(delta) if delta.request_id in self._following else delta for delta in deltas]

    def _followed(self, delta: RequestDelta) -> RequestDelta:
        following = self._following[delta.request_id]
        if following.failure is None:
            following.take(delta.token_ids)
        return delta if following.failure is None else RequestDelta(delta.request_id, error=info_of(following.failure))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop the state of requests that ended; unknown ids are ignored."""
        for request_id in request_ids:
            self._following.pop(request_id, None)

    # --- rest -----------------------------------------------------------------------------------

    def rest(self) -> None:
        """Give back the memory of everything that was compiled, unless some request needs it; off this thread."""
        if self._compiler is None or self._thread is None or not self.is_idle:
            return
        self._thread.submit(self._compiler.drop)
        self._thread.shutdown(wait=False)
        self._compiler = self._thread = None


def _deep_thread(stack_bytes: int) -> ThreadPoolExecutor:
    """An executor of one thread, started with a stack of this size."""
    before = threading.stack_size(stack_bytes)
    try:
        executor = ThreadPoolExecutor(1, thread_name_prefix="shuteye-grammar")
        executor.submit(int).result()
    finally:
        threading.stack_size(before)
    return executor


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


def _text_bytes(wanted: StructuredOutputsParams) -> int:
    """How much there is to compile."""
    schema = json.dumps(wanted.json) if isinstance(wanted.json, dict) else wanted.json
    texts = (schema, wanted.regex, wanted.grammar, wanted.whitespace_pattern, *(wanted.choice or ()))
    return sum(len(text.encode()) for text in texts if text is not None)
