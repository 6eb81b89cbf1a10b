"""What passes between the engine and a rank process, each frame typed: the verb says what its arguments and result are.

No torch: the engine's side needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from shuteye.config import EngineConfig
from shuteye.errors import ErrorInfo
from shuteye.executors.wire import Decoder, encode
from shuteye.model_info import ModelSpec
from shuteye.parallel.shards import RankPlace
from shuteye.state import (
    RankIdentity,
    SleepEstimate,
    SleepPlan,
    TagReport,
    TagState,
    UpdateReport,
    VerifyMode,
    VerifyResult,
    WakePlan,
)
from shuteye.tasks.generate.plans import StepPlan, StepResult


class Meeting(msgspec.Struct, frozen=True):
    """The groups of one epoch that a rank belongs to: paths of their regions, None where there is nobody else."""

    epoch: int
    tensor: str | None
    pipeline: str | None
    timeout_s: float


class Start(msgspec.Struct, frozen=True):
    """What a rank process is told first, through its stdin.

    Attributes:
        cores: on which alone it may run; empty: anywhere.
    """

    config: EngineConfig
    place: RankPlace
    meeting: Meeting
    cores: tuple[int, ...] = ()


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """One of `SIGNATURES`, with its arguments."""

    call_id: int
    verb: str
    arguments: msgspec.Raw


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """What came of the ask of that `call_id`, or of the start (0)."""

    epoch: int
    call_id: int
    result: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: ErrorInfo | None = None


SIGNATURES: Mapping[str, tuple[Any, Any]] = {
    # verb → its arguments, its result: `worker.VERBS`, but `update_weights`, which becomes a file; and what the process
    # itself does
    "execute": (tuple[StepPlan], StepResult),
    "start": (tuple[()], None),
    "join": (tuple[Meeting], None),
    "identity": (tuple[()], RankIdentity),
    "facts": (tuple[()], ModelSpec),
    "weights_source": (tuple[()], str),
    "allocate_kv_cache": (tuple[int], None),
    "estimate_sleep": (tuple[SleepPlan], SleepEstimate),
    "save": (tuple[SleepPlan], None),
    "abort_save": (tuple[()], None),
    "release": (tuple[SleepPlan], tuple[TagReport, ...]),
    "finish_release": (tuple[SleepPlan], tuple[TagReport, ...]),
    "restore": (tuple[WakePlan], tuple[TagReport, ...]),
    "undo_restore": (tuple[()], None),
    "reset": (tuple[()], None),
    "verify": (tuple[VerifyMode], VerifyResult),
    "canary_agrees": (tuple[()], bool),
    "defer_canary": (tuple[()], None),
    "states": (tuple[()], tuple[TagState, ...]),
    "epoch": (tuple[()], int),
    "missing": (tuple[()], tuple[str, ...]),
    "residual_bytes": (tuple[()], int),
    "check_update": (tuple[str], None),
    "update_weights_from_file": (tuple[str, int], UpdateReport),
    "reload_weights": (tuple[str | None], UpdateReport),
}

MEETING_VERBS = frozenset({"execute", "canary_agrees"})
"""During these ranks wait for one another: whoever fails in one aborts its groups."""

ARGUMENTS: Mapping[str, Decoder[Any]] = {verb: Decoder(arguments) for verb, (arguments, _) in SIGNATURES.items()}
RESULTS: Mapping[str, Decoder[Any]] = {verb: Decoder(result) for verb, (_, result) in SIGNATURES.items()}


def ask(call_id: int, verb: str, arguments: tuple[Any, ...]) -> bytes:
    """The frame that asks a rank for `verb`."""
    assert verb in SIGNATURES, f"{verb!r} is not a verb of a rank"
    return encode(Ask(call_id, verb, msgspec.Raw(encode(arguments))))
