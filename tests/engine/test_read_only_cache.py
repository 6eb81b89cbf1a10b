"""A cache directory that can only be read: it serves, sleeps and wakes; only changed weights have nowhere to go."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from shuteye import LLM, SamplingParams
from shuteye.errors import SleepFailed


def generated(llm: LLM) -> tuple[int, ...]:
    return llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].token_ids


@pytest.fixture
def read_only(monkeypatch):
    """What would write below a directory fails as on a read-only file system; permission bits would not bind root."""

    def begin(directory: Path) -> None:
        def refusing(really, writes):
            def call(path, *arguments, **options):
                if str(path).startswith(str(directory)) and writes(*arguments):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
                return really(path, *arguments, **options)

            return call

        mask = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        monkeypatch.setattr(os, "open", refusing(os.open, lambda flags, *_mode: bool(flags & mask)))
        for name in ("utime", "mkdir", "unlink", "rename", "rmdir"):
            monkeypatch.setattr(os, name, refusing(getattr(os, name), lambda *_arguments: True))

    return begin


def test_it_serves_sleeps_and_wakes_and_keeps_only_what_was_changed_awake(
    tiny_checkpoint: Path, tiny_options, tmp_path: Path, read_only
) -> None:
    """Would catch a ready image that cannot be served, or a sleep that needs a spill directory for nothing."""
    options = tiny_options | {"cache_dir": tmp_path, "enable_sleep_mode": True}
    LLM(str(tiny_checkpoint), **options).close()
    read_only(tmp_path)
    with LLM(str(tiny_checkpoint), **options) as llm:
        before = generated(llm)
        assert llm.sleep(level=1).changed
        assert llm.wake_up().changed
        assert generated(llm) == before
        llm.update_weights([("model.norm.weight", torch.zeros(64))])
        changed = generated(llm)
        with pytest.raises(SleepFailed, match=r"spill failed: Read-only file system.*--cache-dir.*level 2"):
            llm.sleep(level=1)
        assert not llm.is_sleeping
        assert generated(llm) == changed
        assert llm.sleep(level=2).changed
        assert llm.wake_up().changed
        assert generated(llm) == before
