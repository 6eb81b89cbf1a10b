"""docs/reference/routes.md, metrics.md and errors.md against the code."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_pages_say_what_the_code_says():
    """Catches a route, metric or error that was added or changed without `make docs`."""
    spec = importlib.util.spec_from_file_location("server_reference", ROOT / "tools" / "server_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages = module.render()
    assert len(pages) == 3
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make docs`"
        assert "|  |\n" not in text, f"{path.name}: a row says nothing"
