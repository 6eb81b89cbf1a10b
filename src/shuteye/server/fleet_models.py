"""The models of one server as a fleet: each an engine that can be unloaded, all moved by one scheduler.

Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from shuteye.config import EngineConfig
from shuteye.fleet.model_spec import ModelSpec
from shuteye.fleet.scheduler import Scheduler
from shuteye.frontend.async_engine import AsyncEngine
from shuteye.frontend.fleet_driver import FleetDriver, machine_bytes
from shuteye.frontend.fleet_engine import PROCESS_BYTES, FleetEngine, estimated_bytes
from shuteye.frontend.unloadable import UnloadableEngine
from shuteye.server.fleet_config import FleetConfig

KV_SHARE = 8
LEAST_KV_BYTES, MOST_KV_BYTES = 32 << 20, 1 << 30
"""By default a model's KV cache may take an eighth of the budget, within these bounds: all of it is reserved while the
model is awake."""


def fleet_of(
    configs: Sequence[EngineConfig], fleet: FleetConfig, open_engine: Callable[[EngineConfig], AsyncEngine]
) -> tuple[FleetDriver, list[FleetEngine]]:
    """One engine for each config, none of them started, and who moves them.

    Args:
        open_engine: as `UnloadableEngine` has it.

    Raises:
        InvalidRequest: two models are the same.
    """
    budget = machine_bytes() if fleet.memory_budget is None else fleet.memory_budget
    driver = FleetDriver(Scheduler(budget, fleet.settings()))
    engines = [_engine(config, budget, driver, open_engine) for config in configs]
    return driver, engines


def _engine(
    config: EngineConfig, budget: int, driver: FleetDriver, open_engine: Callable[[EngineConfig], AsyncEngine]
) -> FleetEngine:
    share = min(max(budget // KV_SHARE, LEAST_KV_BYTES), MOST_KV_BYTES)
    most = next(one for one in (config.kv_cache_memory, config.max_kv_cache_memory, share) if one is not None)
    # not all models that share these flags have a KV cache, so that what was asked for is a bound here
    config = replace(config, kv_cache_memory=None, max_kv_cache_memory=most, enable_sleep_mode=True)
    spec = ModelSpec(
        name=config.model,
        awake_bytes=min(estimated_bytes(config), budget),
        growth_bytes=most,
        level_1_bytes=PROCESS_BYTES,
        on_sleeping_request=config.on_sleeping_request,
    )
    return FleetEngine(spec, UnloadableEngine(config, open_engine), driver)
