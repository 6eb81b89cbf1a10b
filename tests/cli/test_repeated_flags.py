"""Flags of `shuteye serve` that are given twice, as scripts do that add to a line of somebody else's."""

import pytest

from shuteye.cli import main as cli
from shuteye.cli.serve import last_of_each


def order_of(line):
    """What a command line asks to be served."""
    orders = []
    assert cli.run(["serve", *line.split()], serving=lambda order: orders.append(order) or 0) == 0
    return orders[0]


def test_the_last_of_a_flag_counts():
    """A server that does not start, as vLLM's would, or one on the port that was meant to be replaced."""
    order = order_of("m --port 1 --max-model-len=64 --no-canary --port=2 --dev-mode --max-model-len 128 --canary")
    assert (order.server.port, order.server.dev_mode) == (2, True)
    (engine,) = order.engines
    assert (engine.model, engine.max_model_len, engine.canary) == ("m", 128, True)


def test_another_name_of_a_flag_is_the_same_flag():
    """Two values for one field, of which nobody knows which one counts."""
    assert order_of("--shutdown-grace-s 3 --shutdown-timeout 4").server.shutdown_grace_s == 4


def test_flags_of_many_values_and_values_like_flags_are_left_alone():
    """Origins that are lost, or a key that is taken for a flag."""
    order = order_of("--allowed-origins http://a http://b --api-key=--port --port 5")
    assert (order.server.allowed_origins, order.server.api_key) == (("http://a", "http://b"), "--port")
    assert order.server.port == 5


@pytest.mark.parametrize("line", ["--port", "m --nonsense 1 --nonsense 2", "--", ""])
def test_what_is_no_flag_of_ours_is_left_to_be_refused(line):
    """A line that is made right by leaving out what is wrong in it."""
    assert last_of_each(line.split()) == line.split()
