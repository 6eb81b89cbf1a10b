"""The engine for plain Python: an `AsyncEngine` on a thread of its own, blocking calls, results in order."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from shuteye.audio import Audio
from shuteye.calls import Call, Controls
from shuteye.config import DEFAULT_MODEL, EngineConfig
from shuteye.errors import EngineDead, InvalidRequest
from shuteye.frontend import batch
from shuteye.frontend.async_engine import AsyncEngine
from shuteye.frontend.batch import Message, ParamsList
from shuteye.frontend.engine import EngineView, KnownEngine, ServedModel
from shuteye.frontend.loop_thread import LoopThread
from shuteye.state import UpdateReport
from shuteye.tasks.generate.requests import RequestOutput
from shuteye.tasks.pool.inputs import Prompt, Texts
from shuteye.tasks.pool.requests import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingParams,
    ScoringRequestOutput,
)
from shuteye.tasks.transcribe.requests import TranscribeParams, Transcription
from shuteye.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")


class LLM(KnownEngine, Controls):
    """An engine with blocking calls, from any thread; a context manager. Its engine runs in a thread of this process.

    Args:
        model: local directory, `.gguf` file, hub id or alias.
        options: the other fields of `EngineConfig`.

    Raises:
        ShuteyeError: the config is invalid or loading failed, as the message says.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        unknown = sorted(options.keys() - EngineConfig.__dataclass_fields__.keys())
        if unknown:
            raise InvalidRequest(f"LLM has no option {unknown[0]!r}; see EngineConfig.", param=unknown[0])
        waits: Any = {"max_waiting_requests": sys.maxsize}  # its callers wait anyway, however many prompts there are
        config = EngineConfig(model=model, **(waits | options))
        self._engine = AsyncEngine(config, in_process=True)
        closed = EngineDead("This LLM was closed; make another one.")
        self._thread = LoopThread(self._engine.close, closed=closed)
        try:
            self._thread.run(self._engine.start())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the engine and give back its memory. Idempotent."""
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- requests: each raises the first error of a request, and aborts the others --------------

    def generate(self, prompts: str | Sequence[Prompt], sampling_params: ParamsList = None) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts.

        Args:
            prompts: texts or token id lists.
            sampling_params: one for all, or one per prompt.
        """
        return self._thread.run(batch.generate(self._engine, prompts, sampling_params))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: ParamsList = None,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, through the checkpoint's chat template."""
        return self._thread.run(batch.chat(self._engine, messages, sampling_params, template_kwargs))

    def transcribe(
        self, audio: Audio | Sequence[Audio], params: TranscribeParams | None = None, *, prompt: str | None = None
    ) -> list[Transcription]:
        """Write down what is said in every piece of audio; transcripts in their order.

        Args:
            audio: paths, files as bytes, or arrays of samples at 16 kHz (no lists of numbers).
            prompt: what is to be taken for the text before each piece.
        """
        return self._thread.run(batch.transcribe(self._engine, audio, params, prompt))

    def embed(
        self, prompts: str | Sequence[Prompt], pooling_params: PoolingParams | None = None
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of every prompt, in their order; `.outputs.embedding` has the numbers."""
        return self._thread.run(self._engine.embed(prompts, pooling_params))

    def classify(
        self, prompts: str | Sequence[Prompt], pooling_params: PoolingParams | None = None
    ) -> list[ClassificationRequestOutput]:
        """The classes of every prompt, in their order; `.outputs.probs` and `.outputs.label`."""
        return self._thread.run(self._engine.classify(prompts, pooling_params))

    def score(
        self, queries: Texts, documents: Texts, pooling_params: PoolingParams | None = None
    ) -> list[ScoringRequestOutput]:
        """How well each document goes with its query; see `Engine.score`."""
        return self._thread.run(self._engine.score(queries, documents, pooling_params))

    # --- control calls: see `shuteye.calls` -----------------------------------------------------

    def control(self, call: Call[R]) -> R:
        """Carry out a control call."""
        return self._thread.run(self._engine.control(call))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> UpdateReport:
        """See `AsyncEngine.update_weights`."""
        return self._thread.run(self._engine.update_weights(named_tensors))

    # --- what is known --------------------------------------------------------------------------

    @property
    def view(self) -> EngineView:
        """See `KnownEngine.view`."""
        return self._engine.view

    @property
    def model(self) -> ServedModel:
        """See `KnownEngine.model`."""
        return self._engine.model

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.tokenizer
