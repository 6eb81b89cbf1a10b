"""Where a model is in its life, and the legal moves from there: an enum and one table."""

from __future__ import annotations

from enum import Enum

from shuteye.errors import InternalError


class Phase(Enum):
    """`FALLING_ASLEEP` goes from awake to asleep, `DEEPENING` from one depth of sleep to a deeper one."""

    ASLEEP = "asleep"
    WAKING = "waking"
    AWAKE = "awake"
    FALLING_ASLEEP = "falling_asleep"
    DEEPENING = "deepening"

    @property
    def in_transition(self) -> bool:
        """True from the action that begins a wake or sleep to the event that ends it."""
        return self not in (Phase.ASLEEP, Phase.AWAKE)


class Move(Enum):
    """What can happen to a model; `LOSE` is the end of its process without being asked."""

    WAKE = "wake"
    SLEEP = "sleep"
    FINISH = "finish"
    FAIL = "fail"
    LOSE = "lose"


MOVES: dict[tuple[Phase, Move], Phase] = {
    (Phase.ASLEEP, Move.WAKE): Phase.WAKING,
    (Phase.ASLEEP, Move.SLEEP): Phase.DEEPENING,
    (Phase.AWAKE, Move.SLEEP): Phase.FALLING_ASLEEP,
    (Phase.WAKING, Move.FINISH): Phase.AWAKE,
    (Phase.WAKING, Move.FAIL): Phase.ASLEEP,
    (Phase.FALLING_ASLEEP, Move.FINISH): Phase.ASLEEP,
    (Phase.FALLING_ASLEEP, Move.FAIL): Phase.AWAKE,
    (Phase.DEEPENING, Move.FINISH): Phase.ASLEEP,
    (Phase.DEEPENING, Move.FAIL): Phase.ASLEEP,
    **{(phase, Move.LOSE): Phase.ASLEEP for phase in Phase},
}


def after(phase: Phase, move: Move, *, model: str) -> Phase:
    """Where `move` leads.

    Raises:
        InternalError: nowhere; names `model`.
    """
    reached = MOVES.get((phase, move))
    if reached is None:
        raise InternalError(f"The model {model} is {phase.value}: it cannot {move.value} from there.")
    return reached
