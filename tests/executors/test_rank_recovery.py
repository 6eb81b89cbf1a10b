"""A rank in the place of one that has died: it serves what the others do, whatever the checkpoint is by now."""

import shutil

import pytest

from shuteye.calls import ReloadCall, SleepCall, UpdateCall, WakeCall
from shuteye.errors import EngineFaulted
from shuteye.testing import tiny_model

PROMPT = (5, 300, 9, 11, 60)


@pytest.fixture
def checkpoints(tmp_path):
    """Two of the same sizes, in directories that may be changed."""
    return [tiny_model(tmp_path / name, seed=seed) for name, seed in (("first", 3), ("second", 4))]


@pytest.fixture
def ranks(open_ranks, checkpoints, tmp_path):
    ranks = open_ranks("TP 2", model=str(checkpoints[0]), cache_dir=tmp_path / "cache")
    yield ranks
    ranks.executor.close()


def lose(ranks, rank):
    ranks.kill(rank)
    ranks.wait_for_fault()


@pytest.mark.slow
@pytest.mark.parametrize("gone", [pytest.param(False, marks=pytest.mark.slow), True])
def test_after_a_reload_from_elsewhere_a_new_rank_serves_that(ranks, checkpoints, gone):
    """Would catch a recovery that can never succeed, and one of the first checkpoint's weights on one rank."""
    ranks.call(ReloadCall(str(checkpoints[1])))
    expected = ranks.generate(PROMPT)
    if gone:
        shutil.rmtree(checkpoints[1])
    for rank in (1, 0):
        lose(ranks, rank)
        assert not ranks.call(WakeCall()).updates_lost
        assert ranks.generate(PROMPT) == expected
    ranks.call(SleepCall(2))
    ranks.call(WakeCall())
    assert ranks.generate(PROMPT) == expected


@pytest.mark.parametrize("what", [pytest.param("moved away", marks=pytest.mark.slow), "overwritten"])
def test_a_recovery_needs_no_checkpoint(ranks, checkpoints, what):
    """Would catch a new rank that loads what a trainer has saved meanwhile, or cannot start without it."""
    expected = ranks.generate(PROMPT)
    shutil.rmtree(checkpoints[0])
    if what == "overwritten":
        shutil.copytree(checkpoints[1], checkpoints[0])
    lose(ranks, 1)
    ranks.call(WakeCall())
    assert ranks.generate(PROMPT) == expected


@pytest.mark.slow
def test_an_image_that_is_gone_is_made_again(ranks, tmp_path):
    """Would catch a rank that insists on an image that somebody has removed after the rank died."""
    expected = ranks.generate(PROMPT)
    lose(ranks, 1)
    key = ranks.executor._image_keys[1]
    shutil.rmtree(tmp_path / "cache" / "images" / key)
    ranks.call(WakeCall())
    assert ranks.generate(PROMPT) == expected


def test_half_an_update_that_is_lost_is_said_to_be(ranks):
    """Would catch a trainer that writes its second half over the image's first."""
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(ranks.core.config.model).state_dict()
    tensors = [(name, tensor) for name, tensor in state.items() if "lm_head" not in name]
    ranks.call(SleepCall(2))
    ranks.call(WakeCall(tags=["weights"]))
    ranks.call(UpdateCall(tensors[: len(tensors) // 2]))
    assert ranks.core.state.missing
    lose(ranks, 1)
    assert ranks.call(WakeCall()).updates_lost


@pytest.mark.parametrize("how", ["error", "late"])
def test_a_rank_that_cannot_be_brought_up_is_started_again(ranks, how):
    """Would catch a rank that is half there for ever, and refuses what it has already."""
    expected = ranks.generate(PROMPT)
    lose(ranks, 1)
    ranks.plan_fault(1, f"allocate_kv_cache {how}")
    with pytest.raises(EngineFaulted, match="Injected"):
        ranks.call(WakeCall())
    ranks.call(WakeCall())
    assert ranks.generate(PROMPT) == expected
