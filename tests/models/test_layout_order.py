"""Projections that could be one matrix lie next to each other, in the image and in memory."""

from shuteye.models.fused import group_of, layout_order


def test_weights_come_together_and_biases_come_together():
    names = [f"model.layers.0.self_attn.{p}_proj.{k}" for p in "qkvo" for k in ("weight", "bias")]
    ordered = [name.removeprefix("model.layers.0.self_attn.") for name in layout_order(names)]
    assert ordered == [
        *("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        *("q_proj.bias", "k_proj.bias", "v_proj.bias"),
        *("o_proj.weight", "o_proj.bias"),
    ]


def test_projections_are_gathered_whatever_lies_between_them():
    names = ["a.q_proj.weight", "a.q_norm.weight", "a.v_proj.weight", "a.k_proj.weight", "b.q_proj.weight"]
    assert layout_order(names) == [
        *("a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight"),
        *("a.q_norm.weight", "b.q_proj.weight"),
    ]


def test_layout_order_loses_and_invents_nothing():
    names = ["z.weight", "l.up_proj.weight", "l.gate_proj.weight", "a.bias"]
    assert sorted(layout_order(names)) == sorted(names)


def test_groups_are_layers():
    assert group_of("model.layers.12.mlp.up_proj.weight") == "model.layers.12"
    assert group_of("transformer.h.3.attn.c_attn.bias") == "transformer.h.3"
    assert group_of("model.embed_tokens.weight") == "model.embed_tokens"
