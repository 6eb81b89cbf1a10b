"""The limit of file descriptors: raised, read, and seen to be reached."""

from __future__ import annotations

import os
import resource

import pytest
from descriptor_limits import limited, none_left

from shuteye import processes as descriptors


def test_the_soft_limit_is_raised_but_not_beyond_reason(monkeypatch):
    """A server that is deaf at 1,024 connections where 20,000 were allowed; a limit of a thousand million."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(descriptors, "MOST", hard - 1)
    with limited(hard - 2):
        assert descriptors.raise_limit() == hard - 1
    monkeypatch.setattr(descriptors, "MOST", hard + 1)
    with limited(hard - 2):
        assert descriptors.raise_limit() == hard


def test_a_limit_that_is_higher_already_or_cannot_be_raised_stays(monkeypatch):
    """A limit that was lowered; a server that does not start where it may not change it."""
    with limited(512):
        monkeypatch.setattr(descriptors, "MOST", 256)
        assert descriptors.raise_limit() == 512
        monkeypatch.setattr(descriptors, "MOST", 600)

        def forbidden(*_args):
            raise PermissionError

        with monkeypatch.context() as sandbox:
            sandbox.setattr(resource, "setrlimit", forbidden)
            assert descriptors.raise_limit() == 512


def test_running_out_of_descriptors_is_noticed():
    """A start that is tried where libraries would abort; descriptors lost by looking."""
    before = sorted(os.listdir("/proc/self/fd"))
    assert descriptors.are_left(8)
    with none_left():
        assert not descriptors.are_left(1)
        with pytest.raises(OSError, match="Too many open files") as error:
            os.open(os.devnull, os.O_RDONLY)
        assert descriptors.is_shortage(error.value)
        assert "LimitNOFILE" in descriptors.shortage()
    assert sorted(os.listdir("/proc/self/fd")) == before
