"""Whether a machine has room for all of its ranks."""

import pytest

from shuteye.engine.wake_room import require_room
from shuteye.errors import MemoryExhausted
from shuteye.state import WakeEstimate


def test_ranks_of_one_machine_must_fit_together():
    """Would catch two ranks each of which takes the same memory for its own."""
    fits = WakeEstimate(needed_bytes=60, available_bytes=100)
    require_room([("one", fits)])
    require_room([("one", fits), ("other", fits)])
    with pytest.raises(MemoryExhausted, match="120 bytes of memory for the ranks on one together and 100"):
        require_room([("one", fits), ("other", fits), ("one", fits)])


def test_what_needs_nothing_fits_anywhere():
    """Would catch a wake that is refused because nobody asked how much there is."""
    require_room([("one", WakeEstimate(0, 0)), ("one", WakeEstimate(50, 50))])
