"""Sleeping with requests really in flight: the three modes, the three policies, and a race of all against all."""

import asyncio
import random
import time

import pytest
from http_helpers import ask, asking, in_flight
from shuteye_server import SLEEPING_BODY, wait_for

LONG = 400
PROMPTS = ["a river", "two rivers that meet", "3", "the sea"]


def call(client, path):
    """A control call beside the streams; its answer must come, in time."""
    return asyncio.wait_for(client.post(path), 30)


async def settled(client, path):
    """The report of a control call that must succeed."""
    response = await call(client, path)
    assert response.status_code == 200, f"{path}: {response.text}"
    return response.json()


def assert_whole(outcomes, right, prompts, length):
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert (outcome.status, outcome.error, outcome.finish_reason) == (200, None, "length")
        assert outcome.ended
        assert outcome.text == right(prompt, length)


def is_refusal(outcome):
    """True for the 503 of the contract, to the letter, and nothing else."""
    return outcome.body == SLEEPING_BODY and is_worth_a_retry(outcome)


def is_worth_a_retry(outcome):
    retry = outcome.headers.get("retry-after", "")
    return outcome.status == 503 and retry.isdigit() and int(retry) > 0


class TestModes:
    def test_abort_ends_streams_with_what_they_had(self, server, right):
        """A stream that is cut without a word, goes on, or says that it was complete."""

        async def scenario():
            async with asking(server) as client, in_flight(server, client, PROMPTS, max_tokens=LONG) as ends:
                report = await settled(client, "/sleep?mode=abort")
                return report, await ends()

        report, outcomes = asyncio.run(scenario())
        assert (report["changed"], report["aborted_requests"], report["held_requests"]) == (True, len(PROMPTS), 0)
        for prompt, outcome in zip(PROMPTS, outcomes, strict=True):
            assert (outcome.status, outcome.error, outcome.finish_reason) == (200, None, "abort")
            assert outcome.ended
            assert outcome.is_prefix_of(right(prompt, LONG))
            assert len(outcome.text) < len(right(prompt, LONG))

    def test_abort_answers_requests_that_do_not_stream(self, server, right):
        """A caller who waits for ever, or gets an error, for a request that was aborted."""

        async def scenario():
            async with asking(server) as client:
                task = asyncio.create_task(ask(client, server.request(PROMPTS[0], max_tokens=LONG)))
                await asyncio.to_thread(wait_for, lambda: server.metric("shuteye_num_requests_running"), "running")
                await settled(client, "/sleep")  # abort is the default
                return await task

        outcome = asyncio.run(scenario())
        assert (outcome.status, outcome.finish_reason) == (200, "abort")
        assert outcome.is_prefix_of(right(PROMPTS[0], LONG))

    def test_wait_lets_streams_finish_and_newcomers_not_begin(self, server, right):
        """A sleep that cuts streams short, never comes, or lets new requests keep it up."""

        async def scenario():
            async with asking(server) as client, in_flight(server, client, PROMPTS, max_tokens=LONG) as ends:
                sleep = asyncio.create_task(settled(client, "/sleep?mode=wait"))
                wait = asyncio.to_thread(
                    wait_for, lambda: server.get("/state").json()["state"]["gate"] == "draining", "draining"
                )
                await wait
                late = await ask(client, server.request("late", stream=True))
                assert not sleep.done()
                return late, await ends(), await sleep

        late, outcomes, report = asyncio.run(scenario())
        assert is_refusal(late)
        assert_whole(outcomes, right, PROMPTS, LONG)
        assert (report["changed"], report["aborted_requests"]) == (True, 0)
        assert server.get("/is_sleeping").json() == {"is_sleeping": True}

    def test_wait_that_takes_too_long_gives_up(self, server, right):
        """A deadline that costs requests, or leaves the gate closed."""

        async def scenario():
            async with asking(server) as client, in_flight(server, client, PROMPTS, max_tokens=LONG) as ends:
                answer = await call(client, "/sleep?mode=wait&timeout=0.05")
                after = await ask(client, server.request("after"))
                return answer, after, await ends()

        answer, after, outcomes = asyncio.run(scenario())
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "DrainTimeoutError")
        assert after.text == right("after")
        assert_whole(outcomes, right, PROMPTS, LONG)
        assert server.get("/ready").status_code == 200

    @pytest.mark.parametrize("level", [0, 1, 2])
    def test_keep_goes_on_after_the_wake_as_if_nothing_had_been(self, server, right, level):
        """Tokens lost, doubled or changed by the sleep; a stream that ends with it."""

        async def scenario():
            async with asking(server) as client, in_flight(server, client, PROMPTS, max_tokens=LONG) as ends:
                report = await settled(client, f"/sleep?mode=keep&level={level}")
                before = server.metric("shuteye_generation_tokens_total")
                await asyncio.sleep(0.2)
                assert server.metric("shuteye_generation_tokens_total") == before, "tokens are made in its sleep"
                await settled(client, "/wake_up")
                return report, await ends()

        report, outcomes = asyncio.run(scenario())
        assert (report["aborted_requests"], report["held_requests"]) == (0, len(PROMPTS))
        assert_whole(outcomes, right, PROMPTS, LONG)

    def test_keep_with_several_seeded_choices(self, server):
        """A random state that starts anew, or is shared out differently, after the wake."""
        asked = server.request("seeded", max_tokens=LONG, n=2, seed=5, temperature=0.9)
        undisturbed = [choice["text"] for choice in server.done("/v1/completions", **asked)["choices"]]

        async def scenario():
            async with asking(server) as client:
                task = asyncio.create_task(client.post("/v1/completions", json=asked))
                await asyncio.to_thread(wait_for, lambda: server.metric("shuteye_num_requests_running"), "running")
                report = await settled(client, "/sleep?mode=keep")
                await settled(client, "/wake_up")
                return report, (await task).json()

        report, answer = asyncio.run(scenario())
        assert report["held_requests"] == 2
        assert [choice["text"] for choice in answer["choices"]] == undisturbed

    def test_a_pause_keeps_streams(self, server, right):
        """A pause that is no pause, or one that costs requests."""

        async def scenario():
            async with asking(server) as client, in_flight(server, client, PROMPTS, max_tokens=LONG) as ends:
                await settled(client, "/pause?mode=keep")
                assert server.get("/is_paused").json() == {"is_paused": True}
                assert server.get("/is_sleeping").json() == {"is_sleeping": False}
                assert server.get("/ready").json() == {"ready": False, "reason": "paused"}
                late = asyncio.create_task(ask(client, server.request("late")))
                await asyncio.sleep(0.2)
                assert not late.done(), "a request ran while paused"
                await settled(client, "/wake_up")
                assert server.get("/is_paused").json() == {"is_paused": True}, "a wake undid the pause"
                await settled(client, "/resume")
                return await late, await ends()

        late, outcomes = asyncio.run(scenario())
        assert late.text == right("late")
        assert_whole(outcomes, right, PROMPTS, LONG)

    def test_a_client_that_leaves_a_sleeping_stream_is_forgotten(self, server):
        """Requests of clients long gone that run after the wake, or that keep blocks."""

        async def scenario():
            async with asking(server) as client:
                stream = asyncio.create_task(ask(client, server.request("gone", max_tokens=LONG, stream=True)))
                await asyncio.to_thread(wait_for, lambda: server.metric("shuteye_num_requests_running"), "running")
                await settled(client, "/sleep?mode=keep")
                stream.cancel()
                await asyncio.gather(stream, return_exceptions=True)

        gone = server.metric("shuteye_request_failure_total", reason="disconnected")
        asyncio.run(scenario())
        wait_for(
            lambda: server.metric("shuteye_request_failure_total", reason="disconnected") == gone + 1,
            "the disconnect",
        )
        before = server.metric("shuteye_generation_tokens_total")
        server.done("/wake_up")
        server.complete("next", max_tokens=3)
        assert server.metric("shuteye_generation_tokens_total") == before + 3


