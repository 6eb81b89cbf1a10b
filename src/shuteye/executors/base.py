"""What the engine core asks of its workers, whichever processes they live in.

Knows nothing of how a rank is reached; `inproc` is the one-rank executor, others implement the same three verbs.
"""

from __future__ import annotations

from typing import Any, Protocol

from shuteye.tasks.table import Plan, Result


class Executor(Protocol):
    """One or more ranks that act as one."""

    def execute(self, plan: Plan) -> Result:
        """Run one step on every rank and return what came of it: the result that goes with the plan's type.

        Raises:
            ShuteyeError: the step failed; no rank advanced its requests.
        """
        ...

    def call(self, verb: str, *args: Any) -> list[Any]:
        """Call one of `worker.VERBS` on every rank; the answers in rank order.

        Raises:
            ShuteyeError: a rank refused; every rank has answered before this is raised.
        """
        ...

    def close(self) -> None:
        """End every rank and give back its memory; idempotent."""
        ...
