"""What the fleet's scheduler saves, and how fast it decides: the skew, and fleets of thousands of models.

Needs no model: a machine is simulated that takes bytes and seconds as it is told.

    python benchmarks/fleet_simulation.py                       some minutes
    python benchmarks/fleet_simulation.py --requests 50000 --models 5000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from shuteye.fleet.machine import ModelProfile
from shuteye.fleet.rivals import Lru
from shuteye.fleet.scheduler import Scheduler
from shuteye.fleet.simulation import Policy, Report, simulate
from shuteye.fleet.trace import Arrival, first, model_names, skew, zipf

GIB = 1024**3
NUM_AWAKE = 50
"""How many of thousands of models fit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500_000, help="of the skew; about two steps each")
    parser.add_argument("--models", type=int, nargs="*", default=[100, 1000, 5000], help="sizes of fleets")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    compare_on_skew(options.requests, options.seed)
    for num_models in options.models:
        time_fleet(num_models, options.seed)


def compare_on_skew(num_requests: int, seed: int) -> None:
    """Loads, active evictions and waits beside LRU."""
    profiles = [ModelProfile(name=name, awake_bytes=GIB) for name in model_names(5)]
    trace = first(skew(seed), num_requests)
    lru = timed("lru", Lru(3 * GIB), profiles, trace, 3 * GIB)
    ours = timed("shuteye", Scheduler(3 * GIB), profiles, trace, 3 * GIB)
    print(f"{1 - ours.loads / lru.loads:.1%} fewer loads than LRU, {ours.active_evictions} active evictions")


def time_fleet(num_models: int, seed: int) -> None:
    """Steps per second where many models share little memory, and requests are for few of them."""
    profiles = [ModelProfile(name=name, awake_bytes=GIB, wake_s=(0.2, 0.2, 0.2)) for name in model_names(num_models)]
    trace = first(zipf(seed, num_models=num_models, per_second=2.0, exponent=1.2), 20_000)
    timed(f"{num_models} models", Scheduler(NUM_AWAKE * GIB), profiles, trace, NUM_AWAKE * GIB)


def timed(
    name: str, policy: Policy, profiles: Sequence[ModelProfile], trace: Sequence[Arrival], budget_bytes: int
) -> Report:
    begun = time.process_time()
    report = simulate(name, [policy], profiles, trace, budget_bytes=budget_bytes, deadline_s=120.0)
    seconds = time.process_time() - begun
    waits = ", ".join(f"{name} {wait:.2f}" for name, wait in report.waits_s.items())
    print(
        f"{name}: {report.steps:,} steps, {report.steps / seconds:,.0f}/s; {report.loads:,} loads, "
        f"{report.refused:,} refused, peak {report.peak_bytes / budget_bytes:.0%} of the budget; waits in s: {waits}"
    )
    return report


if __name__ == "__main__":
    main()
