"""Every test runs the native library at every instruction set: those that this machine lacks, emulated, in slow tests.

Skipped where there is no native library.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import chosen_library  # noqa: F401
import pytest
from emulated import emulated_levels, emulated_library

from shuteye import native
from shuteye.native import library

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))
LEVELS = native.levels() if native.available() else ("portable",)
EMULATED = tuple(f"emulated {level}" for level in emulated_levels())


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    is_compiled = "SHUTEYE_TEST_EMULATED" in os.environ  # by `make test-asan`; it takes a minute, else in these tests
    for item in items:
        if here in item.path.parents and item.path.name != "test_native_build.py":
            item.add_marker(needs_native)
            if "emulated" in item.name and not is_compiled:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(params=[*LEVELS, *EMULATED])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param.removeprefix("emulated ")
    own = library._Chosen.path
    library.use_library(emulated_library() if name != request.param else own)
    native.set_level(name)
    native.set_num_threads(2)
    yield name
    native.set_level(native.levels()[-1])
    library.use_library(own)
