"""Every test runs the native library at every instruction set that this machine has; skipped where there is none."""

from collections.abc import Iterator
from pathlib import Path

import chosen_library  # noqa: F401
import pytest

from shuteye import native

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))
LEVELS = native.levels() if native.available() else ("portable",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.path.name != "test_native_build.py":
            item.add_marker(needs_native)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native.set_level(request.param)
    native.set_num_threads(2)
    yield request.param
    native.set_level(LEVELS[-1])
