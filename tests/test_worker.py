"""A rank as it begins and ends; what its verbs do is tested through the engine (tests/engine)."""

import os
from dataclasses import replace
from operator import attrgetter

import pytest

from shuteye.config import EngineConfig
from shuteye.engine.transitions import RPC_VERBS
from shuteye.errors import ShuteyeError
from shuteye.memory.backends.fake import FakeBackend
from shuteye.memory.image_store import ImageStore
from shuteye.models.converter import obtain_image
from shuteye.worker import VERBS, Worker


@pytest.fixture
def config(tiny_checkpoint, tiny_options):
    return EngineConfig(str(tiny_checkpoint), dtype="float32", **tiny_options)


def open_fds():
    """This process's descriptors; the one that lists them is gone by the time it is looked at."""
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


def test_a_rank_that_cannot_be_loaded_gives_everything_back(config):
    """Would catch an image that stays in use, and mapped weights, after a load that failed for want of memory."""
    Worker(config, backend=FakeBackend()).close()
    before = open_fds()
    for step in range(100):
        backend = FakeBackend()
        backend.fail_at(step)
        try:
            worker = Worker(config, backend=backend)
        except ShuteyeError:
            assert open_fds() == before, backend.steps
            assert not any(image.in_use for image in ImageStore(config.cache_dir).list()), backend.steps
            continue
        backend.clear()
        worker.close()
        assert step > 2, "nothing can fail?"
        return
    raise AssertionError("loading never ended")


def test_a_model_that_cannot_be_bound_gives_everything_back(config, monkeypatch):
    """Would catch the same where it is not memory that fails, but the model."""
    before = open_fds()
    monkeypatch.setattr("shuteye.tasks.generate.runner.bind", lambda *_args, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Worker(config, backend=FakeBackend())
    assert open_fds() == before


def test_a_revision_is_of_the_served_model_alone(config, monkeypatch):
    """Would catch a reload from a path that is refused, or from a branch that only the served model has."""
    orders = []

    def obtain(order, progress):
        orders.append(order)
        return obtain_image(replace(order, model=config.model, revision=None), progress)

    monkeypatch.setattr("shuteye.worker.obtain_image", obtain)
    worker = Worker(replace(config, model="owner/name", revision="v1"), backend=FakeBackend())
    try:
        for path in ("owner/other", config.model, "owner/name"):
            worker.reload_weights(path)
    finally:
        worker.close()
    assert [(one.model, one.revision) for one in orders] == [
        ("owner/name", "v1"),
        ("owner/other", None),
        (config.model, None),
        ("owner/name", "v1"),
    ]


def test_every_verb_is_a_method_of_a_rank(config):
    """Would catch a verb that is allowed, also for `collective_rpc`, and that nobody has."""
    worker = Worker(config, backend=FakeBackend())
    try:
        assert all(callable(attrgetter(path)(worker)) for path in VERBS.values())
        assert worker.call("states") == worker.residency.states()
    finally:
        worker.close()
    assert RPC_VERBS.keys() <= VERBS.keys()
