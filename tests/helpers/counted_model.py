"""A model for the fleet's driver that only counts."""

import asyncio

from shuteye.fleet.model_spec import Depth


class CountedModel:
    """Takes `nbytes` awake and nothing asleep; fails with what is in `errors`, and moves once `may_move` is set."""

    def __init__(self, nbytes):
        self.nbytes = nbytes
        self.depth = Depth.UNLOADED
        self.errors = []
        self.moves = []
        self.may_move = asyncio.Event()
        self.may_move.set()

    async def go_awake(self):
        await self._move(Depth.AWAKE)

    async def go_to_sleep(self, depth):
        await self._move(depth)

    async def _move(self, depth):
        self.moves.append(depth)
        await self.may_move.wait()
        if self.errors:
            raise self.errors.pop()
        self.depth = depth

    async def resident_bytes(self):
        return self.nbytes if self.depth is Depth.AWAKE else 0

    def woken_bytes(self):
        return self.nbytes

    def on_moved(self):
        pass
