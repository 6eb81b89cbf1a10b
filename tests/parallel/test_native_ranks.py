"""Tiny models over ranks that are processes, with native kernels: one rank's tokens, the same bits, no lost wait."""

import signal
import time
from contextlib import closing

import pytest
import torch
from rank_processes import Ranks
from tiny_gguf import write_gguf

from shuteye import native
from shuteye.cache.kv_cache import KVCache
from shuteye.cache.kv_layout import KVLayout
from shuteye.memory.arena import Arena
from shuteye.memory.backends import open_backend
from shuteye.memory.image import WeightImage
from shuteye.memory.image_store import ImageStore
from shuteye.models.decoder import bind
from shuteye.models.image_builder import open_image
from shuteye.models.image_form import ImageForm
from shuteye.models.rank_groups import RankGroups
from shuteye.models.sources import resolve_source
from shuteye.models.tensors import arena_view
from shuteye.parallel.group import ShmGroup, ShmRegion
from shuteye.parallel.shards import RankPlace
from shuteye.tasks.canary import TOLERANCE_ULPS, fixed_tokens
from shuteye.tasks.generate.plans import Chunk, StepPlan
from shuteye.tasks.generate.runner import PackedBatch
from shuteye.testing import poison, tiny_model

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

BLOCK_SIZE, NUM_BLOCKS = 16, 64
PROMPTS = ([*range(7, 47)], [5, 300, 9], [*range(20, 170)])
TABLES = ((3, 1, 5, 4), (2, 6), tuple(range(10, 30)))
LAYOUTS = {"TP 2": (2, 1), "PP 2": (1, 2), "TP 2 × PP 2": (2, 2)}
NUM_TOKENS = 8


class Model:
    """An image in an arena of this process, with a poisoned KV cache."""

    def __init__(self, image: WeightImage, groups: RankGroups | None, *, kernels: bool = True) -> None:
        backend = open_backend("linux")
        self.weights = Arena.reserve(backend, tag="weights", nbytes=image.layout.nbytes)
        self.weights.map_file(0, image.layout.nbytes, fd=image.fd)
        self.bound = bind(image, self.weights, native=kernels, groups=groups)
        assert (self.bound.decoder.native_tokens > 0) == kernels
        cached = self.bound.facts.attention
        layout = KVLayout(cached.num_layers, BLOCK_SIZE, cached.num_kv_heads, cached.head_dim, self.bound.dtype)
        nbytes = layout.bytes_per_block * NUM_BLOCKS
        self.kv_arena = Arena.reserve(backend, tag="kv_cache", nbytes=nbytes)
        self.kv_arena.commit()
        poison(arena_view(self.kv_arena, 0, (nbytes,), "uint8"))
        self.kv_cache = KVCache(self.kv_arena, layout, num_blocks=NUM_BLOCKS)

    def forward(self, *chunks: Chunk) -> torch.Tensor:
        batch = PackedBatch.from_plan(StepPlan(chunks), block_size=BLOCK_SIZE)
        return torch.from_numpy(self.bound.forward(batch, self.kv_cache))

    def close(self) -> None:
        self.weights.close()
        self.kv_arena.close()


def steps_of(answers: list[list[int]]) -> list[tuple[Chunk, ...]]:
    """The first prompt in two chunks, then all, then each answer token by token, as if it had been said."""
    ids = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    steps = [(Chunk("0", tuple(ids[0][:21]), 0, TABLES[0], False),)]
    begins, ends = [21, 0, 0], [len(prompt) for prompt in PROMPTS]
    for _ in answers[0]:
        spans = zip(ids, begins, ends, TABLES, strict=True)
        steps.append(tuple(Chunk(str(n), tuple(one[a:b]), a, t, True) for n, (one, a, b, t) in enumerate(spans)))
        begins, ends = ends, [end + 1 for end in ends]
    return steps


def greedy(model: Model) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in PROMPTS]
    model.forward(*steps_of([[0] for _ in PROMPTS])[0])
    for count in range(1, NUM_TOKENS + 1):
        logits = model.forward(*steps_of([[*answer, 0][:count] for answer in answers])[-1])
        for answer, row in zip(answers, logits, strict=True):
            answer.append(int(row.argmax()))
    return answers


# --- in the ranks ---------------------------------------------------------------------------------


