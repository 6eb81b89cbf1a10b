"""Real servers of the tiny checkpoint, one per policy, shared by all tests; and what their answers should be."""

import pytest
import torch
from shuteye_server import Served, stop_all

from shuteye import EngineConfig
from shuteye.models.converter import Order, obtain_image
from shuteye.models.progress import no_progress
from shuteye.parallel.shards import ONE_RANK
from shuteye.tokenizer import Tokenizer

POLICIES = ("reject", "hold", "wake")
KEYS = ("sk-inference", "sk-admin")


@pytest.fixture(scope="session")
def image_cache(tiny_checkpoint, tmp_path_factory):
    """One cache for all servers, with their image: otherwise each would import what converts, which takes seconds."""
    cache = tmp_path_factory.mktemp("cache")
    config = EngineConfig(str(tiny_checkpoint), cache_dir=cache, kernels="torch")
    obtain_image(Order.of(config, ONE_RANK, model=config.model), no_progress).close()
    return cache


@pytest.fixture(scope="session")
def launch(tiny_checkpoint, image_cache):
    """Starts a server of the tiny checkpoint; `wait_until_ready` and `stop` are the caller's."""

    def start(*flags, **more):
        # Without native kernels a tiny model takes long enough that something can happen to it in between.
        common = ("--enable-sleep-mode", "--num-threads", "1", "--kernels", "torch")
        return Served(tiny_checkpoint, *common, *flags, cache_dir=image_cache, **more)

    return start


@pytest.fixture(scope="session")
def servers(launch):
    """One server per policy, started together. The holding one has keys, the others are in development mode."""
    started = {
        "reject": launch("--dev-mode"),
        "hold": launch(policy="hold", keys=KEYS),
        "wake": launch(policy="wake", VLLM_SERVER_DEV_MODE="1"),
    }
    try:
        yield {policy: server.wait_until_ready() for policy, server in started.items()}
    finally:
        stop_all(list(started.values()))


@pytest.fixture(params=POLICIES)
def any_server(request, servers):
    """Each of the servers."""
    yield servers[request.param]
    servers[request.param].restore()


@pytest.fixture
def server(servers):
    """The server that rejects requests while asleep."""
    yield servers["reject"]
    servers["reject"].restore()


@pytest.fixture
def holding(servers):
    """The server that holds requests while asleep, and whose routes need keys."""
    yield servers["hold"]
    servers["hold"].restore()


@pytest.fixture
def waking(servers):
    """The server that wakes for requests."""
    yield servers["wake"]
    servers["wake"].restore()


@pytest.fixture(scope="session")
def right(tiny_checkpoint):
    """The right answer: `right(prompt, n)` is what transformers' own `generate` says, greedily, in text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_directory(tiny_checkpoint)
    known = {}

    def answer(prompt, max_tokens=16):
        if (prompt, max_tokens) not in known:
            ids = torch.tensor([tokenizer.encode(prompt)])
            with torch.inference_mode():
                whole = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=max_tokens,
                    eos_token_id=None,
                    pad_token_id=2,
                )
            known[prompt, max_tokens] = tokenizer.decode(whole[0, ids.shape[1] :].tolist())
        return known[prompt, max_tokens]

    return answer
