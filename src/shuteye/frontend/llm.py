"""The engine for plain Python: blocking calls, results in order.

Knows nothing of asyncio or HTTP. The engine runs in a thread of this process, so sleep calls work from any thread.
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shuteye.audio import Audio, samples_from
from shuteye.config import DEFAULT_MODEL, EngineConfig
from shuteye.engine.messages import (
    ControlCall,
    PauseCall,
    ReloadCall,
    ResetPrefixCacheCall,
    ResumeCall,
    RpcCall,
    SleepCall,
    ToEngine,
    UpdateCall,
    WakeCall,
    tag_names,
)
from shuteye.errors import EngineDead, InvalidRequest, ShuteyeError
from shuteye.frontend.engine_client import EngineClient
from shuteye.frontend.thread_link import ThreadLink
from shuteye.model_info import ModelInfo
from shuteye.state import EngineState, SchedulerStats, SleepReport, UpdateReport, WakeReport
from shuteye.tasks.generate.requests import RequestOutput, SamplingParams
from shuteye.tasks.pool.inputs import PoolInputs, Prompt, Texts, embeddings_of, score_job
from shuteye.tasks.pool.requests import (
    EmbeddingRequestOutput,
    PooledOutput,
    PoolingParams,
    PoolInput,
    ScoringRequestOutput,
)
from shuteye.tasks.transcribe.requests import TranscribeParams, Transcription
from shuteye.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

Message = Mapping[str, Any]


class LLM:
    """An engine with blocking calls; a context manager.

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
        config = EngineConfig(model=model, **{"max_waiting_requests": sys.maxsize, **options})
        self._client = EngineClient(config, self._post)
        self._link = ThreadLink(config, on_message=self._client.on_message, on_death=self._on_death)
        self._link.start()
        self._closed = False
        try:
            self._client.ready.result()
        except BaseException:
            self.close()
            raise

    def _post(self, message: ToEngine) -> None:
        self._link.post(message)

    def _on_death(self, error: ShuteyeError) -> None:
        self._client.fail(error, status="dead")

    def close(self) -> None:
        """End the engine and give back its memory. Idempotent."""
        if not self._closed:
            self._closed = True
            self._client.fail(EngineDead("This LLM was closed; make another one."), status="closed")
            self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- what is known --------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        """The completed config."""
        return self._client.config

    @property
    def info(self) -> ModelInfo:
        """The loaded model's facts."""
        return self._client.info

    @property
    def state(self) -> EngineState:
        """The sleep state."""
        return self._client.state

    @property
    def stats(self) -> SchedulerStats:
        """The scheduler's counters as of the last step."""
        return self._client.stats

    @property
    def is_sleeping(self) -> bool:
        """True until every tag is resident and loaded."""
        return self.state.is_sleeping

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._client.tokenizer

    # --- generation -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts.

        Args:
            prompts: texts or token id lists.
            sampling_params: one for all, or one per prompt.

        Raises:
            InvalidRequest: a prompt, or its parameters, are something else.
            ShuteyeError: the first request that was refused or failed; the others are aborted.
        """
        _require_prompts(prompts)
        prompt_list: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        params = _one_each(SamplingParams() if sampling_params is None else sampling_params, len(prompt_list))
        submit = partial(self._client.submit, request_id=None, output_kind="final_only")
        return self._collect([partial(submit, prompt, one) for prompt, one in zip(prompt_list, params, strict=True)])

    def transcribe(
        self, audio: Audio | Sequence[Audio], params: TranscribeParams | None = None, *, prompt: str | None = None
    ) -> list[Transcription]:
        """Write down what is said in every recording; transcripts in the order of the recordings.

        Args:
            audio: paths, files as bytes, or arrays of samples at 16 kHz (no lists of numbers).
            prompt: what is to be taken for the text before each recording.

        Raises:
            ShuteyeError: the first recording that was refused or failed; the others are aborted.
        """
        recordings = audio if isinstance(audio, list | tuple) else [audio]
        submit = partial(
            self._client.submit_transcription,
            params=TranscribeParams() if params is None else params,
            prompt=prompt,
            request_id=None,
            output_kind="final_only",
        )
        return self._collect([partial(submit, samples_from(each)) for each in recordings])

    def _collect(self, submits: Sequence[Callable[..., str]]) -> list[Any]:
        """The last output of each request that `submits` send, given `deliver`."""
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        waiting: dict[str, int] = {}
        outputs: dict[int, Any] = {}
        try:
            for index, submit in enumerate(submits):
                waiting[submit(deliver=arrived.put)] = index
            while waiting:
                item = arrived.get()
                if isinstance(item, ShuteyeError):
                    raise item
                outputs[waiting.pop(item.request_id)] = item
        finally:
            for request_id in waiting:
                self._client.abort(request_id, deliver=arrived.put)
        return [outputs[index] for index in range(len(submits))]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, through the checkpoint's chat template."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        tokenizer = self.get_tokenizer()
        prompts = [
            tokenizer.encode(tokenizer.apply_chat_template(conversation, **template_kwargs), add_special_tokens=False)
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params)

    def embed(
        self, prompts: str | Sequence[Prompt], pooling_params: PoolingParams | None = None
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of every prompt, in their order; `.outputs.embedding` has the numbers.

        Raises:
            ShuteyeError: the request was refused or failed.
        """
        params = PoolingParams() if pooling_params is None else pooling_params
        inputs = self._pool_inputs(params).inputs([prompts] if isinstance(prompts, str) else prompts)
        return embeddings_of(inputs, self._pool(inputs, params))

    def score(
        self, queries: Texts, documents: Texts, pooling_params: PoolingParams | None = None
    ) -> list[ScoringRequestOutput]:
        """How well each document goes with its query; one query is compared with every document.

        A cross-encoder reads both texts at once; for an embedding model it is the cosine of their embeddings.

        Raises:
            ShuteyeError: the request was refused or failed.
        """
        params = PoolingParams() if pooling_params is None else pooling_params
        job = score_job(self._pool_inputs(params), queries, documents)
        return job.scores(self._pool(job.inputs, job.params))

    def _pool_inputs(self, params: PoolingParams) -> PoolInputs:
        return PoolInputs(self.get_tokenizer(), self.info, params)

    def _pool(self, inputs: Sequence[PoolInput], params: PoolingParams) -> PooledOutput:
        output: PooledOutput
        [output] = self._collect([partial(self._client.submit_pooling, inputs, params, request_id=None)])
        return output

    # --- control: see AsyncEngine for what each raises ------------------------------------------

    def sleep(
        self,
        level: int = 1,
        *,
        tags: Sequence[str] | None = None,
        mode: str | None = None,
        timeout_s: float | None = None,
    ) -> SleepReport:
        """Give memory back."""
        report: SleepReport = self._call(SleepCall(level, tag_names(tags), mode, timeout_s)).result()
        return report

    def wake_up(self, tags: Sequence[str] | None = None) -> WakeReport:
        """Map, fill and verify memory again."""
        report: WakeReport = self._call(WakeCall(tag_names(tags))).result()
        return report

    def pause(self, mode: str | None = None, *, timeout_s: float | None = None) -> None:
        """Close the gate without giving memory back."""
        self._call(PauseCall(mode, timeout_s)).result()

    def resume(self) -> None:
        """Lift a pause."""
        self._call(ResumeCall()).result()

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> UpdateReport:
        """Write tensors by their checkpoint names."""
        report: UpdateReport = self._call(UpdateCall(named_tensors=named_tensors)).result()
        return report

    def reload_weights(self, path: str | None = None) -> UpdateReport:
        """Load every weight again from the image, or from another checkpoint of the same model."""
        report: UpdateReport = self._call(ReloadCall(path)).result()
        return report

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self._call(ResetPrefixCacheCall()).result()

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a worker verb that changes nothing (see `engine.rpc.RPC_VERBS`) on every rank."""
        results: list[Any] = self._call(RpcCall(method, args)).result()
        return results

    def _call(self, call: ControlCall) -> Future[Any]:
        return self._client.call(call)


def _require_prompts(given: object) -> None:
    """Refuse what is no list: the keys of a dict would be completed as texts."""
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise InvalidRequest(
            f"prompts must be a text, or a list of texts or of lists of token ids, got {type(given).__name__}.",
            param="prompts",
        )


def _one_each(given: object, count: int) -> Sequence[Any]:
    """Parameters for `count` prompts; whether they are parameters at all, whoever takes them looks."""
    params = list(given) if isinstance(given, list | tuple) else [given] * count
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} sampling_params for {count} prompts.", param="sampling_params")
    return params
