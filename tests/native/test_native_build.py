"""What happens without a compiler, or with a library that does not fit: a reason, and torch goes on."""

import pytest

from shuteye import native
from shuteye.native import build, library


def test_no_library_is_a_reason_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(library._Chosen, "path", tmp_path / "none.so")
    assert not native.available()
    assert "without a C++ compiler" in str(native.unavailable_reason())


def test_a_broken_library_is_a_reason_too(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library._Chosen, "path", broken)
    assert "does not load" in str(native.unavailable_reason())


def test_no_compiler_is_said_plainly(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildFailed, match="No C\\+\\+ compiler was found"):
        build.find_compiler()


def test_a_failing_compiler_leaves_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildFailed, match="failed with status 1"):
        build.build(tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())
