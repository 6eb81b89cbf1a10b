"""Shows one token as text and as bytes, also when it is only part of a character.

Knows nothing of log-probabilities or HTTP.
"""

from __future__ import annotations

import re
from functools import cache

from shuteye.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_REPLACEMENT = "\ufffd"


def token_text_and_bytes(tokenizer: Tokenizer, token_id: int) -> tuple[str, bytes]:
    r"""What a token stands for; a part of a character reads `bytes:\xe2\x82`, as in OpenAI's answers."""
    text = tokenizer.token_text(token_id)
    if _REPLACEMENT not in text:
        return text, text.encode()
    raw = _raw_bytes(tokenizer.id_to_token(token_id))
    if raw is None:
        return text, text.encode()
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


def _raw_bytes(token: str | None) -> bytes | None:
    if token is None:
        return None
    if match := _BYTE_TOKEN.match(token):
        return bytes.fromhex(match[1])
    table = _byte_of_char()
    return bytes(table[char] for char in token) if all(char in table for char in token) else None


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (openai/gpt-2, encoder.py: bytes_to_unicode), reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
