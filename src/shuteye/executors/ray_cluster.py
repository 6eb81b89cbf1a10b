"""The Ray cluster as the engine uses it: found or started, its machines, and room reserved on them.

One of two modules that import Ray, which is an optional dependency; `ray_ranks` starts ranks in the room.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from shuteye.config import EngineConfig
from shuteye.errors import EngineNotReady, InvalidRequest
from shuteye.executors.ray_placement import Machine, Placement, place
from shuteye.parallel.shards import RankPlace

PARAM = "distributed_executor_backend"
_ROOM_S = 30.0
"""How long CPUs that are free may take to be reserved."""
_FREE_S = 5.0
"""How long CPUs of an engine that has just ended may take to be free again."""


def import_ray() -> Any:
    """Ray itself.

    Raises:
        InvalidRequest: it is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"{PARAM} 'ray' needs Ray, which is not installed here ({error}): pip install 'shuteye[ray]' on every "
            "machine, or use 'mp' for ranks of one machine.",
            param=PARAM,
        ) from error
    return ray


class RayCluster:
    """A connection to a cluster: that RAY_ADDRESS names, or that runs on this machine, or a new one for us alone.

    Raises:
        InvalidRequest: there is no Ray, or no cluster where one was promised.
    """

    def __init__(self) -> None:
        self._ray = ray = import_ray()
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            try:
                ray.init(logging_level="warning")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InvalidRequest(
                    f"{PARAM} 'ray' finds no Ray cluster, and can start none: {error} Start one with `ray start "
                    "--head`, and give its address in RAY_ADDRESS; one with tokens also wants RAY_AUTH_MODE=token.",
                    param=PARAM,
                ) from error
        here = ray.get_runtime_context().get_node_id()
        self.here = next(machine for machine in self.machines() if machine.node_id == here)

    def machines(self) -> list[Machine]:
        """The machines that are up."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        free = self._free_cpus()
        found = []
        for node in nodes:
            cpus = node["Resources"].get("CPU", 0.0)
            left = free.get(node["NodeID"], {}).get("CPU", 0.0) if free is not None else cpus
            found.append(Machine(node["NodeID"], node["NodeManagerAddress"], int(left), int(cpus)))
        return sorted(found, key=lambda machine: machine.address)

    @staticmethod
    def _free_cpus() -> dict[str, dict[str, float]] | None:
        """By machine; None where this version of Ray does not tell, as there is no public function for it."""
        try:
            from ray._private.state import available_resources_per_node
        except ImportError:
            return None
        found: dict[str, dict[str, float]] = available_resources_per_node()
        return found

    def place(self, places: Sequence[RankPlace], config: EngineConfig) -> Placement:
        """Where ranks are to be; see `ray_placement.place`."""
        deadline = time.monotonic() + _FREE_S
        while True:
            try:
                return place(places, self.machines(), wanted=config.ray_placement, num_threads=config.num_threads)
            except InvalidRequest:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.2)

    def close(self) -> None:
        """End the connection, and the cluster with it if it was started for it. Idempotent."""
        if self._is_ours:
            self._ray.shutdown()
            self._is_ours = False


class Room:
    """CPUs that are reserved for ranks: a placement group, which ends with the engine's process at the latest.

    Raises:
        InvalidRequest: others were faster.
    """

    def __init__(self, placement: Placement, name: str) -> None:
        from ray.util.placement_group import placement_group

        self.placement = placement
        bundles = [{"CPU": float(cpus)} for cpus in placement.cpus]
        self._group = placement_group(bundles, strategy=placement.strategy, name=name)
        if not self._group.wait(_ROOM_S):
            self.close()
            raise InvalidRequest(
                f"Ray has not reserved {' + '.join(map(str, placement.cpus))} CPUs ({placement.strategy}) within "
                f"{_ROOM_S:g} s, although they were free: something else has taken them. `ray status` shows it; try "
                "again.",
                param=PARAM,
            )

    def machine_of_bundles(self, machines: Sequence[Machine]) -> dict[int, Machine]:
        """Where each bundle is now, which changes when a machine is lost.

        Raises:
            EngineNotReady: one is nowhere.
        """
        from ray.util.placement_group import placement_group_table

        by_id = {machine.node_id: machine for machine in machines}
        deadline = time.monotonic() + _ROOM_S
        while True:
            where = placement_group_table(self._group)["bundles_to_node_id"]
            if all(node_id in by_id for node_id in where.values()):
                return {bundle: by_id[node_id] for bundle, node_id in where.items()}
            if time.monotonic() >= deadline:
                raise EngineNotReady(
                    "A machine of the Ray cluster is lost, and no other one has "
                    f"{' + '.join(map(str, self.placement.cpus))} CPUs free ({self.placement.strategy}). `ray status` "
                    "shows what is there; bring a machine back, then wake the model again."
                )
            time.sleep(0.2)

    def options(self, rank: int) -> dict[str, Any]:
        """Of an actor that is to use its part."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "num_cpus": self.placement.cpus_per_rank,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self.placement.bundle_of(rank)
            ),
        }

    def close(self) -> None:
        """Give the CPUs back. Idempotent."""
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(Exception):  # the cluster is gone, and the room with it
            remove_placement_group(self._group)
