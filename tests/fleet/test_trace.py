"""Traces: read from CSV, and made up from a seed."""

from collections import Counter
from itertools import pairwise

import pytest

from shuteye.errors import InvalidRequest
from shuteye.fleet.trace import GENERATORS, Arrival, first, model_names, read_trace, skew, zipf


def test_a_csv_is_read_as_it_is():
    """Columns taken by position, or a column more that is an error."""
    lines = ["tokens,model,time,user\n", "5,a,0.5,x\n", "7,b,1.5,y\n"]
    assert list(read_trace(lines)) == [Arrival(0.5, "a", 5), Arrival(1.5, "b", 7)]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["time,model\n"], "no column tokens"),
        ([], "no column time, model, tokens"),
        (["time,model,tokens\n", "x,a,1\n"], "Line 2"),
        (["time,model,tokens\n", "1,a,1\n", "0.5,a,1\n"], "Line 3 of the trace goes back"),
        (["time,model,tokens\n", "nan,a,1\n"], "finite"),
        (["time,model,tokens\n", "1,,1\n"], "a model"),
        (["time,model,tokens\n", "1,a\n"], "Line 2"),
        (["time,model,tokens\n", "1,a,-1\n"], "at least 0 tokens"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(lines, says):
    """A file that is half read, or an error that does not say where."""
    with pytest.raises(InvalidRequest, match=says):
        list(read_trace(lines))


@pytest.mark.parametrize("name", GENERATORS)
def test_a_seed_is_a_trace(name):
    """Simulations that cannot be repeated, or that are the same whatever the seed; times that go back."""
    generator = GENERATORS[name]
    one, again, other = (first(generator(seed), 2000) for seed in (1, 1, 2))
    assert one == again != other
    assert all(before.at <= after.at for before, after in pairwise(one))
    assert all(arrival.tokens >= 1 for arrival in one)


def test_popularity_falls_as_zipf_has_it():
    """A generator in which all models are asked for equally, or the wrong one most."""
    counts = Counter(arrival.model for arrival in first(zipf(1, num_models=10), 20_000))
    one, two, *_, ten = (counts[name] for name in model_names(10))
    assert 1.8 < one / two < 2.2
    assert 8.0 < one / ten < 12.0


def test_the_rate_goes_up_and_down_with_the_day():
    """Nights as busy as days."""
    times = [arrival.at for arrival in first(GENERATORS["diurnal"](1, day_s=1000.0, per_second=10.0), 9000)]
    night = sum(time % 1000.0 < 100.0 for time in times)
    noon = sum(450.0 <= time % 1000.0 < 550.0 for time in times)
    assert noon > 8 * night


def test_the_skew_has_its_share_of_rare_requests():
    """A skew that is none: 1.13% of the requests are to be for rare models."""
    arrivals = first(skew(1, burst=20.0), 40_000)
    rare = sum(arrival.model in model_names(5)[3:] for arrival in arrivals)
    assert 0.008 < rare / len(arrivals) < 0.015
