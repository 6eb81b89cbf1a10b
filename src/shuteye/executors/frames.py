"""What passes between the engine and a rank process, each frame typed: the verb says what its arguments and result are.

No torch: the engine's side needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from shuteye.config import EngineConfig
from shuteye.errors import ErrorInfo
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
    WakeEstimate,
    WakePlan,
)
from shuteye.tasks.generate.plans import StepPlan, StepResult
from shuteye.typed_frames import Decoder, encode


class HeldRegion(msgspec.Struct, frozen=True, tag=True):
    """Shared memory that the engine process holds: ranks of its machine open `path`."""

    path: str


class HandedRegion(msgspec.Struct, frozen=True, tag=True):
    """Shared memory that the first rank of a group makes and hands to the others of its machine, who ask for `name`."""

    name: str


class NetworkMeeting(msgspec.Struct, frozen=True, tag=True):
    """A group of several machines: where its ranks find each other, and by which address of theirs the others do."""

    address: str
    host: str


MeetingPoint = HeldRegion | HandedRegion | NetworkMeeting


class Meeting(msgspec.Struct, frozen=True):
    """The groups of one epoch that a rank belongs to, None where there is nobody else."""

    epoch: int
    tensor: MeetingPoint | None
    pipeline: MeetingPoint | None
    timeout_s: float


class EngineAddress(msgspec.Struct, frozen=True):
    """How a rank on any machine reaches its engine: two endpoints, and the keys of both sides (CURVE, as Z85 text)."""

    asks: str
    aborts: str
    engine_key: str
    public_key: str
    secret_key: str

    def __repr__(self) -> str:
        return f"EngineAddress({self.asks}, {self.aborts}, keys not shown)"


class Start(msgspec.Struct, frozen=True):
    """What a rank process is told first, through its stdin.

    Attributes:
        engine: of a rank whose engine may be on another machine.
        cores: on which alone it may run; empty: anywhere.
        image_key: the image that another rank in this place had mapped; None if this is the first.
    """

    config: EngineConfig
    place: RankPlace
    meeting: Meeting
    cores: tuple[int, ...] = ()
    engine: EngineAddress | None = None
    image_key: str | None = None


class Abort(msgspec.Struct, frozen=True, array_like=True):
    """The groups of `epoch` are to end every wait."""

    epoch: int
    reason: str


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
    "receive": (tuple[int, bytes], str),
    "forget_received": (tuple[()], None),
    "identity": (tuple[()], RankIdentity),
    "facts": (tuple[()], ModelSpec),
    "tokenizer_files": (tuple[()], dict[str, bytes]),
    "weights_source": (tuple[()], str),
    "allocate_kv_cache": (tuple[int], None),
    "estimate_sleep": (tuple[SleepPlan], SleepEstimate),
    "save": (tuple[SleepPlan], None),
    "abort_save": (tuple[()], None),
    "release": (tuple[SleepPlan], tuple[TagReport, ...]),
    "finish_release": (tuple[SleepPlan], tuple[TagReport, ...]),
    "estimate_wake": (tuple[WakePlan], WakeEstimate),
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