def join(world, layout, paths):
    """This rank's groups: paths of a region per stage, then of one per tensor rank; "" where nobody else is."""
    place = RankPlace(world.rank, *layout)
    stages, lines = paths
    tensor, pipeline = stages[place.pp_rank], lines[place.tp_rank]
    native.set_num_threads(1)
    return RankGroups(
        ShmGroup(tensor, place.tp_rank, place.tp_size, epoch=1, timeout_s=20) if tensor else None,
        ShmGroup(pipeline, place.pp_rank, place.pp_size, epoch=1, timeout_s=20) if pipeline else None,
    )


def compute(world, layout, paths, images, answers):
    """What this rank computed, step by step."""
    groups = join(world, layout, paths)
    with closing(WeightImage.open(images[world.rank])) as image:
        model = Model(image, groups)
        found = [model.forward(*step).clone() for step in steps_of(answers)]
        model.close()
    return [one.numpy() for one in found]


def canary_numbers(world, layout, paths, images):
    """This rank's numbers of the canary's pass."""
    groups = join(world, layout, paths)
    with closing(WeightImage.open(images[world.rank])) as image:
        model = Model(image, groups)
        found = model.forward(canary_chunk(model)).clone()
        model.close()
    return found.float().numpy()


def canary_chunk(model: Model) -> Chunk:
    return Chunk("canary", fixed_tokens(model.bound.facts.vocab_size), 0, (1,), True)


def compute_until_aborted(world, layout, paths, images):
    """One step again and again: how long the last one took to end, how many there were, and what ended them."""
    groups = join(world, layout, paths)
    image = WeightImage.open(images[world.rank])
    model = Model(image, groups)
    step = steps_of([[0] for _ in PROMPTS])[1]
    chunks = tuple(Chunk(one.request_id, one.token_ids, 0, one.block_ids, True) for one in step[1:])
    expected, count = model.forward(*chunks).clone(), 1
    world.barrier()
    while True:
        begun = time.monotonic()
        try:
            found = model.forward(*chunks)
        except Exception as error:  # noqa: BLE001  (the test says which it should be)
            return type(error).__name__, str(error), time.monotonic() - begun, count
        assert torch.equal(found, expected)
        count += 1


# --- the tests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "qwen2-untied"])
def checkpoint(request, tmp_path_factory):
    """Nine query heads on three KV heads, which two ranks share unevenly."""
    architecture, _, untied = request.param.partition("-")
    sizes = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 321}
    directory = tmp_path_factory.mktemp("native-ranks") / "model"
    return tiny_model(directory, architecture=architecture, num_layers=3, tie_word_embeddings=not untied, **sizes)


@pytest.fixture(scope="module")
def images_of(tmp_path_factory):
    """Paths of the images of all ranks, as engines make them."""
    cache_dir = tmp_path_factory.mktemp("native-images")
    store = ImageStore(cache_dir)

    def paths(checkpoint, layout, dtype, quantization="auto"):
        source, found = resolve_source(str(checkpoint), cache_dir=cache_dir), []
        form = ImageForm(quantization, packed=True)
        for place in RankPlace(0, *layout).all():
            with closing(open_image(source, dtype=dtype, store=store, place=place, form=form)) as image:
                found.append(image.path)
        return found

    return paths


@pytest.fixture
def start():
    """Start ranks whose groups are there until the test ends."""
    regions, started = [], []

    def path_of(size):
        if size == 1:
            return ""
        regions.append(ShmRegion(size, epoch=1))
        return regions[-1].path

    def start(body, layout, *arguments, **options):
        paths = [path_of(layout[0]) for _ in range(layout[1])], [path_of(layout[1]) for _ in range(layout[0])]
        started.append(Ranks("shm", layout[0] * layout[1], body, layout, paths, *arguments, **options))
        return started[-1], regions

    yield start
    for ranks in started:
        ranks.__exit__()
    for region in regions:
        region.close()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_greedy_tokens_are_those_of_one_rank(checkpoint, layout, images_of, start):
    with closing(WeightImage.open(images_of(checkpoint, (1, 1), "float32")[0])) as image:
        alone = Model(image, None, kernels=False)
        answers = greedy(alone)
        alone.close()
    ranks, _ = start(compute, layout, images_of(checkpoint, layout, "float32"), answers)
    results = ranks.results()
    logits = results[layout[0] * (layout[1] - 1)][1:]  # of tensor rank 0 in the last stage
    said = [[int(row.argmax()) for row in step] for step in logits]
    assert [list(answer) for answer in zip(*said, strict=True)] == answers


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_quantized_logits_are_those_of_one_rank(tmp_path, layout, images_of, start):
    """Would catch blocks of another rank's columns, a part of a tied head that begins within a panel."""
    sizes = {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32, "vocab_size": 321}
    made = tiny_model(tmp_path / "made", num_layers=3, initializer_range=0.05, **sizes)
    checkpoint = tmp_path / "tiny.gguf"
    write_gguf(checkpoint, made, lambda name: "q8_0" if "embed" in name else "q4_0")
    answers = [[5], [6], [7]]
    with closing(WeightImage.open(images_of(checkpoint, (1, 1), "float32")[0])) as image:
        alone = Model(image, None)
        expected = [alone.forward(*step) for step in steps_of(answers)][-1]
        alone.close()
    ranks, _ = start(compute, layout, images_of(checkpoint, layout, "float32"), answers)
    found = torch.from_numpy(ranks.results()[layout[0] * (layout[1] - 1)][-1])
    assert (found - expected).norm() <= 0.02 * expected.norm()  # a few activations may be rounded the other way


