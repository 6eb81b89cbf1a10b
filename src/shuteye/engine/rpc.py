"""Which verbs of a worker `collective_rpc` may call, and with which arguments.

Knows nothing of workers. Only verbs that change nothing: others would go behind the sleep controller's back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from shuteye.errors import InvalidRequest
from shuteye.plans import VerifyMode

_NO_ARGUMENTS: tuple[tuple[Any, ...], ...] = ((),)

RPC_VERBS: Mapping[str, tuple[tuple[Any, ...], ...]] = {
    "facts": _NO_ARGUMENTS,
    "missing": _NO_ARGUMENTS,
    "residual_bytes": _NO_ARGUMENTS,
    "states": _NO_ARGUMENTS,
    "verify": tuple((mode,) for mode in get_args(VerifyMode)),
    "weights_source": _NO_ARGUMENTS,
}


def check_rpc(verb: str, args: tuple[Any, ...]) -> None:
    """Refuse what may not be called.

    Raises:
        InvalidRequest: names the verbs, or the arguments, that may be used.
    """
    allowed = RPC_VERBS.get(verb)
    if allowed is None:
        raise InvalidRequest(
            f"collective_rpc cannot call {verb!r}; it can call {', '.join(RPC_VERBS)}.", param="method"
        )
    if args not in allowed:
        listed = " or ".join(str(list(one)) for one in allowed)
        raise InvalidRequest(f"args of {verb!r} must be {listed}, got {list(args)}.", param="args")
