"""How an engine is to run: frozen, validated once, complete after `resolve`.

Knows nothing of where values come from; environment, files and flags are read in `cli/`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from shuteye.errors import InvalidRequest, MemoryExhausted, PromptTooLong
from shuteye.model_info import MAX_LOGPROBS, ModelSpec
from shuteye.state import RESERVED_BLOCKS, DrainMode, VerifyMode
from shuteye.typed_fields import settle_types

DType = Literal["auto", "bfloat16", "float16", "float32"]
Quantization = Literal["auto", "none", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]
SleepingPolicy = Literal["reject", "hold", "wake"]
Kernels = Literal["auto", "torch", "portable", "avx2", "avx512", "amx"]
ExecutorBackend = Literal["inproc", "mp", "ray"]
RayPlacement = Literal["auto", "pack", "spread"]
MemoryBackendName = Literal["auto", "linux", "fake", "cuda"]

KV_CACHE_DTYPES = {
    "auto": "auto",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "int8": "int8",
    "int8_per_token_head": "int8",  # vLLM's name of the same
}
"""What callers may say → what a KV cache holds."""

DEFAULT_MODEL = "smollm2-135m"
KV_SHARE_OF_FREE_MEMORY = 0.25
"""Default KV cache size as a share of the memory left after loading; pages cost only once used."""


def default_cache_dir() -> Path:
    """Where images and downloads live unless told otherwise."""
    return Path.home() / ".cache" / "shuteye"


def _path_text(name: str, value: object, *, meaning: str) -> str:
    """The text of a path that was given as one, or as text."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise InvalidRequest(f"{name} must name {meaning}, got {value!r}.", param=name)
    return str(os.fspath(value))


