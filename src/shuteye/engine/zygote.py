"""The zygote: a process that has imported what engines compute with, and forks an engine whenever it is told to.

`python -m shuteye.engine.zygote CONTROL PARENT`: CONTROL is the descriptor of a socket on which orders come, and go the
ends of what was forked (see `forking.py`). A fork takes milliseconds where a start takes half a second or, with torch,
seconds; and what a fork does not write to is in memory once for all of them.

    zygote ── fork ── engine of native kernels
           ├─ fork ── finds that its model needs torch ── hands its order on
           └─ fork ── zygote with torch ── takes that order ── fork ── engine of torch's modules

A zygote computes nothing and has one thread: whatever it forks has locks that are free and pools still to be made. An
engine lives on when its zygote ends: it ends with the server (see `processes.end_with_pipe`).
"""

from __future__ import annotations

import gc
import mmap
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from shuteye.engine import process
from shuteye.engine.forking import ForkOrder, new_pair, refuse, send_end
from shuteye.heap import return_free_heap
from shuteye.processes import die_with_parent, name_process


def _import_native() -> None:
    """What engines of native kernels import, also what they do on their way and not at their start."""
    from shuteye.executors import inproc  # noqa: F401
    from shuteye.memory.backends import linux  # noqa: F401
    from shuteye.models import decoder, image_form, image_identity, sources  # noqa: F401
    from shuteye.models.formats import dtypes, files  # noqa: F401
    from shuteye.tasks.generate import constraints, runner, scheduler  # noqa: F401


def _import_torch() -> None:
    """What engines that compute with torch import beside that."""
    from shuteye.models import kv_tensors, torch_loop  # noqa: F401


def _import_modules() -> None:
    """What engines of transformers' modules import beside that."""
    from shuteye.models import encoder, module_decoder, whisper  # noqa: F401
    from shuteye.tasks.pool import runner as pool_runner  # noqa: F401
    from shuteye.tasks.transcribe import runner as speech_runner  # noqa: F401


def _settle() -> None:
    """Before a fork: no collection of it is to write to what is here already."""
    gc.collect()
    gc.freeze()
    return_free_heap()


class _Zygote:
    """Takes orders until nobody can give any.

    Args:
        orders: where they come from.
        reports: where it is told how what was forked has ended.
        imports: done before the first fork.
    """

    def __init__(self, orders: socket.socket, reports: socket.socket, imports: Callable[[], None]) -> None:
        self._orders = orders
        self._reports = reports
        self._imports = imports
        self._over = False
        self._sockets = [orders, reports]
        self._pidfds: set[int] = set()
        self._poll = select.poll()
        self._on_ready: dict[int, Callable[[], ForkOrder | None]] = {}
        self._listen(orders.fileno(), self._take_order)

    def serve(self) -> ForkOrder | None:
        """In a fork, its order; in the zygote None, when it is to end."""
        self._imports()
        _settle()
        while not self._over:
            for fd, _events in self._poll.poll():
                order = self._on_ready[fd]()
                if order is not None:
                    return order
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # whoever has ended already is not left to others
                pass
        return None

    def _listen(self, fd: int, on_ready: Callable[[], ForkOrder | None]) -> None:
        self._on_ready[fd] = on_ready
        self._poll.register(fd, select.POLLIN)

    def _ignore(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._on_ready[fd]

    def _take_order(self) -> ForkOrder | None:
        """In the fork that is made for it, the order."""
        order = ForkOrder.receive(self._orders)
        if order is None:
            self._over = True
            return None
        if order.needs == "modules" and "shuteye.models.whisper" not in sys.modules:
            _import_modules()
            _settle()
        try:
            pid = os.fork()
        except OSError as error:
            refuse(order.channel, f"fork: {error.strerror}")
            order.close()
            return None
        if pid == 0:
            self._leave()
            return order
        order.close()
        self._watch(pid, partial(send_end, self._reports))
        return None

    def _watch(self, pid: int, on_end: Callable[[int, int], None]) -> None:
        fd = os.pidfd_open(pid)
        self._pidfds.add(fd)
        self._listen(fd, partial(self._reap, fd, pid, on_end))

    def _reap(self, fd: int, pid: int, on_end: Callable[[int, int], None]) -> None:
        self._ignore(fd)
        self._pidfds.discard(fd)
        os.close(fd)
        on_end(*os.waitpid(pid, 0))

    def _leave(self) -> None:
        """In a fork: give up what is the zygote's alone."""
        self._forget_forked()
        for each in self._sockets:
            each.close()

    def _forget_forked(self) -> None:
        for fd in self._pidfds:
            os.close(fd)


class _FirstZygote(_Zygote):
    """A zygote without torch, which forks one with torch when there is an order for it.

    Attributes:
        torch_orders: where its forks hand orders on.
    """

    def __init__(self, control: socket.socket) -> None:
        super().__init__(control, control, _import_native)
        self.torch_orders, self._handed_on = new_pair()
        self._sockets.append(self._handed_on)
        self._torch_is_there = mmap.mmap(-1, 1)  # shared with the zygote that has it; 1 once it has imported it
        self._listen(self._handed_on.fileno(), self._fork_torch)

    def _fork_torch(self) -> ForkOrder | None:
        """In an engine that the zygote with torch has forked, its order."""
        mine = os.getpid()
        self._torch_is_there[0] = 0
        pid = os.fork()
        if pid != 0:
            self._ignore(self._handed_on.fileno())
            self._watch(pid, self._on_torch_end)
            return None
        die_with_parent(mine)
        self.torch_orders.close()
        self._forget_forked()
        order = _Zygote(self._handed_on, self._reports, self._import_and_tell).serve()
        self._over = True
        return order

    def _import_and_tell(self) -> None:
        _import_torch()
        self._torch_is_there[0] = 1

    def _on_torch_end(self, _pid: int, status: int) -> None:
        """Have the next order make another one. If this one never got to take any, refuse those that wait for it."""
        if not self._torch_is_there[0]:
            self._refuse_handed_on(os.waitstatus_to_exitcode(status))
        self._listen(self._handed_on.fileno(), self._fork_torch)

    def _refuse_handed_on(self, code: int) -> None:
        self._handed_on.setblocking(False)
        with suppress(BlockingIOError):
            while order := ForkOrder.receive(self._handed_on):
                refuse(order.channel, f"the zygote with torch ended with exit code {code}")
                order.close()
        self._handed_on.setblocking(True)


def main() -> None:
    """Fork engines until the server is gone; in a fork, be an engine."""
    gc.disable()  # what is imported stays; an engine turns it on
    name_process("shuteye-zygote")
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when we end, whoever else gets the signal
    zygote = _FirstZygote(socket.socket(fileno=int(sys.argv[1])))
    order = zygote.serve()
    if order is not None:
        process.serve(order, zygote.torch_orders)


if __name__ == "__main__":
    main()
