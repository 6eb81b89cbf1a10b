"""With what a process computes: which of the native kernels' instruction sets, and how many threads. No torch."""

from __future__ import annotations

from shuteye import native
from shuteye.errors import InvalidRequest


def use_kernels(kernels: str, num_threads: int) -> bool:
    """Have the native kernels use an instruction set and threads; whether they are to be used at all.

    Args:
        kernels: as of `EngineConfig`.

    Raises:
        InvalidRequest: the set cannot run here.
    """
    if kernels == "torch":
        return False
    reason = native.unavailable_reason()
    if kernels != "auto" and reason is None:
        try:
            native.set_level(kernels)
        except ValueError as error:
            reason = str(error)
    if kernels != "auto" and reason is not None:
        raise InvalidRequest(f"kernels={kernels!r} cannot be used: {reason}. Leave it at 'auto'.", param="kernels")
    if reason is None:
        native.set_num_threads(num_threads)
    return True
