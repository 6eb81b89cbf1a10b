"""The thread pool's promises: it sleeps when idle, survives a fork, and can be resized."""

import os
import resource
import time

import pytest
import torch

from shuteye import native
from shuteye.errors import InvalidRequest
from shuteye.native import library
from shuteye.tasks.kernels import use_kernels


def product() -> torch.Tensor:
    x, weight = torch.ones(2, 64), torch.ones(200, 64)
    return native.linear(x, weight, None, torch.empty(2, 200))


def test_idle_workers_cost_no_cpu():
    native.set_num_threads(3)
    product()
    time.sleep(0.05)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.3)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.03


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_children_start_their_own_workers():
    native.set_num_threads(3)
    expected = product()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(product(), expected) and native.num_threads() == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(product(), expected)


def test_levels_can_be_chosen_by_name_only_where_they_run():
    with pytest.raises(ValueError, match="cannot run here"):
        native.set_level("avx1024")
    assert native.level() in native.levels()
    assert native.levels()[0] == "portable"


def test_an_engine_is_told_which_set_it_cannot_have():
    """A set that does not run here must be refused with the flag's name, not ignored, nor end the process."""
    before = native.level()
    use_kernels("portable", native.num_threads())
    assert native.level() == "portable"
    native.set_level(before)
    missing = set(library.LEVELS) - set(native.levels())
    if not missing:
        pytest.skip("every set runs here")
    with pytest.raises(InvalidRequest, match="cannot run here") as error:
        use_kernels(missing.pop(), native.num_threads())
    assert error.value.param == "kernels"
    assert native.level() == before
