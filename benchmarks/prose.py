"""A fixed text in English, about 24,000 tokens of SmolLM2's: the prose of mpmath's documentation, checked by its hash.

It comes with a package that requirements/lock.txt pins to one version for every Python (mpmath's licence is BSD), and
is too little known to be known by heart.
"""

from __future__ import annotations

import ast
import hashlib
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

MPMATH = "1.3.0"
SHA256 = "86c91b259700065b80175d41c9c362ff3a3b254d5256acefdd315bac3eac4847"
SHORTEST = 60
"""Characters; a shorter paragraph is a heading or the name of an example."""
PROSE = 0.78
"""Share of letters and spaces from which on a paragraph is prose rather than formulas and digits."""


def fixed_text() -> str:
    """The text.

    Raises:
        SystemExit: mpmath is not there, or another version of it gives another text.
    """
    found = find_spec("mpmath")
    if found is None or found.origin is None:
        raise SystemExit(f"The text is mpmath's documentation, which is not installed: pip install mpmath=={MPMATH}")
    source = (Path(found.origin).parent / "function_docs.py").read_text(encoding="utf-8")
    text = "\n\n".join(paragraph for docstring in docstrings(source) for paragraph in paragraphs(docstring))
    if (seen := hashlib.sha256(text.encode()).hexdigest()) != SHA256:
        raise SystemExit(
            f"The text has hash {seen}, not {SHA256}, as mpmath {version('mpmath')} is installed: "
            f"pip install mpmath=={MPMATH}"
        )
    return text


def docstrings(source: str) -> list[str]:
    """Strings that a module assigns to names, in order."""
    values = (node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return [each.value for each in values if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def paragraphs(docstring: str) -> list[str]:
    """Those of prose, each on one line: no examples, no formulas standing alone."""
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring))
    return [text for text in joined if len(text) >= SHORTEST and ">>>" not in text and _letters(text) >= PROSE]


def _letters(text: str) -> float:
    return sum(each.isalpha() or each == " " for each in text) / len(text)
