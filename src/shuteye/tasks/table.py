"""Which requests, scheduler and runner serve a model's task: the one place that chooses by task.

No torch until a runner is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from shuteye.config import EngineConfig
from shuteye.errors import InternalError, InvalidRequest
from shuteye.model_info import ModelSpec
from shuteye.tasks.base import ModelRunner, RequestDelta, TaskScheduler
from shuteye.tasks.generate.constraints import ConstrainedScheduler
from shuteye.tasks.generate.grammar import Grammars
from shuteye.tasks.generate.plans import StepPlan, StepResult
from shuteye.tasks.generate.requests import GenerateRequest
from shuteye.tasks.generate.scheduler import Limits
from shuteye.tasks.pool.plans import PoolPlan, PoolResult
from shuteye.tasks.pool.requests import PoolRequest
from shuteye.tasks.pool.scheduler import PoolScheduler
from shuteye.tasks.transcribe.plans import SpeechPlan, SpeechResult
from shuteye.tasks.transcribe.requests import TranscribeRequest
from shuteye.tasks.transcribe.scheduler import SpeechScheduler

if TYPE_CHECKING:
    from shuteye.memory.arena import Arena
    from shuteye.memory.image import WeightImage

REQUEST_KINDS: dict[str, type[Request]] = {
    "generate": GenerateRequest,
    "embed": PoolRequest,
    "score": PoolRequest,
    "transcribe": TranscribeRequest,
}
"""Task → what its scheduler takes."""


def require_kind(task: str, request: Request) -> None:
    """Refuse a request that is not for the model's task.

    Raises:
        InvalidRequest: names task and kind.
    """
    if not isinstance(request, REQUEST_KINDS[task]):
        raise InvalidRequest(f"The model is one for the task '{task}'; it cannot serve a {type(request).__name__}.")


def starts_of(plan: Plan) -> tuple[str, ...]:
    """The requests that get their place in a batch with this step, as far as its kind of plan tells."""
    if isinstance(plan, StepPlan):
        return tuple(admission.request_id for admission in plan.admissions)
    return plan.starts if isinstance(plan, PoolPlan) else ()


def open_scheduler(
    config: EngineConfig, spec: ModelSpec, *, num_blocks: int, report: Callable[[Iterable[RequestDelta]], None]
) -> TaskScheduler:
    """The scheduler for the task of the loaded model; `config` is complete.

    Args:
        report: takes refusals of requests that had been let in, whenever they are found.
    """
    assert config.max_model_len is not None
    if REQUEST_KINDS[spec.task] is PoolRequest:
        return PoolScheduler(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            pooling=spec.pooling,
        )
    if REQUEST_KINDS[spec.task] is TranscribeRequest:
        return SpeechScheduler(spec=spec.speech, max_num_seqs=config.max_num_seqs, available_bytes=spec.available_bytes)
    grammars = Grammars(
        tokenizer_dir=spec.tokenizer_dir,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
        max_bytes=config.max_grammar_bytes,
        timeout_s=config.grammar_timeout_s,
    )
    limits = Limits(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
    )
    return ConstrainedScheduler(
        limits,
        grammars,
        eos_token_ids=spec.eos_token_ids,
        enable_prefix_caching=config.enable_prefix_caching,
        report=report,
    )


Plan = StepPlan | PoolPlan | SpeechPlan
Result = StepResult | PoolResult | SpeechResult
"""What a step computes, and what came of it, by the model's task."""


Request = GenerateRequest | PoolRequest | TranscribeRequest
"""What an engine may be asked for; which kind a model serves is decided by its task."""


def open_runner(image: WeightImage, weights: Arena, config: EngineConfig, *, num_threads: int) -> ModelRunner:
    """The runner for the task that the image's metadata names.

    Raises:
        ImageFailure, UnsupportedModel: binding failed, see `models.loaded.bind` and `models.encoder.bind_encoder`.
    """
    task = image.metadata["task"]
    if task == "generate":
        from shuteye.tasks.generate.runner import GenerationRunner

        return GenerationRunner(image, weights, config, num_threads=num_threads)
    if task in ("embed", "score"):
        from shuteye.tasks.pool.runner import PoolingRunner

        return PoolingRunner(image, weights)
    if task == "transcribe":
        from shuteye.tasks.transcribe.runner import SpeechRunner

        return SpeechRunner(image, weights)
    raise InternalError(f"{image.path} is the image of a model for the task {task!r}, which no runner serves.")
