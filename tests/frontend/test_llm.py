"""The blocking engine: the contract's Python surface."""

import signal
import threading
import time

import pytest

import shuteye
from shuteye import LLM, SamplingParams
from shuteye.errors import EngineDead, InvalidRequest, ModelSleeping, PromptTooLong, SleepModeDisabled

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def options(tiny_checkpoint, core_cache):
    return {
        "model": str(tiny_checkpoint),
        "dtype": "float32",
        "kv_cache_memory": 1 << 20,
        "max_model_len": 256,
        "num_threads": 1,
        "cache_dir": core_cache,
    }


@pytest.fixture(scope="module")
def llm(options):
    with LLM(**options, enable_sleep_mode=True) as engine:
        yield engine


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = ["one", [5, 6, 7], "three, which is longer than the others", "four"]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == ["one", None, prompts[2], "four"]
    assert outputs[1].prompt_token_ids == (5, 6, 7)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.finished
        assert output.outputs[0].finish_reason == "length"
        assert llm.generate([prompt], GREEDY)[0].outputs == output.outputs
        assert output.outputs[0].text == llm.get_tokenizer().decode(output.outputs[0].token_ids)


def test_params_may_differ_per_prompt(llm):
    lengths = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 2, 3)]
    outputs = llm.generate(["a", "b", "c"], lengths)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3]
    with pytest.raises(InvalidRequest):
        llm.generate(["a"], lengths)


def test_chat_uses_a_template_that_is_given(options):
    """The checkpoint's template, though another one was asked for."""
    with LLM(**options, chat_template="{{ messages[0].content }}!") as engine:
        tokens = engine.chat([{"role": "user", "content": "Hello"}], GREEDY)[0].prompt_token_ids
        assert engine.get_tokenizer().decode(tokens) == "Hello!"


def test_a_template_that_is_none_is_named(options):
    """An engine that loads, and cannot answer a single conversation."""
    with pytest.raises(InvalidRequest, match="chat_template is not a Jinja template"):
        LLM(**options, chat_template="{% for %}")


def test_chat_uses_the_template(llm):
    messages = [{"role": "user", "content": "Hello"}]
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
    assert llm.chat(messages, GREEDY)[0].prompt_token_ids == tuple(ids)
    assert len(llm.chat([messages, messages], GREEDY)) == 2


@pytest.mark.parametrize("prompts", [{"prompt": "x"}, [{"prompt": "x"}], [1, 2], None, b"x", iter("ab")])
def test_what_is_no_prompt_is_refused(llm, prompts):
    """Would catch the keys of a dict completed as if they were texts, or a TypeError from somewhere inside."""
    with pytest.raises(InvalidRequest, match="list of"):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize("params", [{"temperature": 0}, [{"temperature": 0}], "greedy", ["greedy"], 5, {}, [None]])
def test_what_are_no_sampling_params_is_refused(llm, params):
    """Would catch the keys of a dict taken for the parameters of one prompt each, and an AttributeError from inside."""
    with pytest.raises(InvalidRequest, match="sampling_params must be a SamplingParams, got") as caught:
        llm.generate("hello", params)
    assert caught.value.param == "sampling_params"


def test_n_completions_share_their_prompt(llm):
    output = llm.generate("hello", SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=6, ignore_eos=True))[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({completion.token_ids for completion in output.outputs}) > 1


def test_sleep_and_wake_from_another_thread_while_generating(llm):
    """Would catch sleep calls that wait for a long generation to end by itself."""
    long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    expected = llm.generate("hello", long)[0].outputs
    results = []
    thread = threading.Thread(target=lambda: results.append(llm.generate("hello", long)[0].outputs))
    thread.start()
    while llm.stats.num_running == 0 and thread.is_alive():
        time.sleep(0.001)
    report = llm.sleep(1, mode="keep")
    assert llm.is_sleeping
    assert report.changed
    llm.wake_up()
    thread.join()
    assert results == [expected]


def test_asleep_it_refuses(llm):
    llm.sleep(level=2)
    with pytest.raises(ModelSleeping, match="POST request to /wake_up"):
        llm.generate("hello", GREEDY)
    llm.wake_up(tags=["weights"])
    llm.reload_weights()
    assert llm.is_sleeping
    llm.wake_up(tags=["kv_cache"])
    assert not llm.is_sleeping
    llm.generate("hello", GREEDY)


def test_one_refused_prompt_leaves_nothing_behind(llm):
    with pytest.raises(PromptTooLong):
        llm.generate(["fine", list(range(1, 257))], GREEDY)
    assert llm.generate("fine", GREEDY)[0].finished


def test_logprobs_have_vllm_s_shape(llm):
    completion = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=3, logprobs=2))[0].outputs[0]
    assert len(completion.logprobs) == len(completion.token_ids)
    for token_id, alternatives in zip(completion.token_ids, completion.logprobs, strict=True):
        assert alternatives[token_id].rank == 1
        assert alternatives[token_id].logprob == max(entry.logprob for entry in alternatives.values())
        assert alternatives[token_id].decoded_token is not None


def test_tags_are_a_list(llm):
    with pytest.raises(InvalidRequest, match="list"):
        llm.sleep(tags="weights")


def test_collective_rpc(llm):
    assert llm.collective_rpc("missing") == [()]


def test_sleep_mode_is_asked_for(options):
    with LLM(**options) as llm:
        for call in (llm.sleep, llm.wake_up):
            with pytest.raises(SleepModeDisabled):
                call()
        assert not llm.is_sleeping
    with pytest.raises(EngineDead):
        llm.generate("hello", GREEDY)


def test_unknown_options_are_refused(options):
    with pytest.raises(InvalidRequest, match="gpu_memory"):
        LLM(**options, gpu_memory_utilization=0.9)


def test_public_names_are_there():
    assert all(getattr(shuteye, name) is not None for name in shuteye.__all__)


def test_closing_while_a_sleep_drains_tells_the_one_who_waits(options):
    """Would catch a caller left waiting, or an engine thread that ends in an error of its own."""
    outcome = []
    llm = LLM(**options, enable_sleep_mode=True)
    long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)

    def tell(call):
        try:
            outcome.append(call())
        except EngineDead as error:
            outcome.append(error)

    calls = (lambda: llm.generate("hello", long), lambda: llm.sleep(1, mode="wait"))
    threads = [threading.Thread(target=tell, args=(call,)) for call in calls]
    threads[0].start()
    while llm.stats.num_running == 0:
        time.sleep(0.001)
    threads[1].start()
    while llm.state.gate == "open":
        pass
    llm.close()
    for thread in threads:
        thread.join(timeout=10)
    assert [type(item) for item in outcome] == [EngineDead, EngineDead]


def test_an_unknown_verb_is_refused_and_the_engine_lives(llm):
    """Would catch a typo that ends the engine's thread."""
    for verb in ("no_such", "release", "canary_agrees"):
        with pytest.raises(InvalidRequest, match="residual_bytes"):
            llm.collective_rpc(verb)
    assert llm.generate("hello", GREEDY)[0].finished


def test_ctrl_c_ends_what_was_generated_for_it(llm):
    """Would catch a generate() that cannot be interrupted, or whose requests go on for nobody."""
    long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    llm.pause("keep")
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello", "there"], long)
    llm.resume()
    assert llm.generate("hello", GREEDY)[0].finished
    assert (llm.stats.num_running, llm.stats.num_waiting) == (0, 0)
