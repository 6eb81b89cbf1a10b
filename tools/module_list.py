"""Writes the list of modules in docs/structures.md: each with the first line of its docstring, a layer after the other.

Knows nothing of what modules do; `tests/test_docs.py` checks that the list is up to date.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "shuteye"
PAGE = ROOT / "docs" / "structures.md"
BEGIN, END = "<!-- modules: written by `make docs` -->\n", "<!-- end of modules -->\n"

LAYERS = {
    "Vocabulary: what every side speaks; no torch": (
        *(
            "errors",
            "typed_fields",
            "state",
            "model_info",
            "calls",
            "config",
            "processes",
            "file_locks",
            "rendezvous",
            "typed_frames",
            "handover",
            "logs",
            "tokenizer",
            "chat_template",
            "heap",
            "audio",
        ),
    ),
    "fleet/: which of many models are awake; pure": ("fleet",),
    "matrices/: how weights lie in memory": ("matrices",),
    "memory/: bytes and addresses": ("memory",),
    "native/: kernels for what torch does badly at small batch; C++ sources in `native/csrc/`": ("native",),
    "parallel/: one model over several ranks": ("parallel",),
    "cache/: the KV cache": ("cache",),
    "models/: the only package that imports transformers": ("models",),
    "tasks/: what a model can be for, one folder each": ("tasks",),
    "worker.py: one rank": ("worker",),
    "executors/: the seam between engine and ranks": ("executors",),
    "engine/: what runs next, and when the gate is open": ("engine",),
    "frontend/: the callers' side; no torch": ("frontend",),
    "server/: HTTP": ("server",),
    "cli/: the `shuteye` command; the only place that reads the environment": ("cli",),
    "ray/: replicas on Ray Serve; only `ray/deployment.py` imports Ray": ("ray",),
    "client/: for other programs; sees only errors and state": ("client",),
    "Entry points and tests' tools": ("__init__", "__main__", "testing"),
}


def render(page: str) -> str:
    """`page` with the list as it is now."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "".join(_section(title, names) for title, names in LAYERS.items()) + "\n" + END + after


def _section(title: str, names: tuple[str, ...]) -> str:
    return f"\n### {title}\n" + "".join(_line(path) for name in names for path in _modules(name))


def _modules(name: str) -> list[Path]:
    """One module, or those of a package: its own before those of packages in it."""
    package = PACKAGE / name
    if not package.is_dir():
        return [PACKAGE / f"{name}.py"]
    paths = [path for path in package.rglob("*.py") if path.name != "__init__.py" or _has_code(path)]
    return sorted(paths, key=lambda path: (len(path.relative_to(package).parts) > 1, path.parent, path.name))


def _has_code(path: Path) -> bool:
    return len(ast.parse(path.read_text(encoding="utf-8")).body) > 1


def _line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path} has no docstring"
    return f"- `{path.relative_to(PACKAGE)}` — {docstring.splitlines()[0].removesuffix('.')}\n"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
