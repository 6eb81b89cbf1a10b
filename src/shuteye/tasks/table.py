"""The tasks, each a row: what callers ask, what the engine takes, and who schedules, computes and tells it.

Whoever serves a model chooses by this table; which task a checkpoint is for, `models.modules` says. What schedules and
computes is imported when it is opened: callers' processes never need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shuteye.config import EngineConfig
from shuteye.errors import ErrorInfo, InternalError, InvalidRequest
from shuteye.model_info import ModelInfo, ModelSpec
from shuteye.tasks.base import Job, ModelRunner, RequestDelta, TaskOutputs, TaskScheduler
from shuteye.tasks.generate.logprob_limits import LogprobLimits
from shuteye.tasks.generate.outputs import GenerationJob, OutputProcessor
from shuteye.tasks.generate.plans import StepPlan, StepResult
from shuteye.tasks.generate.requests import GenerateRequest
from shuteye.tasks.pool.outputs import PoolingJob, PoolOutputs
from shuteye.tasks.pool.plans import PoolPlan, PoolResult
from shuteye.tasks.pool.requests import PoolRequest
from shuteye.tasks.transcribe.outputs import TranscriptionJob, TranscriptOutputs
from shuteye.tasks.transcribe.plans import SpeechPlan, SpeechResult
from shuteye.tasks.transcribe.requests import TranscribeRequest
from shuteye.tokenizer import Tokenizer

if TYPE_CHECKING:
    from shuteye.memory.arena import Arena
    from shuteye.memory.image import WeightImage
    from shuteye.models.rank_groups import RankGroups

Plan = StepPlan | PoolPlan | SpeechPlan
"""One step of a model. `starts` are the requests that get their place in a batch with it, where that is to be timed."""

Result = StepResult | PoolResult | SpeechResult
"""What came of a step, by the model's task."""

Request = GenerateRequest | PoolRequest | TranscribeRequest
"""What an engine may be asked for; which kind a model serves is decided by its task."""

WhyAborted = Callable[[], ErrorInfo]
"""The error that an aborted request ends with, asked for at that moment."""


@dataclass(frozen=True, slots=True)
class SchedulerSetup:
    """What a scheduler is made of; `config` is complete.

    Attributes:
        report: takes refusals of requests that had been let in, whenever they are found.
        max_in_flight: plans that may be in flight at a time.
    """

    config: EngineConfig
    spec: ModelSpec
    num_blocks: int
    report: Callable[[Iterable[RequestDelta]], None]
    max_in_flight: int = 1