class TestPolicies:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("level", [1, 2])
    def test_reject_answers_503_to_the_letter(self, server, stream, level):
        """A body that clients written for the contract do not know, or a stream that begins and then fails."""
        server.done(f"/sleep?level={level}")
        messages = [{"role": "user", "content": "x"}]
        for path, body in (
            ("/v1/completions", {"model": server.model, "prompt": "x", "stream": stream}),
            ("/v1/chat/completions", {"model": server.model, "messages": messages, "stream": stream}),
        ):
            answer = server.post(path, **body)
            assert (answer.status_code, answer.content) == (503, SLEEPING_BODY)
            assert int(answer.headers["retry-after"]) > 0
            assert answer.headers["content-type"] == "application/json"

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("level", [1, 2])
    def test_hold_keeps_requests_until_someone_wakes_it(self, holding, right, stream, level):
        """A held request that is refused, wakes the model by itself, or is forgotten."""
        holding.done(f"/sleep?level={level}")

        async def scenario():
            async with asking(holding) as client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(client, holding.request(prompt, stream=stream))) for prompt in PROMPTS]
                await asyncio.sleep(0.3)
                assert not any(task.done() for task in tasks)
                assert holding.get("/is_sleeping").json() == {"is_sleeping": True}
                await settled(client, "/wake_up")
                return [await task for task in tasks]

        assert_whole(asyncio.run(scenario()), right, PROMPTS, 16)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("level", [1, 2])
    def test_wake_serves_thirty_requests_on_a_sleeper(self, waking, right, stream, level):
        """A request lost to the wake that it caused, or answered from weights that are not loaded."""
        prompts = [f"wake {index}" for index in range(30)]
        waking.done(f"/sleep?level={level}")

        async def scenario():
            async with asking(waking) as client:
                return await asyncio.gather(*(ask(client, waking.request(prompt, stream=stream)) for prompt in prompts))

        assert_whole(asyncio.run(scenario()), right, prompts, 16)
        assert waking.get("/is_sleeping").json() == {"is_sleeping": False}


