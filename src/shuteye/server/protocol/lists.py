"""Lists in requests: validated up to the first item that is wrong, since that is the one that is told.

Knows nothing of items. A million complaints would keep the event loop for seconds, and fill the memory.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import FailFast

T = TypeVar("T")


class _FirstOnly(FailFast):
    """pydantic's own, which can be part of a union: it lacks a hash."""

    def __hash__(self) -> int:
        return hash(type(self))


Many = Annotated[list[T], _FirstOnly()]
