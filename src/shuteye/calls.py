"""Control calls as data: what each takes, what it answers; Python, HTTP and the command line are made of these.

A new call is a Struct here, listed in `ControlCall` and in the two classes of methods at the end; `engine.transitions`
carries it out, `server.control.routes` serves it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import (
    Annotated,
    Any,
    ClassVar,
    Concatenate,
    Generic,
    ParamSpec,
    TypeVar,
    cast,
    get_args,
    get_type_hints,
)

import msgspec

from shuteye.errors import InvalidRequest
from shuteye.state import TAGS, DrainMode, SleepReport, UpdateReport, WakeReport

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
P = ParamSpec("P")

Tags = Annotated[
    Sequence[str] | None, msgspec.Meta(description=f"Only these: {' or '.join(TAGS)}; all of them unless given.")
]
Mode = Annotated[
    str | None,
    msgspec.Meta(
        description="Requests in flight: abort ends them, wait lets them finish, keep resumes them afterwards. The "
        "engine's default_sleep_mode unless given.",
        extra={"choices": get_args(DrainMode)},
    ),
]
TimeoutS = Annotated[
    float | None,
    msgspec.Meta(description="How many seconds wait waits; the engine's drain_timeout_s unless given."),
]


class Call(msgspec.Struct, Generic[R_co], frozen=True):
    """What is asked of an engine as a whole; answered by an `R_co`.

    Attributes:
        verb: its name in metrics, logs and paths.
    """

    verb: ClassVar[str]


class SleepCall(Call[SleepReport], frozen=True, tag="sleep"):
    """Give memory back; see `docs/sleep.md` for levels, tags and modes.

    Raises:
        InvalidRequest, TransitionConflict, SleepFailed, DrainTimeout: still awake.
        EngineFaulted: releasing failed half-way; `wake_up` recovers.
    """

    verb: ClassVar[str] = "sleep"

    level: Annotated[
        int,
        msgspec.Meta(
            description="0 only pauses; 1 gives memory back and keeps the weights restorable; 2 forgets them too.",
            extra={"choices": (0, 1, 2)},
        ),
    ] = 1
    mode: Mode = None
    tags: Tags = None
    timeout_s: TimeoutS = None

    def __post_init__(self) -> None:
        _fix_tags(self)


class WakeCall(Call[WakeReport], frozen=True, tag="wake_up"):
    """Map, fill and verify memory again.

    Raises:
        TransitionConflict, WakeFailed, VerificationFailed: still asleep.
        EngineFaulted: rolling back failed too; try again.
    """

    verb: ClassVar[str] = "wake_up"

    tags: Tags = None

    def __post_init__(self) -> None:
        _fix_tags(self)


class UnloadCall(Call[SleepReport], frozen=True, tag="unload"):
    """Give everything back, the engine's process included; the next `wake_up` starts one that serves the same weights.

    Weights that were updated are forgotten, as at level 2. Carried out by whoever has the process.

    Raises:
        InvalidRequest, TransitionConflict, DrainTimeout: still awake.
        EngineFaulted: releasing failed half-way; `wake_up` recovers.
    """

    verb: ClassVar[str] = "unload"

    mode: Annotated[
        str | None,
        msgspec.Meta(
            description="Requests in flight: abort ends them, wait lets them finish. The engine's default_sleep_mode "
            "unless given; keep, which needs the process, counts as wait.",
            extra={"choices": ("abort", "wait")},
        ),
    ] = None
    timeout_s: TimeoutS = None


class PauseCall(Call[None], frozen=True, tag="pause"):
    """Close the gate without giving memory back, until `resume`.

    Requests that arrive meanwhile raise `ModelPaused`; after mode `keep` they wait.

    Raises:
        InvalidRequest, DrainTimeout: nothing was paused.
    """

    verb: ClassVar[str] = "pause"

    mode: Mode = None
    timeout_s: TimeoutS = None


class ResumeCall(Call[None], frozen=True, tag="resume"):
    """Lift a pause.

    Raises:
        TransitionConflict: asleep.
    """

    verb: ClassVar[str] = "resume"


class UpdateFromFileCall(Call[UpdateReport], frozen=True, tag="update_weights"):
    """Write every tensor of a safetensors file, or of all such files in a directory.

    Requests in flight are recomputed with the new weights.

    Raises:
        InvalidRequest: no file that the engine can read, an unknown name or a wrong shape; the message says how many
            tensors were written before it.
        TransitionConflict: the weights are not mapped.
    """

    verb: ClassVar[str] = "update_weights"

    path: Annotated[str, msgspec.Meta(min_length=1, description="On the host of the engine.")]

    def __post_init__(self) -> None:
        _require_path(self.path)


class UpdateCall(Call[UpdateReport], frozen=True, tag="update_tensors"):
    """`UpdateFromFileCall` with pairs of checkpoint name and tensor, when caller and engine share a process."""

    verb: ClassVar[str] = "update_weights"

    named_tensors: Any


class ReloadCall(Call[UpdateReport], frozen=True, tag="reload_weights"):
    """Load every weight again from the image, or from another checkpoint of the same model.

    Raises:
        InvalidRequest: the checkpoint differs in more than the values of its weights; nothing has changed.
        ImageFailure: the image, or the checkpoint's, is damaged; nothing has changed.
        TransitionConflict: the weights are not mapped.
    """

    verb: ClassVar[str] = "reload_weights"

    path: Annotated[
        str | None, msgspec.Meta(description="A checkpoint; the image that was loaded last unless given.")
    ] = None

    def __post_init__(self) -> None:
        if self.path is not None:
            _require_path(self.path)


class ResetPrefixCacheCall(Call[None], frozen=True, tag="reset_prefix_cache"):
    """Forget all cached prefixes."""

    verb: ClassVar[str] = "reset_prefix_cache"


class RpcCall(Call[list[Any]], frozen=True, tag="collective_rpc"):
    """Call a worker verb on every rank; one result a rank.

    It may be one that changes nothing (see `engine.transitions.RPC_VERBS`), or `reload_weights`, which may take a path.

    Raises:
        InvalidRequest: another verb, or other arguments than it takes.
        ShuteyeError: as `ReloadCall`, of `reload_weights`.
    """

    verb: ClassVar[str] = "collective_rpc"

    method: str
    args: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if isinstance(self.args, str) or not isinstance(self.args, Iterable):
            raise InvalidRequest(f"args must be a list, got {self.args!r}.", param="args")
        msgspec.structs.force_setattr(self, "args", tuple(self.args))


ControlCall = (
    SleepCall
    | WakeCall
    | PauseCall
    | ResumeCall
    | UpdateFromFileCall
    | UpdateCall
    | ReloadCall
    | ResetPrefixCacheCall
    | RpcCall
)


def _fix_tags(call: SleepCall | WakeCall) -> None:
    """Tags as a tuple. One string is refused, or its letters would be taken for tags."""
    if isinstance(call.tags, str) or not isinstance(call.tags, Iterable | None):
        raise InvalidRequest(f"tags must be a list of strings, got {call.tags!r}.", param="tags")
    if call.tags is not None:
        msgspec.structs.force_setattr(call, "tags", tuple(call.tags))


def _require_path(path: object) -> None:
    if not isinstance(path, str) or not path:
        raise InvalidRequest(f"path must be a non-empty text, got {path!r}.", param="path")


# --- methods made of calls ----------------------------------------------------------------------


def blocking(kind: Callable[P, Call[R]], **aliases: str) -> Callable[Concatenate[Any, P], R]:
    """A method with the parameters of a call; its class has `control`.

    Args:
        aliases: older names of parameters, each with the present one.
    """

    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        report: R = self.control(kind(*args, **_renamed(kwargs, aliases)))
        return report

    return _documented(method, kind)


def awaitable(kind: Callable[P, Call[R]], **aliases: str) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """`blocking`, awaitable."""

    async def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        report: R = await self.control(kind(*args, **_renamed(kwargs, aliases)))
        return report

    return _documented(method, kind)


def _renamed(given: Any, aliases: dict[str, str]) -> Any:
    for alias, name in aliases.items():
        if alias in given and name in given:
            raise TypeError(f"{alias} is the older name of {name}: give one of them")
    return {aliases.get(name, name): value for name, value in given.items()}


M = TypeVar("M", bound=Callable[..., Any])


def _documented(method: M, kind: Any) -> M:
    """`method` with the signature and the documentation of the call, each parameter's included."""
    parameters = inspect.signature(kind).parameters.values()
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__name__ = method.__qualname__ = kind.verb
    method.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    summary, _, rest = inspect.cleandoc(kind.__doc__).partition("\n\n")
    lines = [f"    {name}: {note.description}" for name, note in notes_of(kind).items()]
    method.__doc__ = "\n\n".join(
        part for part in (summary, "\n".join(["Args:", *lines]) if lines else "", rest) if part
    )
    return method


