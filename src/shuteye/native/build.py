"""Compiles the native library with whatever C++ compiler there is; run by the build hook, and by hand for sanitizers.

Knows nothing of torch nor of the package around it: the build hook runs it before the package exists.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / "_kernels.so"
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-fno-math-errno")
_QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")  # in GCC 12's own intrinsics
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_QUIET, *_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16")
KERNEL_FLAGS: dict[str, tuple[str, ...]] = {
    "kernels_avx2.cpp": _AVX2,
    "kernels_avx512.cpp": _AVX512,
    "kernels_amx.cpp": (*_AVX512, "-mamx-tile", "-mamx-bf16"),
    "quant_avx2.cpp": _AVX2,
    "quant_avxvnni.cpp": (*_AVX2, "-mavxvnni"),
    "quant_avx512.cpp": (*_AVX512, "-mavx512vnni"),
    "quant_amx.cpp": (*_AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"),
}
"""Sources for one instruction set each, compiled on x86-64 only; never -march=native: the library may be moved."""

EMULATED_FLAGS = (*_AVX2, "-Wno-psabi")
"""Instead of those, where larger sets are functions that need no more than AVX2."""


class BuildFailed(Exception):
    """No library was made; the message says why."""


def find_compiler() -> list[str]:
    """The command of a C++ compiler: `$CXX`, or the first of c++, g++, clang++.

    Raises:
        BuildFailed: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = chosen[:1] or ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise BuildFailed(f"No C++ compiler was found (looked for {', '.join(names)}). On Debian: apt install g++")
    return [found, *chosen[1:]]


def build(target: Path = LIBRARY, *, extra_flags: Sequence[str] = (), emulated: Path | None = None) -> Path:
    """Compile and link `target`, atomically.

    Args:
        emulated: a directory with `emulated_intrinsics.h`, which has the instructions of the sets above AVX2 as
            functions: then every set runs on any x86-64 with AVX2, slowly.

    Raises:
        BuildFailed: no compiler, or it failed; the message has its output.
    """
    compiler = find_compiler()
    flags = [*COMMON_FLAGS, *extra_flags]
    own_flags = KERNEL_FLAGS
    if emulated is not None:
        flags += ["-DSHUTEYE_EMULATED", f"-I{emulated}", "-O1"]  # compiled more than run
        own_flags = dict.fromkeys(KERNEL_FLAGS, EMULATED_FLAGS)
    with tempfile.TemporaryDirectory(prefix="shuteye-native-") as scratch:
        jobs = [
            _compile_command([*compiler, *flags, *own_flags.get(source.name, ())], source, Path(scratch))
            for source in _sources()
        ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(_run, jobs))
        linked = target.with_name(f"{target.name}.{os.getpid()}")
        objects = [str(path) for path in sorted(Path(scratch).glob("*.o"))]
        _run([*compiler, *flags, "-shared", "-o", str(linked), *objects])
        linked.replace(target)
    return target


def _sources() -> list[Path]:
    on_x86 = platform.machine() in {"x86_64", "AMD64"}
    return [path for path in sorted(SOURCES.glob("*.cpp")) if on_x86 or path.name not in KERNEL_FLAGS]


def _compile_command(command: list[str], source: Path, scratch: Path) -> list[str]:
    return [*command, "-c", str(source), "-o", str(scratch / source.with_suffix(".o").name)]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stderr:
        sys.stderr.write(done.stderr)
    if done.returncode:
        raise BuildFailed(f"{shlex.join(command)} failed with status {done.returncode}:\n{done.stderr[-4000:]}")


if __name__ == "__main__":  # [target] [--emulated=directory] [compiler flags]
    _, *_arguments = sys.argv
    _target = Path(_arguments.pop(0)) if _arguments else LIBRARY
    _headers = [Path(one.partition("=")[2]) for one in _arguments if one.startswith("--emulated=")]
    _flags = [one for one in _arguments if not one.startswith("--emulated=")]
    print(build(_target, extra_flags=_flags, emulated=_headers[0] if _headers else None))
