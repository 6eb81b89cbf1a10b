"""Files of the engine's machine, copied once to each other machine that ranks read them on."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from shuteye.errors import InvalidRequest, ShuteyeError

CHUNK_BYTES = 8 << 20

Call = Callable[[Collection[int], str, tuple[Any, ...]], list[Any]]


class FileCopies:
    """A context in which ranks of other machines hold copies, which end with it.

    Args:
        call: asks some ranks for a verb, and raises what they refuse.
        away: as `Launcher.away`.
    """

    def __init__(self, call: Call, away: Mapping[int, int]) -> None:
        self._call = call
        self._away = away
        self._number = 0

    def __enter__(self) -> FileCopies:
        return self

    def paths(self, file: Path, ranks: Collection[int]) -> dict[int, str]:
        """Where each rank finds the file.

        Raises:
            InvalidRequest: it cannot be read.
            ShuteyeError: a machine has no room for it.
        """
        held = {holder: self._copy(file, holder) for holder in sorted({*self._away.values()})}
        self._number += 1
        return {rank: held[self._away[rank]] if rank in self._away else str(file) for rank in ranks}

    def _copy(self, file: Path, holder: int) -> str:
        path = ""
        try:
            with file.open("rb") as source:
                while (chunk := source.read(CHUNK_BYTES)) or not path:
                    (path,) = self._call([holder], "receive", (self._number, chunk))
        except OSError as error:
            raise InvalidRequest(f"{file} cannot be read on the server's host: {error}.", param="path") from error
        return path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        holders = sorted({*self._away.values()})
        if holders:
            with contextlib.suppress(ShuteyeError):  # of a rank that has died, which holds nothing any more
                self._call(holders, "forget_received", ())


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """All of them or none, whoever does the same meanwhile."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".new-") as scratch:
        new = Path(scratch, "files")
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
        with contextlib.suppress(OSError):  # somebody was faster
            new.rename(directory)
