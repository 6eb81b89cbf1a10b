"""Command lines run as a program runs them, without the settings of whoever runs the tests."""

from __future__ import annotations

import os
import sys
import types

import pytest

from shuteye.cli import main as cli


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """Variables of whoever runs the tests must not reach them."""
    for name in list(os.environ):
        if name.startswith(("SHUTEYE_", "VLLM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def served(monkeypatch):
    """Runs `shuteye serve` with a recorder in the server's place; returns what it was given."""
    calls = []
    fake = types.ModuleType("shuteye.server.launch")
    fake.serve = lambda order: calls.append((*order.engines, order.server, order.fleet)) or 7
    monkeypatch.setitem(sys.modules, "shuteye.server.launch", fake)

    def run(*arguments):
        calls.clear()
        assert cli.run(["serve", *arguments]) == 7, "the server's exit status is lost"
        return calls[0]

    return run
