"""The real model, asleep and awake a hundred times: the same tokens, the same addresses, no memory lost."""

import os
import random
import re
import statistics

import pytest

from shuteye import LLM, SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

CYCLES = 100
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
HELD = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The capital of France is", "Once upon a time, in a harbour town,", "def add(a, b):"]


def smaps_rss(address, nbytes):
    """Rss in bytes of the mappings inside [address, address + nbytes), from /proc/self/smaps."""
    total, inside = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                low, high = (int(part, 16) for part in header.groups())
                inside = low < address + nbytes and high > address
                assert not inside or (low >= address and high <= address + nbytes), "a mapping reaches out of its arena"
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def process_rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def llm(smollm2_options):
    with LLM(
        **smollm2_options, dtype="bfloat16", enable_sleep_mode=True, max_model_len=1024, kv_cache_memory=64 << 20
    ) as engine:
        yield engine


def worker_of(llm):
    """The rank itself: tests look behind the engine's back, at what the kernel says of its memory."""
    import gc

    from shuteye.runner.worker import Worker

    return next(thing for thing in gc.get_objects() if isinstance(thing, Worker) and thing._config == llm.config)


def arenas(llm):
    residency = worker_of(llm)._residency
    return residency._weights_arena, residency._kv_arena


def test_asleep_the_kernel_agrees_that_the_memory_is_gone(llm):
    """Would catch a report of bytes that never came back."""
    llm.generate([[7] * 600, [9] * 600, *PROMPTS], GREEDY)  # touch much of the KV cache
    weights, kv = arenas(llm)
    before = smaps_rss(weights.address, weights.nbytes) + smaps_rss(kv.address, kv.nbytes)
    assert before > weights.nbytes + 0.5 * kv.nbytes
    report = llm.sleep(1)
    after = smaps_rss(weights.address, weights.nbytes) + smaps_rss(kv.address, kv.nbytes)
    assert before - after >= 0.98 * (weights.nbytes + before - weights.nbytes)
    assert after == 0
    assert report.freed_bytes == before - after
    assert abs(report.residual_bytes - process_rss()) < 4 << 20
    llm.wake_up()


def test_a_hundred_cycles(llm):
    """Would catch a leak per cycle, a moved tensor, a wrong token after a wake, or a held request that is lost."""
    chooser = random.Random(0)
    module = worker_of(llm)._model.module
    addresses = [tensor.data_ptr() for tensor in module.state_dict().values()]
    expected = [output.outputs for output in llm.generate(PROMPTS, GREEDY)]
    resident = []
    for cycle in range(CYCLES):
        match cycle % 5:
            case 0 | 1:
                llm.sleep(1, mode=chooser.choice(["abort", "wait", "keep"]))
                llm.wake_up()
            case 2:
                llm.sleep(2)
                llm.wake_up()
            case 3:
                llm.sleep(1)
                for tag in chooser.sample(["weights", "kv_cache"], 2):
                    llm.wake_up(tags=[tag])
            case 4:
                llm.sleep(2)
                llm.wake_up(tags=["weights"])
                llm.reload_weights()
                llm.wake_up(tags=["kv_cache"])
        which = cycle % len(PROMPTS)
        assert llm.generate(PROMPTS[which], GREEDY)[0].outputs == expected[which], cycle
        resident.append(process_rss())
    assert [output.outputs for output in llm.generate(PROMPTS, GREEDY)] == expected
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == addresses
    early, late = statistics.median(resident[10:30]), statistics.median(resident[-20:])
    assert late - early < 4 << 20, f"{(late - early) / CYCLES:.0f} bytes are lost per cycle"


def test_requests_in_flight_survive_cycles(llm):
    """Would catch a held request that resumes on memory it did not recompute."""
    import threading

    expected = llm.generate(PROMPTS, HELD)
    for _ in range(10):
        results = []
        thread = threading.Thread(target=lambda into=results: into.extend(llm.generate(PROMPTS, HELD)))
        thread.start()
        llm.sleep(1, mode="keep")
        llm.wake_up()
        thread.join()
        assert [output.outputs for output in results] == [output.outputs for output in expected]
