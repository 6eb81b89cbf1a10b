"""Ranks on two machines of a Ray cluster: network namespaces that a cable joins. Run with `make test-ray`, as root."""

import signal
from contextlib import ExitStack

import pytest
from ray_harness import is_alive, opening, ray_driver, until
from ray_nodes import OtherMachine, RayNode, can_make_machines, start_head, wait_for_nodes
from transformers import AutoModelForCausalLM

from shuteye.calls import ReloadCall, SleepCall, UpdateCall, WakeCall
from shuteye.errors import EngineFaulted
from shuteye.executors.frames import HandedRegion, NetworkMeeting
from shuteye.testing import tiny_model

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not can_make_machines(), reason="network namespaces need root and iproute2"),
]

PROMPT = (5, 300, 9, 11, 60)
PORT = 6397
SOON_S = 3.0
SILENT_S = 9.0


class Cluster:
    """This machine, and another one."""

    def __init__(self, stack, connect, faults):
        self.faults = faults
        self._stack = stack
        self.cable = OtherMachine()
        stack.callback(self.cable.close)
        self._environment = {"FAULTS": str(faults)}
        self.head = start_head(address=self.cable.here, port=PORT, num_cpus=2, **self._environment)
        stack.callback(self.head.close)
        self.head.wait_until_up()
        self.ray = stack.enter_context(connect())
        self.start_other()

    def start_other(self):
        self.other = RayNode(
            f"--address={self.cable.here}:{PORT}",
            f"--node-ip-address={self.cable.address}",
            "--num-cpus=2",
            namespace=self.cable.name,
            **self._environment,
        )
        self._stack.callback(self.other.close)
        wait_for_nodes(self.ray, 2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with ray_driver(f"{OtherMachine.HERE}:{PORT}") as connect, ExitStack() as stack:
        yield Cluster(stack, connect, tmp_path_factory.mktemp("faults"))


@pytest.fixture
def open_spread(cluster, config):
    with opening(config, cluster.faults) as open_them:
        yield lambda layout: open_them(layout, ray_placement="spread")


@pytest.fixture
def expected(harness):
    """What one rank gives."""
    return harness.generate(PROMPT)


def points(ranks):
    """How ranks meet, by group."""
    executor = ranks.executor
    meetings = [executor._groups.meeting(place) for place in executor._places]
    return [{type(point) for point in one} for one in zip(*((m.tensor, m.pipeline) for m in meetings), strict=True)]


@pytest.mark.parametrize(
    ("layout", "meet"),
    [
        ("TP 2", [{NetworkMeeting}, {type(None)}]),
        ("PP 2", [{type(None)}, {NetworkMeeting}]),
        ("TP 2 x PP 2", [{HandedRegion}, {NetworkMeeting}]),
    ],
)
def test_ranks_of_two_machines_are_as_one(cluster, open_spread, harness, expected, tmp_path, layout, meet):
    """Would catch ranks that are all here, other tokens than one rank's, and updates that stay on this machine."""
    ranks = open_spread(layout)
    last = ranks.executor.num_ranks - 1
    assert [ranks.machine(0), ranks.machine(last)] != [ranks.machine(0)] * 2
    assert points(ranks) == meet
    assert ranks.generate(PROMPT) == expected
    for level in (1, 2):
        assert ranks.call(SleepCall(level)).freed_bytes > 0
        ranks.call(WakeCall())
        assert ranks.generate(PROMPT) == expected
    state = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "model", seed=7)).state_dict()
    tensors = {name: tensor.clone() for name, tensor in state.items() if name != "lm_head.weight"}
    harness.call(UpdateCall(tensors.items()))
    ranks.call(SleepCall(2))
    ranks.call(WakeCall(tags=["weights"]))
    assert ranks.call(UpdateCall(tensors.items())).missing == ()
    ranks.call(WakeCall())
    assert ranks.generate(PROMPT) == harness.generate(PROMPT) != expected
    ranks.call(ReloadCall())
    assert ranks.generate(PROMPT) == expected
    ranks.plan_fault(last, "execute kill")
    ranks.add("kept", PROMPT)
    assert ranks.wait_for_fault(SOON_S) == f"rank {last} was ended by SIGKILL, on {ranks.machine(last)}"
    ranks.wake()
    ranks.run()
    assert ranks.tokens["kept"] == expected


@pytest.mark.parametrize("when", ["idle", "asleep", "in a step"])
def test_a_cable_that_is_pulled_out_is_noticed(cluster, open_spread, expected, when):
    """Would catch an engine that waits for Ray, which takes more than a minute, and ranks that go on without it."""
    ranks = open_spread("TP 2")
    away = next(rank for rank in (0, 1) if ranks.machine(rank) == cluster.cable.address)
    if when == "asleep":
        ranks.call(SleepCall(1))
    process = ranks.pid(away)
    cluster.cable.pull_out()
    try:
        if when == "in a step":
            ranks.add("kept", PROMPT)
        says = ranks.wait_for_fault(SILENT_S)
        assert f"rank {away} has lost its connection to the engine" in says
        assert says.endswith(f", on {cluster.cable.address}")
        with pytest.raises(EngineFaulted):
            ranks.call(SleepCall(2))
        until(lambda: not is_alive(process))
    finally:
        cluster.cable.plug_in()
    ranks.wake()
    ranks.run()
    assert ranks.tokens.get("kept", expected) == expected
    assert ranks.generate(PROMPT) == expected


def test_a_machine_that_is_lost_is_noticed_and_another_takes_its_place(cluster, open_spread, expected):
    """Would catch ranks that are started only where they were."""
    ranks = open_spread("PP 2")
    away = next(rank for rank in (0, 1) if ranks.machine(rank) == cluster.cable.address)
    ranks.call(SleepCall(1))
    cluster.other.kill()
    says = ranks.wait_for_fault(SOON_S)
    assert says.startswith(f"rank {away} ")
    assert says.endswith(f", on {cluster.cable.address}")
    cluster.start_other()
    ranks.wake()
    assert ranks.generate(PROMPT) == expected
    ranks.kill(1 - away, signal.SIGKILL)
    assert ranks.wait_for_fault(SOON_S) == f"rank {1 - away} was ended by SIGKILL, on {cluster.cable.here}"
    ranks.wake()
    assert ranks.generate(PROMPT) == expected
