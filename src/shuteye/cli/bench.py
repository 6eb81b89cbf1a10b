"""`shuteye bench`: put load on a running server, time its tokens, and how fast it sleeps and wakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from shuteye.cli.quantities import format_seconds, format_size
from shuteye.cli.remote import AsJson, Remote
from shuteye.cli.terminal import show, show_json, table
from shuteye.cli.values import INTEGER
from shuteye.client.load import Cycle, LoadGenerator, LoadPlan, LoadResult, percentile
from shuteye.errors import InvalidRequest
from shuteye.typed_fields import require_sendable

SHARES = (0.5, 0.9, 0.99)
FAILED = 1


def bench(
    *,
    requests: Annotated[
        int,
        INTEGER,
        Parameter(help="How many requests; 0 for none but those of --sleep-wake.", validator=Number(gte=0)),
    ] = 32,
    concurrency: Annotated[int, INTEGER, Parameter(help="How many of them at once.", validator=Number(gte=1))] = 4,
    prompt_words: Annotated[
        int, INTEGER, Parameter(help="Random words in a prompt, about a token each.", validator=Number(gte=1))
    ] = 128,
    max_tokens: Annotated[int, INTEGER, Parameter(help="Tokens to generate for each.", validator=Number(gte=1))] = 128,
    route: Annotated[Literal["completions", "chat"], Parameter(help="Which of OpenAI's routes.")] = "completions",
    ignore_eos: Annotated[
        bool, Parameter(help="Always generate --max-tokens; servers that refuse the field need --no-ignore-eos.")
    ] = True,
    seed: Annotated[int, INTEGER, Parameter(help="Another seed, other prompts.")] = 0,
    model: Annotated[
        str | None, Parameter(help="The model's name; by default the first that the server lists.")
    ] = None,
    api_key: Annotated[str | None, Parameter(help="The server's key for inference.", env_var="SHUTEYE_API_KEY")] = None,
    sleep_wake: Annotated[
        int,
        INTEGER,
        Parameter(
            help="Afterwards, so often: sleep, wake, and wait for the first token. Needs the admin key.",
            validator=Number(gte=0),
        ),
    ] = 0,
    sleep_level: Annotated[Literal[1, 2], INTEGER, Parameter(help="How deep these sleeps are.")] = 1,
    as_json: AsJson = False,
    remote: Remote | None = None,
) -> int:
    """Put load on a running OpenAI-compatible server and time it; exit status 1 if a request fails."""
    if not requests and not sleep_wake:
        raise InvalidRequest("There is nothing to measure with 0 requests and without --sleep-wake.", param="requests")
    remote = remote or Remote()

    def plan(served: str) -> LoadPlan:
        return LoadPlan(
            model=model or served,
            num_requests=requests,
            concurrency=concurrency,
            num_prompt_words=prompt_words,
            max_tokens=max_tokens,
            route=route,
            ignore_eos=ignore_eos,
            seed=seed,
        )

    made, result, cycles = asyncio.run(
        _measure(remote, plan, api_key=api_key, num_cycles=sleep_wake, sleep_level=sleep_level)
    )
    if as_json:
        show_json(_as_json(remote.url, made, result, cycles))
    else:
        _show_load(remote.url, made, result)
        _show_cycles(cycles, sleep_level)
    return FAILED if len(result.served) < len(result.requests) else 0


async def _measure(
    remote: Remote, plan_for: Callable[[str], LoadPlan], *, api_key: str | None, num_cycles: int, sleep_level: int
) -> tuple[LoadPlan, LoadResult, list[Cycle]]:
    key = api_key
    if not key and remote.admin_api_key is not None:
        key = remote.admin_api_key
        require_sendable("admin_api_key", key)
    async with LoadGenerator(remote.url, api_key=key, timeout_s=remote.timeout_s) as load:
        plan = plan_for(await load.first_model())
        result = await load.run(plan)
        if not num_cycles:
            return plan, result, []
        async with remote.connect_async() as control:
            first = plan.num_requests
            indices = range(first, first + num_cycles)
            return plan, result, [await load.cycle(plan, control, index, level=sleep_level) for index in indices]


# --- what is shown ------------------------------------------------------------------------------


def _distributions(result: LoadResult) -> dict[str, list[float]]:
    served = result.served
    return {
        "first token": [one.first_token_s for one in served if one.first_token_s is not None],
        "per output token": [one.per_token_s for one in served if one.per_token_s is not None],
        "between chunks": [gap for one in served for gap in one.gaps_s],
        "whole request": [one.total_s for one in served],
    }


def _show_load(url: str, plan: LoadPlan, result: LoadResult) -> None:
    if not result.requests:
        return
    served, failed = result.served, [one.error for one in result.requests if one.error is not None]
    show(f"{url}  {plan.model}  {len(served)} requests served, {plan.concurrency} at once")
    if failed:
        show(f"{len(failed)} FAILED, the first: {failed[0]}")
    rows = [
        (name, *(format_seconds(percentile(values, share)) for share in SHARES), format_seconds(max(values)))
        for name, values in _distributions(result).items()
        if values
    ]
    if rows:
        show(table(("SECONDS TO", "MEDIAN ", "90% ", "99% ", "MAX "), rows))
        show(
            f"{result.output_tokens_per_s:,.1f} output tokens/s and {result.requests_per_s:,.2f} requests/s over "
            f"{result.seconds:,.1f} s; {_mean([one.num_prompt_tokens for one in served]):,.0f} tokens in and "
            f"{_mean([one.num_output_tokens for one in served]):,.0f} out, on average."
        )


def _show_cycles(cycles: Sequence[Cycle], level: int) -> None:
    if not cycles:
        return
    show(f"{len(cycles)} sleeps at level {level}: {format_size(cycles[-1].freed_bytes)} given back by the last one.")
    rows = [
        (name, format_seconds(percentile(values, 0.5)), format_seconds(min(values)), format_seconds(max(values)))
        for name, values in _times_of(cycles).items()
    ]
    show(table(("SECONDS TO", "MEDIAN ", "MIN ", "MAX "), rows))


def _times_of(cycles: Sequence[Cycle]) -> dict[str, list[float]]:
    return {
        "sleep": [one.sleep_s for one in cycles],
        "wake": [one.wake_s for one in cycles],
        "wake and give a token": [one.first_token_s for one in cycles],
    }


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _as_json(url: str, plan: LoadPlan, result: LoadResult, cycles: Sequence[Cycle]) -> dict[str, Any]:
    def figures(values: Sequence[float]) -> dict[str, float]:
        if not values:
            return {}
        return {f"p{share * 100:g}": percentile(values, share) for share in SHARES} | {"max": max(values)}

    return {
        "url": url,
        "plan": asdict(plan),
        "seconds": result.seconds,
        "num_served": len(result.served),
        "errors": [one.error for one in result.requests if one.error is not None],
        "output_tokens_per_s": result.output_tokens_per_s,
        "requests_per_s": result.requests_per_s,
        "times_s": {name: figures(values) for name, values in _distributions(result).items()},
        "requests": [asdict(one) | {"per_token_s": one.per_token_s} for one in result.requests],
        "cycles": [asdict(one) for one in cycles],
    }
