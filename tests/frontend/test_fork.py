"""A fork of a process with an engine: it is told that it has none, and however it ends, the parent's engine goes on."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from shuteye.models.converter import Order, make
from shuteye.models.progress import no_progress

FORKING = Path(__file__).parents[1] / "helpers" / "fork_scenarios.py"


@pytest.mark.parametrize("kind", ["llm", "thread", "process"])
def test_a_fork_has_no_engine_and_harms_none(kind, tiny_checkpoint, tiny_options):
    """Would catch a call in a fork that never returns, and a fork whose end takes the parent's engine along."""
    make(Order(str(tiny_checkpoint), str(tiny_options["cache_dir"]), dtype="float32"), no_progress)
    options = tiny_options | {"model": str(tiny_checkpoint), "enable_sleep_mode": True, "dtype": "float32"}
    config = msgspec.json.encode(options, enc_hook=os.fspath).decode()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FORKING), kind, config], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[-1] == "the parent is well"
    children = [line for line in said if line.startswith("child:")]
    assert len(children) == 2, said
    assert all(line.startswith("child: EngineDead This engine belongs to process ") for line in children), said
