"""Prompts of an exact number of tokens, each unlike any other, the same for every engine.

Knows only a tokenizer.json.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from tokenizers import Tokenizer

_WORD = re.compile(r"Ġ[a-z]{3,9}")


class Prompts:
    """Words that are one token each; two writers with one seed write the same prompts in the same order."""

    def __init__(self, tokenizer: Path, seed: str) -> None:
        vocab = json.loads(tokenizer.read_text())["model"]["vocab"]
        self._words = sorted(word.replace("Ġ", " ") for word in vocab if _WORD.fullmatch(word))
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._random = random.Random(seed)

    def write(self, num_tokens: int) -> str:
        """The next prompt."""
        while True:
            text = "".join(self._random.choices(self._words, k=num_tokens))
            if len(self._tokenizer.encode(text, add_special_tokens=False).ids) == num_tokens:
                return text

    def several(self, count: int, num_tokens: int) -> list[str]:
        return [self.write(num_tokens) for _ in range(count)]
