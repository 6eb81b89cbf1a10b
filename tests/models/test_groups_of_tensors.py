"""What an image brings in together."""

from shuteye.models.fused import group_of


def test_groups_are_layers():
    """Would catch an extent that holds parts of two layers, or a layer's tensors spread over several."""
    assert group_of("model.layers.12.mlp.up_proj.weight") == "model.layers.12"
    assert group_of("transformer.h.3.attn.c_attn.bias") == "transformer.h.3"
    assert group_of("model.embed_tokens.weight") == "model.embed_tokens"
