"""One completion over HTTP, streamed or not, and all there is to know of how it went.

Knows nothing of servers beyond their address.
"""

import asyncio
import json
import os
import signal
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx2
from shuteye_server import ANSWER_S

MOMENT_S = 0.2


@dataclass
class Outcome:
    """How a request ended. `started` is set with its first text."""

    status: int = 0
    body: bytes = b""
    headers: dict = field(default_factory=dict)
    text: str = ""
    finish_reason: str | None = None
    error: dict | None = None
    ended: bool = False
    started: asyncio.Event = field(default_factory=asyncio.Event)

    def is_prefix_of(self, whole):
        """True if the text is the beginning of `whole`, an unfinished last character aside."""
        return whole.startswith(self.text.rstrip("\ufffd"))


@asynccontextmanager
async def asking(server):
    """An asyncio client with as many connections as are wanted."""
    limits = httpx2.Limits(max_connections=None)
    headers = dict(server.http.headers)
    async with httpx2.AsyncClient(base_url=server.url, headers=headers, timeout=ANSWER_S, limits=limits) as client:
        yield client


async def ask(client, body, outcome=None):
    """Send a completion and take in all of its answer, which must come in time."""
    outcome = outcome or Outcome()
    async with (
        asyncio.timeout(ANSWER_S),
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        outcome.status, outcome.headers = response.status_code, dict(response.headers)
        if response.status_code == 200 and body.get("stream"):
            await _take_events(response, outcome)
        else:
            _take_whole(await response.aread(), outcome)
    return outcome


async def _take_events(response, outcome):
    async for line in response.aiter_lines():
        payload = line.removeprefix("data: ")
        assert not outcome.ended or not line, f"something follows the end of the stream: {line}"
        if payload == "[DONE]":
            outcome.ended = True
        elif payload and "error" in json.loads(payload):
            outcome.error = json.loads(payload)["error"]
        elif payload:
            _take_choices(json.loads(payload)["choices"], outcome)


def _take_choices(choices, outcome):
    for choice in choices:
        assert outcome.finish_reason is None, "a finished choice goes on"
        outcome.text += choice["text"]
        outcome.finish_reason = choice["finish_reason"]
        outcome.started.set()


def _take_whole(body, outcome):
    outcome.body, outcome.ended = body, True
    answer = json.loads(body)
    outcome.error = answer.get("error")
    _take_choices(answer.get("choices", ()), outcome)


def _stop_for_a_moment(pid):
    """So that what the caller does next overtakes what a tiny model computes in the meantime."""
    os.kill(pid, signal.SIGSTOP)
    asyncio.get_running_loop().call_later(MOMENT_S, _go_on, pid)


def _go_on(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def in_flight(server, client, prompts, *, max_tokens, **more):
    """Streams of `prompts` that have all begun, on an engine that stands still for `MOMENT_S`.

    Yields a function that awaits their ends.
    """
    outcomes = [Outcome() for _ in prompts]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(ask(client, server.request(prompt, max_tokens=max_tokens, stream=True, **more), outcome))
            for prompt, outcome in zip(prompts, outcomes, strict=True)
        ]
        async with asyncio.timeout(ANSWER_S):
            for outcome in outcomes:
                await outcome.started.wait()
        assert not any(task.done() for task in tasks), "a stream ended before anything could happen to it"
        _stop_for_a_moment(server.engine_pid)

        async def ends():
            return await asyncio.gather(*tasks)

        try:
            yield ends
        finally:
            _go_on(server.engine_pid)
