"""The load generator against servers that answer in every way; figures that can be trusted."""

import asyncio
import json

import httpx2
import pytest

from shuteye.client.load import LoadGenerator, LoadPlan, percentile
from shuteye.errors import InvalidRequest, ServerUnreachable

PLAN = LoadPlan("m", num_requests=4, concurrency=2, num_prompt_words=5, max_tokens=3)


def chunk(text, **more):
    return f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]} | more)}\n\n"


WHOLE = chunk("a") + chunk("b") + 'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\n'
DONE = "data: [DONE]\n\n"


def run(answer, plan=PLAN):
    """The result of a plan on a server that gives `answer` for each request; and what was asked."""
    asked = []

    def handle(request):
        asked.append(json.loads(request.content))
        found = answer(len(asked)) if callable(answer) else answer
        return found if isinstance(found, httpx2.Response) else httpx2.Response(200, text=found)

    async def measured():
        async with LoadGenerator("http://x", transport=httpx2.MockTransport(handle)) as load:
            return await load.run(plan)

    return asyncio.run(measured()), asked


def test_every_prompt_is_different_and_the_same_on_every_run():
    """Prompts from the prefix cache, answers shorter than planned, or another load on every run."""
    result, asked = run(WHOLE + DONE)
    assert len(result.served) == 4
    assert len({one["prompt"] for one in asked}) == 4
    assert {(one["max_tokens"], one["stream"], one["ignore_eos"]) for one in asked} == {(3, True, True)}
    assert sorted(one["prompt"] for one in asked) == sorted(one["prompt"] for one in run(WHOLE + DONE)[1])
    chat = LoadPlan("m", num_requests=1, route="chat", ignore_eos=False)
    (body,) = run(WHOLE + DONE, chat)[1]
    assert body["messages"][0]["role"] == "user"
    assert "ignore_eos" not in body


def test_tokens_are_those_of_the_usage_or_else_of_the_chunks():
    """Rates that are wrong because a server sends several tokens in one chunk."""
    (one, *_), seconds = run(WHOLE + DONE)[0].served, run(WHOLE + DONE)[0].seconds
    assert (one.num_prompt_tokens, one.num_output_tokens, len(one.gaps_s)) == (7, 3, 1)
    assert one.per_token_s == pytest.approx((one.total_s - one.first_token_s) / 2)
    assert seconds > 0
    without = run(chunk("a") + chunk("") + chunk("b") + DONE)[0].served[0]
    assert without.num_output_tokens == 2


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx2.Response(503, json={"error": {"message": "asleep", "type": "ModelSleepingError"}}), "asleep"),
        (WHOLE, "ended before"),
        (chunk("a") + 'data: {"error": {"message": "gone"}}\n\n' + DONE, "gone"),
        ("data: {nonsense\n\n", "JSONDecodeError"),
        (chunk("a") + f"data: {json.dumps({'choices': [{'text': '', 'finish_reason': 'abort'}]})}\n\n" + DONE, "abort"),
    ],
)
def test_failures_are_part_of_the_result_and_of_no_rate(answer, says):
    """A throughput made of refusals, or of answers that a sleep cut short; a run that ends at the first failure."""
    result, _ = run(answer)
    assert len(result.requests) == 4
    assert result.served == ()
    assert says in result.requests[0].error
    assert result.output_tokens_per_s == result.requests_per_s == 0


def test_never_more_at_once_than_planned():
    """Another concurrency than the one that is reported."""
    running, most = 0, 0

    async def handle(_request):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1
        return httpx2.Response(200, text=WHOLE + DONE)

    async def measured():
        plan = LoadPlan("m", num_requests=20, concurrency=3)
        async with LoadGenerator("http://x", transport=httpx2.MockTransport(handle)) as load:
            return await load.run(plan)

    assert len(asyncio.run(measured()).served) == 20
    assert most == 3


def test_a_server_that_is_not_there():
    """A traceback instead of what to look for."""

    async def ask():
        async with LoadGenerator("http://127.0.0.1:9") as load:
            await load.first_model()

    with pytest.raises(ServerUnreachable):
        asyncio.run(ask())


def test_a_key_that_no_header_can_carry_is_the_load_s_own():
    """A message that shows the key, or speaks of the admin key."""
    with pytest.raises(InvalidRequest) as refused:
        LoadGenerator("http://x", api_key="secret\n")
    assert refused.value.param == "api_key"
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("field", ["concurrency", "max_tokens", "num_prompt_words"])
def test_plans_that_make_no_sense(field):
    """A division by zero at the end of a long run."""
    with pytest.raises(InvalidRequest) as refused:
        LoadPlan("m", **{field: 0})
    assert refused.value.param == field


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 2.5), (1.0, 4), (0.9, 3.7)])
def test_percentiles(share, value):
    """Medians of the wrong neighbours."""
    assert percentile([4, 1, 3, 2], share) == pytest.approx(value)
