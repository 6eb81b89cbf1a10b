"""Traces: which model is asked for when, and for how much. Read from CSV, or made up from a seed. Pure."""

from __future__ import annotations

import csv
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice
from random import Random

import msgspec

from shuteye.errors import InvalidRequest

COLUMNS = ("time", "model", "tokens")


class Arrival(msgspec.Struct, frozen=True):
    """One request of a trace.

    Attributes:
        at: seconds since the trace began.
        tokens: how many it generates.
    """

    at: float
    model: str
    tokens: int


# --- from a file --------------------------------------------------------------------------------


def read_trace(lines: Iterable[str]) -> Iterator[Arrival]:
    """The requests of a CSV with the columns `time` (seconds, never falling), `model` and `tokens`; others are ignored.

    Raises:
        InvalidRequest: a column is missing, or a line has none of the numbers it should; names the line.
    """
    reader = csv.DictReader(lines, skipinitialspace=True)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise InvalidRequest(
            f"The trace has no column {', '.join(missing)}. Its first line must be {','.join(COLUMNS)}.", param="trace"
        )
    before = -math.inf
    for row in reader:
        arrival = _arrival(row, reader.line_num)
        if arrival.at < before:
            raise InvalidRequest(f"Line {reader.line_num} of the trace goes back in time.", param="trace")
        before = arrival.at
        yield arrival


def _arrival(row: dict[str, str], line: int) -> Arrival:
    try:
        arrival = Arrival(float(row["time"]), row["model"], int(row["tokens"]))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"Line {line} of the trace cannot be read: {error}.", param="trace") from error
    if not (math.isfinite(arrival.at) and arrival.model and arrival.tokens >= 0):
        raise InvalidRequest(
            f"Line {line} of the trace needs a finite time, a model and at least 0 tokens, got {row}.", param="trace"
        )
    return arrival


# --- made up ------------------------------------------------------------------------------------


def model_names(num_models: int) -> tuple[str, ...]:
    """The names of the models in traces that are made up: the first is asked for most."""
    return tuple(f"model-{index:0{len(str(max(0, num_models - 1)))}}" for index in range(num_models))


def zipf(seed: int, *, num_models: int = 20, per_second: float = 2.0, exponent: float = 1.0) -> Iterator[Arrival]:
    """Requests at a constant rate; the n-th model is asked for in proportion to n^-exponent. Without end."""
    return _poisson(Random(seed), num_models, exponent, lambda _: per_second, per_second)


def diurnal(
    seed: int, *, num_models: int = 20, per_second: float = 2.0, exponent: float = 1.0, day_s: float = 86_400.0
) -> Iterator[Arrival]:
    """As `zipf`, but the rate goes up and down once a day, between a tenth and nineteen tenths of `per_second`."""

    def rate(at: float) -> float:
        return per_second * (1.0 - 0.9 * math.cos(2.0 * math.pi * at / day_s))

    return _poisson(Random(seed), num_models, exponent, rate, 1.9 * per_second)


def bursts(
    seed: int,
    *,
    num_models: int = 20,
    per_second: float = 2.0,
    exponent: float = 1.0,
    burst: float = 20.0,
    gap_s: float = 2.0,
) -> Iterator[Arrival]:
    """Requests that come in bursts to one model each: of `burst` requests on average, `gap_s` seconds apart."""
    random = Random(seed)
    starts = _poisson(random, num_models, exponent, lambda _: per_second / burst, per_second / burst)
    return _overlaid(starts, lambda start: _burst(random, start, burst, gap_s))