def report_of(kind: type[Call[R]]) -> type[R]:
    """What a call is answered with, by its declaration: a class, `list[Any]` or None's type."""
    (report,) = get_args(kind.__orig_bases__[0])  # type: ignore[attr-defined]
    return cast(type[R], report)


def notes_of(kind: type[Call[Any]]) -> dict[str, msgspec.Meta]:
    """What is said of a call's fields: a description, and in `extra` the `choices` if there are few."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


class Controls(ABC):
    """The control calls as methods, for callers who wait."""

    @abstractmethod
    def control(self, call: Call[R]) -> R:
        """Carry out a call."""

    sleep = blocking(SleepCall, drain_timeout_s="timeout_s")
    wake_up = blocking(WakeCall)
    unload = blocking(UnloadCall)
    pause = blocking(PauseCall, drain_timeout_s="timeout_s")
    resume = blocking(ResumeCall)
    update_weights_from_file = blocking(UpdateFromFileCall)
    reload_weights = blocking(ReloadCall)
    reset_prefix_cache = blocking(ResetPrefixCacheCall)
    collective_rpc = blocking(RpcCall)


class AsyncControls(ABC):
    """The control calls as methods, awaitable."""

    @abstractmethod
    async def control(self, call: Call[R]) -> R:
        """Carry out a call."""

    sleep = awaitable(SleepCall, drain_timeout_s="timeout_s")
    wake_up = awaitable(WakeCall)
    unload = awaitable(UnloadCall)
    pause = awaitable(PauseCall, drain_timeout_s="timeout_s")
    resume = awaitable(ResumeCall)
    update_weights_from_file = awaitable(UpdateFromFileCall)
    reload_weights = awaitable(ReloadCall)
    reset_prefix_cache = awaitable(ResetPrefixCacheCall)
    collective_rpc = awaitable(RpcCall)
