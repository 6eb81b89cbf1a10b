"""shuteye on Ray Serve: an application of replicas, each with an engine of its own, and the one that controls them all.

`build_app` is what a Serve config names as its `import_path`. The only module of this package that imports Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from shuteye import logs
from shuteye import processes as descriptors
from shuteye.calls import Call
from shuteye.config import EngineConfig
from shuteye.ray.control import Orders, SleepControl
from shuteye.ray.fleet import FleetReport, FleetState, Outcome
from shuteye.ray.replica import Replica
from shuteye.ray.settings import ReplicaSettings, settings_of
from shuteye.ray.wanted import Wanted

try:
    import ray
    from ray import serve
except ImportError as error:
    raise ImportError(
        f"shuteye.ray.deployment needs Ray Serve ({error}); install shuteye with its extra: shuteye[ray]."
    ) from error

ENGINE, CONTROL = "Engine", "SleepControl"
"""Names of the two deployments, as a Serve config has them."""
MAX_QUESTIONS = 10_000
"""To the control at once: each replica always has one waiting there."""


class _ServeLink:
    """The control, asked through its handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def join(self, replica: str, known: Wanted) -> Wanted:
        return cast(Wanted, await self._handle.join.remote(replica, known))

    async def follow(self, replica: str, revision: int) -> Orders | None:
        return cast(Orders | None, await self._handle.follow.remote(replica, revision))

    async def report(self, number: int, outcome: Outcome) -> None:
        await self._handle.report.remote(number, outcome)

    async def leave(self, replica: str) -> None:
        await self._handle.leave.remote(replica)

    async def carry_out(self, call: Call[Any]) -> FleetReport:
        return cast(FleetReport, await self._handle.carry_out.remote(call))

    async def look(self) -> FleetState:
        return cast(FleetState, await self._handle.look.remote())


class EngineReplica:
    """The deployment whose replicas answer HTTP; Ray Serve makes one of these in each replica."""

    def __init__(self, settings: ReplicaSettings, control: Any) -> None:
        from shuteye.frontend.async_engine import AsyncEngine

        logs.configure(logs.LogSettings(settings.server.log_format, settings.server.log_level))
        descriptors.raise_limit()
        engine = AsyncEngine(_with_threads(settings.engine))
        self._replica = Replica(serve.get_replica_context().replica_tag, settings, engine, _ServeLink(control))

    async def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray Serve once, before it sends any request; an exception fails the start of the replica."""
        await self._replica.start()
        return self._replica.app

    async def check_health(self) -> None:
        """Asked by Ray Serve every few seconds; an exception, several times in a row, has the replica replaced."""
        self._replica.check()

    async def __del__(self) -> None:
        """Called by Ray Serve once requests have ended, or their time is over."""
        await self._replica.stop()


def _with_threads(config: EngineConfig) -> EngineConfig:
    """As many compute threads a rank as Ray has reserved CPUs for the replica, unless the config says how many."""
    cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
    ranks = config.tensor_parallel_size * config.pipeline_parallel_size
    if config.num_threads is not None or cpus < 1:
        return config
    return replace(config, num_threads=max(1, cpus // ranks))


def application(settings: ReplicaSettings, **options: Any) -> Any:
    """An application for `serve.run`.

    Args:
        options: of the deployment of replicas, such as `num_replicas` and `ray_actor_options`.
    """
    control = serve.deployment(
        SleepControl,
        name=CONTROL,
        num_replicas=1,
        max_ongoing_requests=MAX_QUESTIONS,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},  # of questions, one a replica every two seconds
    )
    engines = serve.deployment(
        serve.ingress()(EngineReplica), name=ENGINE, max_ongoing_requests=settings.max_ongoing_requests
    )
    return engines.options(**options).bind(settings, control.bind(call_timeout_s=settings.call_timeout_s))


def build_app(args: Mapping[str, Any]) -> Any:
    """An application from the `args` of a Serve config: flags of `shuteye serve` and settings of replicas by name.

    Raises:
        InvalidRequest: a name is unknown, or a value is not one.
    """
    return application(settings_of(args))


def control_of(app_name: str = "default") -> Any:
    """The one handle of a running application: `SleepControl`, called as in `handle.sleep.remote(level=1)`."""
    return serve.get_deployment_handle(CONTROL, app_name)
