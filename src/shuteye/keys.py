"""Which API keys a request can carry: those that fit into a header as they are.

Knows nothing of who checks them. No message ever holds a key.
"""

from __future__ import annotations

from shuteye.errors import InvalidRequest


def require_sendable(name: str, key: str) -> None:
    """Refuse a key that no client can send.

    Raises:
        InvalidRequest: it is empty, or has spaces around it or a line break in it; `param` is `name`.
    """
    if not key.strip():
        raise InvalidRequest(f"{name} must not be empty; leave it out to use no key.", param=name)
    if key != key.strip() or not key.isprintable():
        raise InvalidRequest(
            f"{name} begins or ends with a space, or holds a line break or the like, which no client can send; "
            "was it read from a file with its last line break?",
            param=name,
        )
