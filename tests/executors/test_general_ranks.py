"""A model that transformers' modules compute, over several rank processes: asleep, awake, and with other weights."""

from __future__ import annotations

import pytest
import torch
from rank_models import NINE_ON_THREE

from shuteye.calls import ReloadCall, SleepCall, UpdateCall, WakeCall
from shuteye.errors import InvalidRequest
from shuteye.models.modules import quiet
from shuteye.testing import tiny_model

PROMPT = (5, 300, 9, 11, 60, 7, 8)
NUM_TOKENS = 12
CHECKPOINTS = {
    "starcoder2": {"sliding_window": 6},  # tied
    "gemma3_text": {
        **{"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "tie_word_embeddings": False,  # tied, it says its last token again and again, whatever its layers compute
    },
}
CASES = [
    pytest.param("starcoder2", "TP 2", marks=pytest.mark.slow, id="tied TP 2"),
    *(pytest.param("gemma3_text", layout, marks=pytest.mark.slow, id=layout) for layout in ("PP 2", "TP 2 x PP 2")),
]


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("general") / "model"
    return tiny_model(directory, architecture=request.param, **NINE_ON_THREE, **CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def reference(checkpoint):
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def greedy(model):
    """What transformers says."""
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
    return found[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(("checkpoint", "layout"), CASES, indirect=["checkpoint"])
def test_ranks_say_what_transformers_says_asleep_and_awake_and_with_other_weights(
    layout, open_ranks, checkpoint, reference
):
    """Would catch a part of a module that is no view of the arena, and an update that goes to the wrong rows."""
    ranks = open_ranks(layout, model=str(checkpoint))
    expected = greedy(reference)
    assert len(set(expected)) > 3
    assert ranks.generate(PROMPT) == expected
    for level in (1, 2):
        assert ranks.call(SleepCall(level)).freed_bytes > 0
        assert ranks.call(WakeCall()).canary
        assert ranks.generate(PROMPT) == expected

    kept = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    tied = {"lm_head.weight"} if reference.config.tie_word_embeddings else set()
    others = {name: tensor.neg() for name, tensor in kept.items() if name not in tied}
    for wrong in ({"nobody.knows": torch.ones(3)}, {"model.layers.2.mlp.up_proj.weight": torch.ones(3, 72)}):
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            ranks.call(UpdateCall((others | wrong).items()))
        assert ranks.generate(PROMPT) == expected

    ranks.call(SleepCall(2))
    assert ranks.call(WakeCall(tags=["weights"])).missing
    assert ranks.call(UpdateCall(others.items())).missing == ()
    ranks.call(WakeCall())
    reference.load_state_dict(others, strict=not tied)
    updated = greedy(reference)
    reference.load_state_dict(kept)
    assert ranks.generate(PROMPT) == updated != expected
    ranks.call(ReloadCall())
    assert ranks.generate(PROMPT) == expected
    ranks.executor.close()