def _kv_cache_dtype(name: str) -> str:
    """One of the values of `KV_CACHE_DTYPES`."""
    if name in KV_CACHE_DTYPES:
        return KV_CACHE_DTYPES[name]
    why = " CPUs do not compute with 8-bit floats; int8 takes as many bytes." if name.startswith("fp8") else ""
    raise InvalidRequest(
        f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got {name!r}.{why}", param="kv_cache_dtype"
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine needs to know; field names are the command line's flags.

    Attributes:
        model: local directory, `.gguf` file, hub id, or built-in alias.
        revision: branch, tag or commit of a hub id; a local path has none.
        dtype: what is computed in, and what weights are held in that are not quantized; float16 is served as bfloat16.
        quantization: `auto` holds weights in the bits that the checkpoint has; `none` dequantizes them; the others
            quantize a checkpoint that is not quantized, when its image is made.
        kv_cache_dtype: what the KV cache holds: `auto` the numbers of `dtype`; `bfloat16`, `float16`, or `int8` with a
            scale for each token and KV head. Any spelling of `KV_CACHE_DTYPES` is taken.
        kv_cache_memory: bytes of KV cache of all ranks together; None sizes it from free memory, 0 is for models
            without one.
        max_kv_cache_memory: the most that it is sized to from free memory; None sets no bound of its own.
        chat_template: a Jinja template in the place of the checkpoint's; None uses those.
        max_model_len: longest prompt plus output in tokens; None takes the checkpoint's, if the KV cache can hold it.
        max_num_batched_tokens: the token budget of one step.
        max_waiting_requests: how many sequences may wait for a place in the batch; `LLM` lets as many wait as it likes.
        max_logprobs: most alternatives per token that a request may ask for; -1: the whole vocabulary.
        max_grammar_bytes: length of a request's schema, expression, grammar or choices.
        grammar_timeout_s: how long a request waits for its grammar to be compiled.
        on_sleeping_request: what becomes of requests that arrive while asleep.
        hold_timeout_s, hold_queue_size: bounds of the queue of held requests.
        drain_timeout_s: how long `mode="wait"` waits for requests in flight.
        verify_wake: how much of the weights is compared with checksums before the gate opens.
        canary: whether a short forward pass must reproduce its recorded logits before the gate opens.
        cache_dir: where images and fetched wheels live; text is taken as well, and `~` is the user's home.
        hang_timeout_s: a loaded engine process that gives no sign of life for so long counts as hung.
        step_timeout_s: so does one that takes longer for one step: of the model, or of a sleep or a wake.
        num_threads: compute threads of a rank; None divides all cores among the ranks.
        kernels: `auto` uses the native kernels where they can be used, `torch` never; the name of an instruction set
            uses those of that set, and refuses to start where they cannot run.
        distributed_executor_backend: where ranks run; None is `inproc` for one and `mp` for several.
        ray_placement: of `ray`, which machines ranks go to: `auto` as few as have CPUs, `pack` one, `spread` one for
            each stage, or for each rank if there is one stage.
        rank_timeout_s: a rank that does not answer for so long is killed.

    Raises:
        InvalidRequest: a value is of another type or out of range; `param` names it.
    """

    model: str = DEFAULT_MODEL
    revision: str | None = None
    dtype: DType = "auto"
    quantization: Quantization = "auto"
    chat_template: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting_requests: int = 4096
    max_logprobs: int = MAX_LOGPROBS
    max_grammar_bytes: int = 64 * 1024
    grammar_timeout_s: float = 30.0
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    kv_cache_memory: int | None = None
    max_kv_cache_memory: int | None = None
    enable_prefix_caching: bool = True
    enable_sleep_mode: bool = False
    on_sleeping_request: SleepingPolicy = "reject"
    hold_timeout_s: float = 60.0
    hold_queue_size: int = 256
    default_sleep_mode: DrainMode = "abort"
    drain_timeout_s: float = 60.0
    verify_wake: VerifyMode = "sample"
    canary: bool = True
    hang_timeout_s: float = 10.0
    step_timeout_s: float = 600.0
    seed: int = 0
    num_threads: int | None = None
    kernels: Kernels = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_executor_backend: ExecutorBackend | None = None
    ray_placement: RayPlacement = "auto"
    rank_timeout_s: float = 60.0
    memory_backend: MemoryBackendName = "auto"
    cache_dir: Path = field(default_factory=default_cache_dir)
    offline: bool = False

    def __post_init__(self) -> None:
        model = _path_text("model", self.model, meaning="a directory, a .gguf file, a hub id or an alias")
        cache_dir = _path_text("cache_dir", self.cache_dir, meaning="a directory")
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "cache_dir", Path(cache_dir).expanduser())
        settle_types(self)
        object.__setattr__(self, "kv_cache_dtype", _kv_cache_dtype(self.kv_cache_dtype))
        positive = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_waiting_requests": self.max_waiting_requests,
            "max_grammar_bytes": self.max_grammar_bytes,
            "grammar_timeout_s": self.grammar_timeout_s,
            "block_size": self.block_size,
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "max_model_len": self.max_model_len,
            "num_threads": self.num_threads,
            "hold_queue_size": self.hold_queue_size,
            "hold_timeout_s": self.hold_timeout_s,
            "drain_timeout_s": self.drain_timeout_s,
            "hang_timeout_s": self.hang_timeout_s,
            "step_timeout_s": self.step_timeout_s,
            "rank_timeout_s": self.rank_timeout_s,
        }
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise InvalidRequest(f"{name} must be a positive number, got {value}.", param=name)
        if self.max_logprobs < -1:
            raise InvalidRequest(
                f"max_logprobs must be -1, or 0 or more, got {self.max_logprobs}.", param="max_logprobs"
            )
        for name in ("kv_cache_memory", "max_kv_cache_memory"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InvalidRequest(f"{name} must be 0 or more, got {value}.", param=name)

    def resolve(self, spec: ModelSpec) -> EngineConfig:
        """A complete copy: dtype, context length and KV cache size decided from what was loaded.

        Raises:
            InvalidRequest: `max_model_len` exceeds the checkpoint's context.
            PromptTooLong: the KV cache cannot hold one sequence of `max_model_len`.
            MemoryExhausted: not even one block fits in free memory.
        """
        wanted = self.max_model_len or spec.context_length
        if wanted > spec.context_length:
            raise InvalidRequest(
                f"max_model_len {wanted} exceeds the checkpoint's context of {spec.context_length} tokens.",
                param="max_model_len",
            )
        dtype: DType = "float32" if spec.dtype == "float32" else "bfloat16"
        if spec.kv_bytes_per_token == 0:
            return replace(self, dtype=dtype, max_model_len=wanted, kv_cache_memory=self._no_kv_cache(spec))
        block_bytes = spec.kv_bytes_per_token * self.block_size
        blocks_per_sequence = -(-wanted // self.block_size)
        if self.kv_cache_memory is None:
            useful = blocks_per_sequence * self.max_num_seqs + RESERVED_BLOCKS
            share = int(spec.available_bytes * KV_SHARE_OF_FREE_MEMORY)
            most = share if self.max_kv_cache_memory is None else min(share, self.max_kv_cache_memory)
            num_blocks = min(most // block_bytes, useful)
        else:
            num_blocks = self.kv_cache_memory // block_bytes
            self._check_available(spec)
        num_usable = num_blocks - RESERVED_BLOCKS
        if num_usable < 1:
            raise MemoryExhausted(
                f"No room for a KV cache of two blocks: one takes {block_bytes:,} bytes, "
                f"{spec.available_bytes:,} are free and kv_cache_memory is {self.kv_cache_memory}."
            )
        if num_usable < blocks_per_sequence:
            if self.max_model_len is not None:
                raise PromptTooLong(
                    f"max_model_len {wanted} needs {blocks_per_sequence * block_bytes:,} bytes of KV cache, but there "
                    f"is room for {num_usable * block_bytes:,}. Lower max_model_len or raise kv_cache_memory.",
                    param="max_model_len",
                )
            wanted = num_usable * self.block_size
        return replace(self, dtype=dtype, max_model_len=wanted, kv_cache_memory=num_blocks * block_bytes)

    def _check_available(self, spec: ModelSpec) -> None:
        """Raise MemoryExhausted if the KV cache that was asked for could never be filled."""
        assert self.kv_cache_memory is not None
        if self.kv_cache_memory > spec.available_bytes:
            raise MemoryExhausted(
                f"A KV cache of {self.kv_cache_memory:,} bytes was asked for, and {spec.available_bytes:,} are "
                "available once the weights are loaded. Ask for less, or leave it out to use a share of what is there.",
                param="kv_cache_memory",
            )

    def _no_kv_cache(self, spec: ModelSpec) -> int:
        """0: the model computes without one.

        Raises:
            InvalidRequest: one of some size or dtype was asked for.
        """
        if self.kv_cache_dtype != "auto":
            raise InvalidRequest(
                f"kv_cache_dtype is {self.kv_cache_dtype}, but {spec.architecture} (task '{spec.task}') has no KV "
                "cache that could be of another dtype than the model; leave it out.",
                param="kv_cache_dtype",
            )
        if self.kv_cache_memory:
            raise InvalidRequest(
                f"kv_cache_memory is {self.kv_cache_memory:,}, but {spec.architecture} (task '{spec.task}') has no "
                "KV cache; leave it out.",
                param="kv_cache_memory",
            )
        return 0
