"""The native library with larger instruction sets as functions, so that tests run every set on any x86-64 with AVX2."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from shuteye import native
from shuteye.native import build, library

HEADERS = Path(__file__).parents[1] / "native" / "emulated"
BUILT = Path(__file__).parents[2] / "build"


def emulated_levels() -> tuple[str, ...]:
    """Sets that this machine lacks and can emulate."""
    own = native.levels() if native.available() else ()
    if "avx2" not in own:
        return ()
    if "SHUTEYE_TEST_LIBRARY" in os.environ and "SHUTEYE_TEST_EMULATED" not in os.environ:
        return ()  # the run is about that library
    try:
        build.find_compiler()
    except build.BuildFailed:
        return ()
    return tuple(level for level in library.LEVELS if level not in own)


def emulated_library() -> Path:
    """Built when its sources have changed; or what `make test-asan` says."""
    if chosen := os.environ.get("SHUTEYE_TEST_EMULATED"):
        return Path(chosen)
    sources = [*sorted(build.SOURCES.iterdir()), *sorted(HEADERS.iterdir()), Path(build.__file__)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    target = BUILT / f"kernels-emulated-{digest}.so"
    BUILT.mkdir(exist_ok=True)
    with (BUILT / "kernels-emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may run tests
        if not target.exists():
            for old in BUILT.glob("kernels-emulated-*.so"):
                old.unlink()
            build.build(target, emulated=HEADERS)
    return target