def test_hidden_states_are_bit_identical_across_tensor_ranks(checkpoint, images_of, start):
    """In bfloat16: a rank that rounds or adds in another order would part from the others."""
    layout = (2, 2)
    ranks, _ = start(compute, layout, images_of(checkpoint, layout, "bfloat16"), [[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    first, second, *_ = ranks.results()
    assert len(first) == len(second) == 4
    for left, right in zip(first, second, strict=True):
        assert left.tobytes() == right.tobytes()


def check_bfloat16_canary(images, alone, layout, start, *, kernels):
    with closing(WeightImage.open(alone)) as image:
        model = Model(image, None, kernels=kernels)
        expected = model.forward(canary_chunk(model)).float().clone()
        model.close()
    ranks, _ = start(canary_numbers, layout, images)
    found = torch.from_numpy(ranks.results()[layout[0] * (layout[1] - 1)])
    limit = TOLERANCE_ULPS * torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= limit


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bfloat16_logits_are_within_the_canarys_tolerance_of_one_ranks(checkpoint, layout, images_of, start):
    """Would catch sums that are rounded more often than they need be."""
    images = images_of(checkpoint, layout, "bfloat16")
    check_bfloat16_canary(images, images_of(checkpoint, (1, 1), "bfloat16")[0], layout, start, kernels=False)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_smollm2s_bfloat16_logits_are_within_the_canarys_tolerance(smollm2, layout, images_of, start):
    images = images_of(smollm2.name, layout, "bfloat16", "none")
    check_bfloat16_canary(images, images_of(smollm2.name, (1, 1), "bfloat16", "none")[0], layout, start, kernels=False)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("layout", (LAYOUTS | {"TP 3": (3, 1), "PP 3": (1, 3)}).values())
def test_smollm2s_tokens_are_those_of_transformers(smollm2, smollm2_reference, layout, images_of, start):
    """Nine query heads on three KV heads, with native kernels."""
    model = smollm2_reference(torch.float32)
    answers = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            said = model.generate(ids, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False)
            answers.append(said[0, len(prompt) :].tolist())
    ranks, _ = start(compute, layout, images_of(smollm2.name, layout, "float32", "none"), answers)
    logits = ranks.results()[layout[0] * (layout[1] - 1)][1:]
    said = [[int(row.argmax()) for row in step] for step in logits]
    assert [list(answer) for answer in zip(*said, strict=True)] == answers


@pytest.mark.parametrize("checkpoint", ["llama"], indirect=True)
@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["TP 2", "PP 2"])
@pytest.mark.parametrize("how", ["aborted", "killed"])
def test_ranks_that_compute_are_ended_by_an_abort(checkpoint, layout, how, images_of, start):
    """In the midst of steps: at once, with the reason, and with no wrong result before it."""
    ranks, regions = start(compute_until_aborted, layout, images_of(checkpoint, layout, "float32"))
    time.sleep(0.3)
    if how == "killed":
        ranks.signal(1, signal.SIGKILL)
        time.sleep(0.2)
    for region in regions:
        region.abort("the test says so")
    for kind, message, seconds, count in ranks.results([0] if how == "killed" else None):
        assert kind == "GroupAborted"
        assert "the test says so" in message
        assert seconds < 2
        assert count > 1
