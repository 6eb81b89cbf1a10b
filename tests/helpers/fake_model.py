"""What a fake engine's model says: its prompt over and over, or a script, one byte a token, with made-up numbers."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence

import tokenizers
from fake_memory import NBYTES
from tokenizers import decoders, models, pre_tokenizers

from shuteye.config import EngineConfig
from shuteye.errors import PromptTooLong
from shuteye.frontend.engine import ServedModel
from shuteye.model_info import ModelInfo
from shuteye.tasks.base import Job, RequestDelta
from shuteye.tasks.generate.logprob_limits import LogprobLimits
from shuteye.tasks.generate.outputs import GenerationJob, OutputProcessor
from shuteye.tasks.generate.requests import GenerateRequest, RequestOutput, TokenLogprobs
from shuteye.tasks.pool.outputs import PoolingJob
from shuteye.tasks.pool.requests import PooledOutput
from shuteye.tasks.transcribe.requests import Transcription
from shuteye.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{{ suffix|default('') }}"
)


def byte_tokenizer(*, chat_template: str | None = CHATML) -> Tokenizer:
    """One token per byte, so that most characters are several tokens; plus two special ones."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    templates = {} if chat_template is None else {"default": chat_template}
    return Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"}, chat_templates=templates)


def model_of(config: EngineConfig, task: str, tokenizer: Tokenizer, default_sampling: dict[str, float]) -> ServedModel:
    sizes = {"weights_bytes": NBYTES["weights"], "kv_cache_bytes": NBYTES["kv_cache"], "kv_bytes_per_token": 1}
    blocks = {"block_size": 16, "num_blocks": 10, "max_model_len": config.max_model_len or 512}
    of_config = {"max_logprobs": config.max_logprobs}
    named = {"model": config.model, "architecture": "FakeForCausalLM", "task": task, "dtype": "float32"}
    nowhere = {"tokenizer_dir": "", "image_dir": "", "eos_token_ids": ()}
    of_tokens = {"vocab_size": tokenizer.vocab_size, "default_sampling": default_sampling}
    return ServedModel(ModelInfo(**named, **blocks, **sizes, **nowhere, **of_tokens, **of_config), tokenizer)


def _require_room(wanted: int, model: ServedModel, param: str) -> None:
    if wanted > model.info.max_model_len:
        raise PromptTooLong(f"{wanted} tokens do not fit {model.info.max_model_len}.", param=param)


def output_of(job: Job, model: ServedModel) -> PooledOutput | Transcription:
    """A row is two numbers: how many tokens the input has, and their sum. Of audio it hears how many bytes it has."""
    if isinstance(job, PoolingJob):
        _require_room(max(len(each.token_ids) for each in job.inputs), model, "input")
        rows = [array("f", [len(each.token_ids), sum(each.token_ids)]).tobytes() for each in job.inputs]
        return PooledOutput("pool", tuple(rows))
    return Transcription("speech", f"{len(job.pcm)} bytes", "en", 1.0, (), num_tokens=1, finished=True)


class Choices:
    """The completions of one prompt, told by the real `OutputProcessor`."""

    def __init__(self, job: GenerationJob, model: ServedModel, request_id: str, script: Sequence[str]) -> None:
        assert job.output_kind == "delta", "the server only asks for deltas"
        limits = LogprobLimits.of(model.info)
        self._outputs = OutputProcessor(model.tokenizer, vocab_size=model.info.vocab_size, limits=limits)
        prepared = self._outputs.prepare(job)
        self.prompt = tuple(prepared.prompt)
        _require_room(len(self.prompt) + (job.params.max_tokens or 1), model, "prompt")
        self.num_steps = 0
        self.live = {
            each.request_id: deltas_of(
                each,
                index=index,
                script=script and model.tokenizer.encode(script[index % len(script)], add_special_tokens=False),
                max_model_len=model.info.max_model_len,
            )
            for index, each in enumerate(self._outputs.add(request_id, prepared, engine_id=request_id))
        }

    def step(self, *, aborts: bool) -> RequestOutput:
        """One token of each that is not finished, or the end of all."""
        if self.num_steps == 0:
            self._outputs.note_started([(each, time.monotonic()) for each in self.live])
        self.num_steps += 1
        aborted = [RequestDelta(each, finish_reason="abort") for each in self.live if aborts]
        deltas = aborted or [delta for each in self.live.values() for delta in next(each)]
        processed = self._outputs.process(deltas)
        for ended in {*processed.aborts, *(delta.request_id for delta in deltas if delta.finished)}:
            self.live.pop(ended, None)
        return processed.outputs[0]


def deltas_of(
    request: GenerateRequest, *, index: int, script: Sequence[int], max_model_len: int
) -> Iterator[list[RequestDelta]]:
    """Of choice `index`, step by step; unless there is a script, it begins with its `index`-th token of the prompt."""
    name, prompt, params = request.request_id, request.prompt_token_ids, request.params
    limit = params.max_tokens or max_model_len - len(prompt)
    scores_prompt = params.prompt_logprobs is not None and len(prompt) > 1
    before = [RequestDelta(name, prompt_logprobs=_of_prompt(prompt, params.prompt_logprobs))] if scores_prompt else []
    for count in range(1, limit + 1):
        token = script[count - 1] if script else prompt[(index + count - 1) % len(prompt)]
        stops = token in params.stop_token_ids and count > params.min_tokens
        said_all = count == len(script) and not stops
        reason = "stop" if stops else "length" if count == limit and not said_all else None
        logprobs = () if params.logprobs is None else (logprobs_of(index, token, params.logprobs),)
        if params.logprob_token_ids is not None:
            ids = (token, *params.logprob_token_ids)
            logprobs = (TokenLogprobs(ids, tuple(-float(other) for other in ids), ids),)
        delta = RequestDelta(name, (token,), logprobs, (), reason, token if stops else None, num_cached_tokens=1)
        yield [*before, delta, *([RequestDelta(name, finish_reason="stop")] if said_all else [])]
        before = []


def _of_prompt(prompt: Sequence[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """Token i of the prompt has log-probability -i and rank i + 1; token 0, if wanted, is the likeliest."""
    likeliest = ((0,), (-0.1,), (1,)) if num_top else ((), (), ())
    return tuple(
        TokenLogprobs((token, *likeliest[0]), (-float(at), *likeliest[1]), (at + 1, *likeliest[2]))
        for at, token in enumerate(prompt)
        if at > 0
    )


def logprobs_of(_index: int, token: int, num_top: int) -> TokenLogprobs:
    """The chosen token is the second likeliest, so that it is not always among the top ones."""
    others = [other for other in range(num_top + 2) if other != token]
    ranked = [others[0], token, *others[1:]]
    kept = [token, *(other for rank, other in enumerate(ranked) if rank < num_top and other != token)]
    ranks = tuple(ranked.index(one) + 1 for one in kept)
    return TokenLogprobs(tuple(kept), tuple(-0.5 * rank for rank in ranks), ranks)
