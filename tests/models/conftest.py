"""Loads checkpoints as a worker does, and generates with a minimal loop instead of a scheduler."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_models import Ranks
from thread_group import thread_groups

from shuteye.cache.kv_cache import KVCache
from shuteye.cache.kv_layout import KVLayout, cache_dtype
from shuteye.config import DType, Quantization
from shuteye.memory.arena import Arena
from shuteye.memory.backends import open_backend
from shuteye.memory.image import WeightImage
from shuteye.memory.image_store import ImageStore
from shuteye.models.image_builder import LoadedModel, bind, open_image
from shuteye.models.image_form import ImageForm
from shuteye.models.sources import ModelSource, resolve_source
from shuteye.models.tensors import arena_view
from shuteye.native import available
from shuteye.parallel.shards import ONE_RANK, RankPlace
from shuteye.tasks.generate.plans import Chunk, StepPlan
from shuteye.tasks.generate.runner import PackedBatch
from shuteye.testing import poison

BLOCK_SIZE = 16


@dataclass
class Sequence:
    """Tokens so far, how many of them are in the cache, and where."""

    token_ids: list[int]
    block_ids: list[int]
    computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    def chunk(self, num_tokens: int) -> Chunk:
        end = min(self.computed + num_tokens, len(self.token_ids))
        sample = end == len(self.token_ids)
        return Chunk("r", tuple(self.token_ids[self.computed : end]), self.computed, tuple(self.block_ids), sample)


class Driver:
    """A bound model and a poisoned KV cache; blocks are handed out scattered, never given back."""

    def __init__(
        self, image: WeightImage, *, num_blocks: int = 256, kv_cache_dtype: str = "auto", **binding: Any
    ) -> None:
        backend = open_backend("linux")
        self.image = image
        self.weights = Arena.reserve(backend, tag="weights", nbytes=image.layout.nbytes)
        self.weights.map_file(0, image.layout.nbytes, fd=image.fd)
        self.model: LoadedModel = bind(image, self.weights, **binding)
        facts = self.model.facts.attention
        held = cache_dtype(kv_cache_dtype, self.model.dtype)
        layout = KVLayout(facts.num_layers, BLOCK_SIZE, facts.num_kv_heads, facts.head_dim, held)
        nbytes = layout.bytes_per_block * num_blocks
        self.kv_arena = Arena.reserve(backend, tag="kv_cache", nbytes=nbytes)
        self.kv_arena.commit()
        poison(arena_view(self.kv_arena, 0, (nbytes,), "uint8"))
        self.kv_cache = KVCache(self.kv_arena, layout, num_blocks=num_blocks)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
        self._free = order.tolist()

    def sequence(self, token_ids: list[int], *, room: int, shared: list[int] | None = None) -> Sequence:
        """A new sequence with blocks for its tokens and `room` more, the first of which may be another's."""
        needed = -(-(len(token_ids) + room) // BLOCK_SIZE)
        blocks = list(shared or [])
        return Sequence(list(token_ids), blocks + [self._free.pop() for _ in range(needed - len(blocks))])

    def step(self, sequences: list[Sequence], chunk_sizes: list[int]) -> None:
        """One forward pass; a sequence whose last token was computed grows by its likeliest next one."""
        chunks = [each.chunk(size) for each, size in zip(sequences, chunk_sizes, strict=True)]
        batch = PackedBatch.from_plan(StepPlan(tuple(chunks)), block_size=BLOCK_SIZE)
        rows = iter(self.logits(batch))
        for sequence, chunk in zip(sequences, chunks, strict=True):
            sequence.computed += len(chunk.token_ids)
            if chunk.sample:
                logits = next(rows)
                sequence.logits.append(logits)
                sequence.token_ids.append(int(logits.argmax()))

    def logits(self, batch: PackedBatch) -> torch.Tensor:
        """One forward pass."""
        return torch.from_numpy(self.model.forward(batch, self.kv_cache))

    def generate(self, prompts: list[list[int]], num_tokens: int, *, chunk_size: int = 10_000) -> list[list[int]]:
        """Greedy continuations of all prompts in one batch, chunks and decodes of different sequences mixed."""
        sequences = [self.sequence(prompt, room=num_tokens) for prompt in prompts]
        wanted = [len(prompt) + num_tokens for prompt in prompts]
        while any(len(each.token_ids) < length for each, length in zip(sequences, wanted, strict=True)):
            active = [each for each, length in zip(sequences, wanted, strict=True) if len(each.token_ids) < length]
            self.step(active, [chunk_size] * len(active))
        return [each.token_ids[len(prompt) :] for each, prompt in zip(sequences, prompts, strict=True)]

    def close(self) -> None:
        self.weights.close()
        self.kv_arena.close()
        self.image.close()


@pytest.fixture(scope="session")
def image_store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """Images made in this session; converting the real model takes a while."""
    return ImageStore(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def load(image_store: ImageStore, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Load a checkpoint (directory or source) into arenas; closed when the test ends."""
    drivers: list[Driver] = []

    def load(
        checkpoint: Path | ModelSource,
        *,
        dtype: DType = "auto",
        place: RankPlace = ONE_RANK,
        quantization: Quantization = "auto",
        **options: Any,
    ) -> Driver:
        """Packed, as an engine would have it, unless transformers' modules or torch alone are to read it."""
        if isinstance(checkpoint, Path):
            checkpoint = resolve_source(str(checkpoint), cache_dir=tmp_path)
        packed = available() and options.get("native", True) and not options.get("modules")
        form = ImageForm(quantization, packed)
        image = open_image(checkpoint, dtype=dtype, store=image_store, place=place, form=form)
        drivers.append(Driver(image, **options))
        return drivers[-1]

    yield load
    for driver in drivers:
        driver.close()


@pytest.fixture
def load_ranks(load: Callable[..., Driver]) -> Iterator[Callable[..., Ranks]]:
    """Load a checkpoint onto several ranks, which are threads; each with torch's own would be more than cores."""

    def load_ranks(
        checkpoint: Path,
        layout: RankPlace,
        *,
        dtype: DType = "auto",
        native: bool = False,
        quantization: Quantization = "auto",
    ) -> Ranks:
        groups = thread_groups(layout)
        return Ranks(
            [
                load(
                    checkpoint,
                    dtype=dtype,
                    place=place,
                    num_blocks=16,
                    native=native,
                    groups=groups[place.rank],
                    quantization=quantization,
                )
                for place in layout.all()
            ],
            groups,
        )

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_ranks
    torch.set_num_threads(before)


def reference_model(checkpoint: Path | ModelSource, dtype: torch.dtype) -> Any:
    """The same checkpoint as transformers alone loads it."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from shuteye.models.modules import quiet

    extra: dict[str, Any] = {}
    path = checkpoint if isinstance(checkpoint, Path) else checkpoint.path
    if path.suffix == ".gguf":
        extra = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        path = path.parent
    with quiet():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **extra)


def reference_tokens(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """What `generate` says, greedily, ends ignored."""
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return found[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def reference() -> Any:
    """`reference.model(checkpoint, dtype)` and `reference.tokens(model, prompt, num_tokens)`."""

    class Reference:
        model = staticmethod(reference_model)
        tokens = staticmethod(reference_tokens)

    return Reference
