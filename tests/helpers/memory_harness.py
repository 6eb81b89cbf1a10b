"""A small world to sleep and wake in: an image of a few extents, its arenas, and a backend that fails on demand."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shuteye.memory.arena import Arena
from shuteye.memory.backends.fake import FakeBackend
from shuteye.memory.image_writer import ImageWriter
from shuteye.memory.layout import TensorSpec
from shuteye.memory.residency import Residency
from shuteye.memory.tensor_bytes import TensorBytes
from shuteye.state import SleepPlan, WakePlan

PAGE = mmap.PAGESIZE
KV_BYTES = 4 * PAGE
TEMPLATE = "tokenizer/chat_template.jinja"

# Groups of one page, of several, and of a fraction: extents of 1, 3, 2 and 1 pages.
SPECS = (
    TensorSpec("embed", (PAGE // 2,), "bfloat16", "embed"),
    TensorSpec("layer.q", (PAGE,), "bfloat16", "layer"),
    TensorSpec("layer.k", (PAGE // 4 + 1,), "bfloat16", "layer"),
    TensorSpec("mlp", (2, PAGE // 2), "bfloat16", "mlp"),
    TensorSpec("norm", (3,), "float32", "norm"),
)


def open_fds() -> set[int]:
    """This process's descriptors; the one that lists them is gone by the time it is looked at."""
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


def unseal(path: Path) -> Path:
    """Make an image writable, to be damaged."""
    for each in (path, *path.rglob("*")):
        each.chmod(0o755 if each.is_dir() else 0o644)
    return path


def build_image(seed: int) -> Callable[[ImageWriter], None]:
    def build(writer: ImageWriter) -> None:
        writer.begin(SPECS, aliases={"head": "embed"}, metadata={"seed": seed})
        for spec in SPECS:
            writer.put(spec.name, random.Random(f"{seed} {spec.name}").randbytes(spec.nbytes))
        writer.put_buffer("scale", TensorBytes((2,), "float32", memoryview(np.array([1.5, 2.5], np.float32)).cast("B")))
        (writer.directory / "tokenizer").mkdir()
        (writer.directory / TEMPLATE).write_text("{{ messages }}")

    return build


@dataclass
class World:
    """A residency over a `FakeBackend`, with the moves that tests make."""

    backend: FakeBackend
    residency: Residency
    weights: Arena
    kv: Arena
    other_image_path: Path

    def sleep(self, plan: SleepPlan) -> None:
        self.residency.save(plan)
        self.residency.release(plan)

    def wake(self, plan: WakePlan) -> None:
        self.residency.restore(plan)

    def bytes_of(self, arena: Arena) -> bytes:
        return bytes(arena.bytes_view(0, arena.nbytes))

    @property
    def weight_bytes(self) -> bytes:
        return self.bytes_of(self.weights)

    @property
    def where(self) -> dict[str, str]:
        return {state.tag: state.residency for state in self.residency.states()}

    def write(self, offset: int, value: int) -> None:
        self.weights.bytes_view(offset, 1)[0] = value

    def write_everything(self, seed: int) -> None:
        """What update_weights does after a blank wake."""
        for slot in self.residency.image.layout.slots.values():
            self.weights.bytes_view(slot.offset, slot.nbytes)[:] = random.Random(f"{seed} {slot.name}").randbytes(
                slot.nbytes
            )
            self.residency.mark_written(slot.name)


LEVEL_1 = SleepPlan("offload", "discard")
LEVEL_2 = SleepPlan("discard", "discard")
WAKE = WakePlan("restore", "commit")
RELOAD = WakePlan("reload", "commit")
