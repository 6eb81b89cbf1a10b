"""Fixtures of the memory tests: two images of one layout, and worlds that are awake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memory_harness import KV_BYTES, WAKE, World, build_image

from shuteye.memory.arena import Arena
from shuteye.memory.backends.fake import FakeBackend
from shuteye.memory.image import ImageIdentity, WeightImage
from shuteye.memory.image_store import ImageStore
from shuteye.memory.residency import Residency


@pytest.fixture(scope="session")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two images of the same layout and different bytes."""
    store = ImageStore(tmp_path_factory.mktemp("cache"))
    paths = []
    for seed in (1, 2):
        image = store.open_or_build(ImageIdentity(f"test/world-{seed}", str(seed), "bfloat16"), build_image(seed))
        paths.append(image.path)
        image.close()
    return paths[0], paths[1]


@pytest.fixture
def make_world(image_paths: tuple[Path, Path], tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Worlds, awake; closed at the end."""
    worlds: list[World] = []

    def make(backing: str = "disk") -> World:
        backend = FakeBackend()
        image = WeightImage.open(image_paths[0])
        weights = Arena.reserve(backend, tag="weights", nbytes=image.layout.nbytes)
        kv = Arena.reserve(backend, tag="kv_cache", nbytes=KV_BYTES)
        residency = Residency(
            backend=backend, weights=weights, image=image, spill_dir=tmp_path / "spill", backing=backing
        )
        residency.attach_kv_cache(kv)
        world = World(backend, residency, weights, kv, image_paths[1])
        worlds.append(world)
        world.wake(WAKE)
        backend.clear()
        return world

    yield make
    for world in worlds:
        world.backend.clear()
        world.residency.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()
