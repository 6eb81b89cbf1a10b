"""What one HTTP request may ask for at most, refused before it is computed: sequences, text, tokens.

Knows nothing of fields. Limits of single fields are in `request.py`, those of bodies in `json_body.py`, those of
grammars and of the queue are the engine's; docs/guides/production.md lists them all.
"""

from __future__ import annotations

from shuteye.errors import InvalidRequest
from shuteye.server.config import ServerConfig

MAX_CHARACTERS = 16 * 1024 * 1024
"""Text that one request has encoded, counted as often as it is: a query that goes with every document, for one."""

MAX_PROMPT_TOKENS = 4 * 1024 * 1024
"""Prompt tokens that one request sends to the engine: each of its n sequences has a copy."""


def require_sequences(config: ServerConfig, count: int, *, param: str) -> None:
    """Refuse more sequences, or inputs, than one request may have.

    Raises:
        InvalidRequest: says how many there are and may be.
    """
    if count > config.max_request_sequences:
        raise InvalidRequest(
            f"The request asks for {count:,} sequences (prompts × n, inputs, or pairs); at most "
            f"{config.max_request_sequences:,} are taken (--max-request-sequences). Send it in parts.",
            param=param,
        )


def require_characters(count: int, *, param: str) -> None:
    """Refuse more text than is encoded for one request.

    Raises:
        InvalidRequest: says how much there is and may be.
    """
    if count > MAX_CHARACTERS:
        raise InvalidRequest(
            f"The request has {count:,} characters to encode; at most {MAX_CHARACTERS:,} are taken.", param=param
        )


def require_prompt_tokens(count: int, *, param: str) -> None:
    """Refuse more prompt tokens, over all sequences, than are sent to the engine for one request.

    Raises:
        InvalidRequest: says how many there are and may be.
    """
    if count > MAX_PROMPT_TOKENS:
        raise InvalidRequest(
            f"The request has {count:,} prompt tokens over all of its sequences; at most {MAX_PROMPT_TOKENS:,} are "
            "taken. Lower n, or send it in parts.",
            param=param,
        )
