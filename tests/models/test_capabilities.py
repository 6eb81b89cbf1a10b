"""Models that would be served wrongly are refused, with the cause."""

import pytest
from transformers import AutoConfig

from shuteye.errors import UnsupportedModel
from shuteye.models.modules import task_of
from shuteye.models.support import check

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_of(model_type, **settings):
    return AutoConfig.for_model(model_type, **SMALL | settings)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        pytest.param(lambda: config_of("gpt_oss", num_local_experts=2), "attention sinks", id="sinks"),
        pytest.param(lambda: config_of("gemma2"), "softcapping", id="softcap"),
        pytest.param(lambda: AutoConfig.for_model("t5"), "encoder-decoder", id="encoder-decoder"),
        pytest.param(lambda: AutoConfig.for_model("mamba"), "recurrent state", id="mamba"),
        pytest.param(lambda: AutoConfig.for_model("jamba"), "recurrent state", id="hybrid"),
        pytest.param(lambda: AutoConfig.for_model("bloom"), "AttentionInterface", id="alibi"),
        pytest.param(lambda: AutoConfig.for_model("llava"), "multimodal", id="multimodal"),
        pytest.param(lambda: config_of("roberta", is_decoder=True), "padding token", id="padded-positions"),
        pytest.param(lambda: config_of("bert"), "causal", id="bidirectional"),
        pytest.param(
            lambda: config_of("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "longest sequence",
            id="dynamic-rope",
        ),
        pytest.param(
            lambda: config_of("gemma3n_text", num_kv_shared_layers=1, hidden_size_per_layer_input=8), "cache", id="kv"
        ),
        pytest.param(
            lambda: config_of("llama", architectures=["LlamaForSequenceClassification"]), "'classify'", id="other-task"
        ),
    ],
)
def test_refused_with_the_cause(config, cause):
    with pytest.raises(UnsupportedModel, match=cause):
        check(config())


def test_multi_head_latent_attention_is_refused():
    with pytest.raises(UnsupportedModel, match=r"latent|does not attend to the keys"):
        check(AutoConfig.for_model("deepseek_v3", num_hidden_layers=2))


def test_a_cache_that_holds_convolution_states_is_refused():
    config = config_of("lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(UnsupportedModel, match="state other than keys and values"):
        check(config)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (lambda: config_of("llama"), (None, None)),
        (lambda: config_of("qwen2"), (None, None)),
        (lambda: config_of("mistral", sliding_window=5000), (5000, 5000)),
        (lambda: config_of("mistral", sliding_window=None), (None, None)),
        (
            lambda: config_of("gemma3_text", sliding_window=100, layer_types=["sliding_attention", "full_attention"]),
            (100, None),
        ),
    ],
)
def test_windows_are_found_by_asking_the_models_masks(config, windows):
    facts = check(config())
    assert facts.windows == windows
    assert (facts.num_layers, facts.num_kv_heads, facts.head_dim) == (2, 2, 8)


def test_check_leaves_the_config_alone():
    """The choice of attention lives on the config; a probe's must not leak into what is loaded next."""
    config = config_of("llama")
    before = (config.to_dict(), config._attn_implementation)
    check(config)
    assert (config.to_dict(), config._attn_implementation) == before


def test_task_defaults_to_generate_when_the_config_names_no_architecture():
    assert task_of(config_of("llama", architectures=None)) == "generate"
