"""Prompts of one HTTP request, merged; and streams whose client does not read, or goes."""

import asyncio
from contextlib import aclosing

from shuteye.server.generation.run import _merge
from shuteye.server.http import events as sse
from shuteye.server.http.events import EventStream


def test_sources_wait_for_a_reader_that_is_slow():
    """A queue that takes whatever is generated while the client reads nothing."""

    async def scenario():
        made = 0

        async def source(index):
            nonlocal made
            for number in range(10_000):
                made += 1
                yield index, number

        async with aclosing(_merge([source(index) for index in range(5)])) as merged:
            await anext(merged)
            for _ in range(1_000):
                await asyncio.sleep(0)
            assert made <= 3 * 5

    asyncio.run(scenario())


def test_merging_keeps_the_order_of_every_source_and_ends_with_the_last():
    """Steps of a prompt that are mixed up or lost when the queue is full."""

    async def scenario():
        async def source(index, count):
            for number in range(count):
                yield index, number
                if number % 3 == index:
                    await asyncio.sleep(0)

        counts = [0, 7, 50, 1]
        merged = [step async for step in _merge([source(index, count) for index, count in enumerate(counts)])]
        for index, count in enumerate(counts):
            assert [number for at, number in merged if at == index] == list(range(count))

    asyncio.run(scenario())


class Leaving:
    """A client that is there until it has got `count` chunks."""

    def __init__(self, count):
        self.got, self.count = 0, count
        self.gone = asyncio.Event()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.got += bool(message.get("body"))
        if self.got == self.count:
            self.gone.set()


def test_a_client_that_leaves_ends_the_work_on_its_backlog(monkeypatch):
    """A server that encodes a long backlog for nobody, and answers nobody else meanwhile."""
    monkeypatch.setattr(sse, "TURN_S", 0.0)

    async def scenario():
        async def events():
            for _ in range(50_000):
                yield b"data: x\n\n"

        client = Leaving(10)
        source = events()
        await EventStream(source, source=source)({}, client.receive, client.send)
        assert client.got < 200

    asyncio.run(scenario())


def test_others_have_their_turn_while_a_backlog_is_worked_off(monkeypatch):
    """A probe that times out because somebody's long answer is being written."""
    monkeypatch.setattr(sse, "TURN_S", 0.0)

    async def scenario():
        turns = 0

        async def other():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async def events():
            for _ in range(1_000):
                yield b"data: x\n\n"

        client = Leaving(None)
        source = events()
        task = asyncio.create_task(other())
        await EventStream(source, source=source)({}, client.receive, client.send)
        task.cancel()
        assert client.got == 1_000
        assert turns >= 50

    asyncio.run(scenario())
