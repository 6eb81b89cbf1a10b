"""Fifty requests of the openai clients at once onto a sleeping server: one wake, no failure; also if a wake fails."""

import asyncio
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from shuteye_server import ANSWER_S

from shuteye.client import AsyncWakingTransport, WakingTransport

NUM_REQUESTS = 24
MAX_TOKENS = 15
CONNECTIONS = httpx2.Limits(max_connections=None)


def prompts(kind):
    return [f"{kind} {index}" for index in range(NUM_REQUESTS)]


def body(server, prompt):
    fixed = {"model": server.model, "max_tokens": MAX_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return fixed | {"prompt": prompt}


def ask_from_threads(server, asked, *, inner=None, max_retries=0):
    """The texts of all prompts, asked by one sync client from as many threads; every second one is streamed."""
    transport = WakingTransport(inner or httpx2.HTTPTransport(limits=CONNECTIONS))
    http = httpx2.Client(transport=transport, timeout=ANSWER_S)
    with server.openai(http_client=http, max_retries=max_retries) as client, ThreadPoolExecutor(NUM_REQUESTS) as pool:

        def one(index):
            if index % 2:
                return client.completions.create(**body(server, asked[index])).choices[0].text
            with client.completions.create(stream=True, **body(server, asked[index])) as stream:
                return "".join(chunk.choices[0].text for chunk in stream)

        return list(pool.map(one, range(len(asked))))


def ask_from_tasks(server, asked, *, inner=None, max_retries=0):
    """As above, by one async client from as many tasks."""

    async def one(client, index):
        if index % 2:
            return (await client.completions.create(**body(server, asked[index]))).choices[0].text
        stream = await client.completions.create(stream=True, **body(server, asked[index]))
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all():
        transport = AsyncWakingTransport(inner or httpx2.AsyncHTTPTransport(limits=CONNECTIONS))
        http = httpx2.AsyncClient(transport=transport, timeout=ANSWER_S)
        async with server.async_openai(http_client=http, max_retries=max_retries) as client:
            return await asyncio.gather(*(one(client, index) for index in range(len(asked))))

    return asyncio.run(ask_all())


def wakes(server):
    """How many wakes did something, came in vain, and failed."""
    outcomes = ("changed", "unchanged", "WakeFailed")
    return tuple(server.metric("shuteye_transitions_total", transition="wake_up", outcome=one) for one in outcomes)


def new_wakes(server, before):
    return tuple(now - then for now, then in zip(wakes(server), before, strict=True))


@pytest.mark.parametrize("level", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ask_all", [ask_from_threads, ask_from_tasks])
def test_many_requests_wake_it_once(server, right, ask_all, level):
    """A wake per request, a request that fails because another one woke the model, or answers that change places."""
    asked = prompts(ask_all.__name__)
    server.done(f"/sleep?level={level}")
    before = wakes(server)
    assert ask_all(server, asked) == [right(prompt, MAX_TOKENS) for prompt in asked]
    assert new_wakes(server, before) == (1, 0, 0)


# --- a wake that fails once -----------------------------------------------------------------------


class NoMemory:
    """Keeps the engine process from mapping memory until the first wake has failed."""

    def __init__(self, server):
        self._pid = server.engine_pid
        status = Path(f"/proc/{self._pid}/status").read_text()
        held = int(re.search(r"VmData:\s+(\d+) kB", status)[1]) * 1024
        self._before = resource.prlimit(self._pid, resource.RLIMIT_DATA)
        resource.prlimit(self._pid, resource.RLIMIT_DATA, (held, self._before[1]))
        self.num_failed = 0

    def see(self, request, response):
        """Called with every answer, before anyone else sees it."""
        if request.url.path == "/wake_up" and response.status_code == 503:
            self.num_failed += 1
            self.lift()

    def lift(self):
        resource.prlimit(self._pid, resource.RLIMIT_DATA, self._before)


class Seen(httpx2.BaseTransport):
    """Real connections whose answers `no_memory` sees."""

    def __init__(self, no_memory):
        self._inner, self._no_memory = httpx2.HTTPTransport(limits=CONNECTIONS), no_memory

    def handle_request(self, request):
        response = self._inner.handle_request(request)
        self._no_memory.see(request, response)
        return response

    def close(self):
        self._inner.close()


class AsyncSeen(httpx2.AsyncBaseTransport):
    """`Seen`, awaitable."""

    def __init__(self, no_memory):
        self._inner, self._no_memory = httpx2.AsyncHTTPTransport(limits=CONNECTIONS), no_memory

    async def handle_async_request(self, request):
        response = await self._inner.handle_async_request(request)
        self._no_memory.see(request, response)
        return response

    async def aclose(self):
        await self._inner.aclose()


@pytest.fixture
def no_memory(server):
    server.done("/sleep")
    limit = NoMemory(server)
    yield limit
    limit.lift()


@pytest.mark.parametrize(("ask_all", "transport"), [(ask_from_threads, Seen), (ask_from_tasks, AsyncSeen)])
def test_many_requests_survive_a_wake_that_fails_once(server, right, no_memory, ask_all, transport):
    """A failed wake that sticks, a stampede of wakes after it, or a client that gives up on what a retry would mend."""
    asked = prompts(f"again {ask_all.__name__}")
    before = wakes(server)
    texts = ask_all(server, asked, inner=transport(no_memory), max_retries=3)
    assert texts == [right(prompt, MAX_TOKENS) for prompt in asked]
    assert no_memory.num_failed == 1
    assert new_wakes(server, before) == (1, 0, 1)


@pytest.mark.parametrize(("ask_all", "transport"), [(ask_from_threads, Seen), (ask_from_tasks, AsyncSeen)])
def test_without_retries_the_failure_is_told_and_the_next_request_works(server, right, no_memory, ask_all, transport):
    """A failed wake reported as anything else than what it is."""
    import openai

    with pytest.raises(openai.InternalServerError) as failed:
        ask_all(server, ["told"], inner=transport(no_memory))
    assert (failed.value.status_code, failed.value.type) == (503, "WakeFailedError")
    assert server.get("/is_sleeping").json() == {"is_sleeping": True}
    assert ask_all(server, ["told"], inner=transport(no_memory)) == [right("told", MAX_TOKENS)]