SLEEPS = (
    ["/sleep?mode={mode}"],
    ["/sleep?level=0&mode={mode}"],
    ["/sleep?level=2&mode={mode}"],
    ["/sleep?tags=kv_cache&mode={mode}"],
    ["/sleep?tags=weights&mode={mode}", "/sleep?level=2"],
    ["/sleep?mode={mode}", "/sleep?mode=keep", "/wake_up?tags=weights"],
)
RELOADED = ["/sleep?level=2&mode={mode}", "/wake_up?tags=weights", "/reload_weights"]
"""Not for the policy `wake`, whose requests would be refused while the weights are blank."""


@pytest.mark.parametrize("num_sleeps", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_requests_racing_many_sleeps(any_server, right, num_sleeps):
    """Any request that hangs, gets a wrong text, or ends in a way that mode and policy do not allow."""
    policy = any_server.policy
    chance = random.Random(1)
    paths = SLEEPS if policy == "wake" else (*SLEEPS, RELOADED)
    stop = asyncio.Event()
    outcomes = []

    async def keep_asking(client, worker):
        for turn in range(10_000):
            if stop.is_set():
                return
            prompt, length = f"worker {worker} turn {turn % 5}", 5 + 7 * (turn % 4)
            body = any_server.request(prompt, max_tokens=length, stream=(worker + turn) % 2 == 0)
            outcomes.append((prompt, length, await ask(client, body)))
            await asyncio.sleep(0.003)

    async def sleep_and_wake(client):
        for _ in range(num_sleeps):
            await asyncio.sleep(chance.uniform(0, 0.03))
            mode = chance.choice(["abort", "wait", "keep"])
            for path in chance.choice(paths):
                await settled(client, path.format(mode=mode))
            await asyncio.sleep(chance.uniform(0, 0.03))
            await settled(client, "/wake_up")
        stop.set()

    async def scenario():
        async with asyncio.timeout(60), asking(any_server) as client, asyncio.TaskGroup() as group:
            for worker in range(6):
                group.create_task(keep_asking(client, worker))
            group.create_task(sleep_and_wake(client))

    began = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - began < 60
    assert_fair(outcomes, right, may_refuse=policy == "reject")
    reasons = {outcome.finish_reason for _, _, outcome in outcomes}
    assert {"length", "abort"} <= reasons, "no race happened"
    assert (None in reasons) == (policy == "reject")
    assert_idle(any_server, right)


CALLS = (
    *["/sleep?level=1", "/sleep?level=2", "/sleep?level=0", "/sleep?tags=kv_cache", "/sleep?tags=weights", "/pause"],
    *["/wake_up", "/wake_up", "/wake_up", "/wake_up?tags=weights", "/wake_up?tags=kv_cache", "/resume", "/resume"],
    *["/reload_weights", "/reset_prefix_cache"],
)


def test_conflicting_sleeps_and_disconnects_lose_nothing(any_server, right):
    """Any state from which one cannot come back, any blocks or requests lost on the way, any wrong text."""
    chance = random.Random(1)
    stop = asyncio.Event()
    outcomes, answers = [], []

    async def keep_asking(client, worker):
        for turn in range(10_000):
            if stop.is_set():
                return
            prompt, length = f"worker {worker} turn {turn % 5}", 5 + 7 * (turn % 4)
            body = any_server.request(prompt, max_tokens=length, stream=(worker + turn) % 2 == 0)
            task = asyncio.create_task(ask(client, body))
            if chance.random() < 0.2:
                await asyncio.wait([task], timeout=chance.uniform(0, 0.05))
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            else:
                outcomes.append((prompt, length, await task))
            await asyncio.sleep(0.003)

    async def operate(client):
        for _ in range(40):
            path = chance.choice(CALLS)
            if path.startswith(("/sleep", "/pause")):
                path += f"{'&' if '?' in path else '?'}mode={chance.choice(['abort', 'wait', 'keep'])}&timeout=0.05"
            answers.append((path, await call(client, path)))
            await asyncio.sleep(chance.uniform(0, 0.02))

    async def scenario():
        async with asyncio.timeout(60), asking(any_server) as client, asyncio.TaskGroup() as group:
            for worker in range(6):
                group.create_task(keep_asking(client, worker))
            await asyncio.gather(operate(client), operate(client))
            stop.set()
            for path in ("/sleep?level=2&mode=keep", "/wake_up", "/resume"):
                await settled(client, path)

    asyncio.run(scenario())
    for path, answer in answers:
        kind = (answer.json().get("error") or {}).get("type")
        assert (answer.status_code, kind) in {(200, None), (409, "ConflictError"), (503, "DrainTimeoutError")}, path
    assert_fair(outcomes, right, may_refuse=any_server.policy != "hold", may_be_paused=True)
    assert_idle(any_server, right)


def assert_fair(outcomes, right, *, may_refuse, may_be_paused=False):
    """Every request was served with the right text, refused to the letter, or aborted in order."""
    for prompt, length, outcome in outcomes:
        if outcome.status == 503 and may_be_paused and b"ModelPausedError" in outcome.body:
            assert is_worth_a_retry(outcome), outcome
        elif outcome.status == 503:
            assert may_refuse
            assert is_refusal(outcome), outcome
        else:
            assert (outcome.status, outcome.error, outcome.ended) == (200, None, True), outcome
            assert outcome.finish_reason in ("length", "abort")
            whole = outcome.finish_reason == "length"
            assert outcome.text == right(prompt, length) if whole else outcome.is_prefix_of(right(prompt, length))


def assert_idle(server, right):
    """It serves, and has forgotten everything that was."""
    assert server.complete("afterwards") == right("afterwards")
    assert server.metric("shuteye_num_requests_running") == server.metric("shuteye_num_requests_waiting") == 0
    assert server.metric("shuteye_kv_cache_usage_perc") == 0, "blocks are lost"