def skew(
    seed: int,
    *,
    hot: Sequence[float] = (0.66, 0.328, 0.012),
    num_rare: int = 2,
    per_second: float = 10.0,
    rare_share: float = 0.0113,
    burst: float = 120.0,
    gap_s: float = 2.0,
) -> Iterator[Arrival]:
    """A few models with nearly all requests, and rare ones that are used together, in turns, for minutes at a time.

    After a report of five models on three slots, where 1.13% of the requests caused 70.95% of 692 loads
    (https://github.com/Layr-Labs/d-inference/issues/789). The hot models come first in `model_names`.

    Args:
        hot: their shares of the requests that are not rare.
        burst: how many requests for rare models come together on average, `gap_s` seconds apart.
    """
    random = Random(seed)
    num_hot = len(hot)
    names = model_names(num_hot + num_rare)
    choose = _weighted(random, hot)
    times = _times(random, per_second * (1.0 - rare_share))
    hot_arrivals = (Arrival(at, names[choose()], _tokens(random)) for at in times)
    starts = (Arrival(at, names[num_hot], 0) for at in _beats(random, burst / (per_second * rare_share)))

    def turns(start: Arrival) -> Iterator[Arrival]:
        for arrival in _burst(random, start, burst, gap_s):
            yield Arrival(arrival.at, names[num_hot + random.randrange(num_rare)], arrival.tokens)

    return heapq.merge(hot_arrivals, _overlaid(starts, turns), key=lambda arrival: arrival.at)


GENERATORS: dict[str, Callable[..., Iterator[Arrival]]] = {
    "zipf": zipf,
    "bursts": bursts,
    "diurnal": diurnal,
    "skew": skew,
}
"""Traces by the names that people give them."""


def first(trace: Iterator[Arrival], num_requests: int) -> list[Arrival]:
    """So many requests of a trace that may have no end."""
    return list(islice(trace, num_requests))


# --- parts --------------------------------------------------------------------------------------


def _poisson(
    random: Random, num_models: int, exponent: float, rate: Callable[[float], float], highest: float
) -> Iterator[Arrival]:
    """Arrivals at a rate that changes with time: those at the highest rate, thinned out (Lewis and Shedler, 1979)."""
    names = model_names(num_models)
    choose = _weighted(random, [(rank + 1) ** -exponent for rank in range(num_models)])
    for at in _times(random, highest):
        if random.random() * highest <= rate(at):
            yield Arrival(at, names[choose()], _tokens(random))


def _times(random: Random, per_second: float) -> Iterator[float]:
    at = 0.0
    while True:
        at += random.expovariate(per_second)
        yield at


def _beats(random: Random, apart_s: float) -> Iterator[float]:
    """Times that are so far apart, give or take a half."""
    at = 0.0
    while True:
        at += apart_s * random.uniform(0.5, 1.5)
        yield at


def _burst(random: Random, start: Arrival, burst: float, gap_s: float) -> Iterator[Arrival]:
    """Requests for one model from `start` on, `burst` on average."""
    at = start.at
    for _ in range(max(1, round(burst * random.uniform(0.5, 1.5)))):
        yield Arrival(at, start.model, _tokens(random))
        at += random.expovariate(1.0 / gap_s)


def _overlaid(starts: Iterator[Arrival], parts: Callable[[Arrival], Iterator[Arrival]]) -> Iterator[Arrival]:
    """All requests of parts that begin at `starts`, in the order of time."""
    later: list[tuple[float, int, Arrival]] = []
    count = 0
    for start in starts:
        while later and later[0][0] <= start.at:
            yield heapq.heappop(later)[2]
        for arrival in parts(start):
            count += 1
            heapq.heappush(later, (arrival.at, count, arrival))
    while later:
        yield heapq.heappop(later)[2]


def _weighted(random: Random, weights: Sequence[float]) -> Callable[[], int]:
    """Draws of an index, in proportion to `weights`."""
    sums = list(accumulate(weights))
    population = range(len(weights))
    return lambda: random.choices(population, cum_weights=sums)[0]


def _tokens(random: Random) -> int:
    """How much a request generates: 64 tokens in the middle, a twentieth more than 400."""
    return max(1, round(random.lognormvariate(math.log(64), 1.1)))