@dataclass(frozen=True, slots=True)
class RunnerSetup:
    """What a runner is made of; `groups` are the other ranks, if there are any."""

    image: WeightImage
    weights: Arena
    config: EngineConfig
    num_threads: int
    groups: RankGroups | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What a kind of model is for."""

    job: type[Job[Any]]
    request: type[Request]
    open_outputs: Callable[[ModelInfo, Tokenizer, WhyAborted], TaskOutputs[Any]]
    open_scheduler: Callable[[SchedulerSetup], TaskScheduler]
    open_runner: Callable[[RunnerSetup], ModelRunner]


# --- generate -----------------------------------------------------------------------------------


def _generate_outputs(info: ModelInfo, tokenizer: Tokenizer, _why_aborted: WhyAborted) -> OutputProcessor:
    return OutputProcessor(tokenizer, vocab_size=info.vocab_size, limits=LogprobLimits.of(info))


def _generate_scheduler(setup: SchedulerSetup) -> TaskScheduler:
    from shuteye.tasks.generate.constraints import ConstrainedScheduler
    from shuteye.tasks.generate.grammar import Grammars
    from shuteye.tasks.generate.scheduler import Limits

    config, spec = setup.config, setup.spec
    assert config.max_model_len is not None
    grammars = Grammars(
        tokenizer_dir=spec.tokenizer_dir,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
        max_bytes=config.max_grammar_bytes,
        timeout_s=config.grammar_timeout_s,
    )
    limits = Limits(
        num_blocks=setup.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        max_in_flight=setup.max_in_flight,
    )
    return ConstrainedScheduler(
        limits,
        grammars,
        eos_token_ids=spec.eos_token_ids,
        enable_prefix_caching=config.enable_prefix_caching,
        report=setup.report,
    )


def _generate_runner(setup: RunnerSetup) -> ModelRunner:
    from shuteye.tasks.generate.runner import GenerationRunner

    return GenerationRunner(
        setup.image, setup.weights, setup.config, num_threads=setup.num_threads, groups=setup.groups
    )


# --- embed, score, classify -------------------------------------------------------------------------------


def _pool_outputs(_info: ModelInfo, _tokenizer: Tokenizer, why_aborted: WhyAborted) -> PoolOutputs:
    return PoolOutputs(why_aborted=why_aborted)


def _pool_scheduler(setup: SchedulerSetup) -> TaskScheduler:
    from shuteye.tasks.pool.scheduler import PoolScheduler

    config = setup.config
    assert config.max_model_len is not None
    return PoolScheduler(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        pooling=setup.spec.pooling,
    )


def _pool_runner(setup: RunnerSetup) -> ModelRunner:
    from shuteye.models.tensors import use_torch_threads
    from shuteye.tasks.kernels import use_kernels
    from shuteye.tasks.pool.runner import PoolingRunner

    use_torch_threads(setup.num_threads)
    is_native = use_kernels(setup.config.kernels, setup.num_threads)
    return PoolingRunner(setup.image, setup.weights, native=is_native)


# --- transcribe ---------------------------------------------------------------------------------


def _transcribe_outputs(_info: ModelInfo, tokenizer: Tokenizer, why_aborted: WhyAborted) -> TranscriptOutputs:
    return TranscriptOutputs(tokenizer, why_aborted=why_aborted)


def _transcribe_scheduler(setup: SchedulerSetup) -> TaskScheduler:
    from shuteye.tasks.transcribe.scheduler import SpeechScheduler

    spec = setup.spec
    return SpeechScheduler(
        spec=spec.speech, max_num_seqs=setup.config.max_num_seqs, available_bytes=spec.available_bytes
    )


def _transcribe_runner(setup: RunnerSetup) -> ModelRunner:
    from shuteye.models.tensors import use_torch_threads
    from shuteye.tasks.kernels import use_kernels
    from shuteye.tasks.transcribe.runner import SpeechRunner

    use_torch_threads(setup.num_threads)
    is_native = use_kernels(setup.config.kernels, setup.num_threads)
    return SpeechRunner(setup.image, setup.weights, native=is_native)


# --- the table ----------------------------------------------------------------------------------

_GENERATE = Task(GenerationJob, GenerateRequest, _generate_outputs, _generate_scheduler, _generate_runner)
_POOL = Task(PoolingJob, PoolRequest, _pool_outputs, _pool_scheduler, _pool_runner)
_TRANSCRIBE = Task(TranscriptionJob, TranscribeRequest, _transcribe_outputs, _transcribe_scheduler, _transcribe_runner)

TASKS: Mapping[str, Task] = {
    "generate": _GENERATE,
    "embed": _POOL,
    "score": _POOL,
    "classify": _POOL,
    "transcribe": _TRANSCRIBE,
}


def task_of_image(image: WeightImage) -> Task:
    """The task that the image's metadata names.

    Raises:
        InternalError: there is none of that name.
    """
    name = image.metadata["task"]
    if name not in TASKS:
        raise InternalError(f"{image.path} is the image of a model for the task {name!r}, which no runner serves.")
    return TASKS[name]


def require_job(info: ModelInfo, job: Job[Any]) -> None:
    """Refuse a job that is not for the model's task.

    Raises:
        InvalidRequest: names the model, its task, and those that the job is for.
    """
    if not isinstance(job, TASKS[info.task].job):
        wanted = " or ".join(f"'{name}'" for name, task in TASKS.items() if isinstance(job, task.job))
        raise InvalidRequest(f"This needs a model for the task {wanted}; {info.model!r} is one for '{info.task}'.")


def require_kind(task: str, request: Request) -> None:
    """Refuse a request that is not for the model's task.

    Raises:
        InvalidRequest: names task and kind.
    """
    if not isinstance(request, TASKS[task].request):
        raise InvalidRequest(f"The model is one for the task '{task}'; it cannot serve a {type(request).__name__}.")
