"""docs/reference/routes.md, compatibility.md, metrics.md and errors.md against the code."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference():
    """tools/server_reference.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("server_reference", ROOT / "tools" / "server_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_pages_say_what_the_code_says(reference):
    """Catches a route, metric or error that was added or changed without `make docs`."""
    pages = reference.render()
    assert len(pages) == 4
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make docs`"
        assert "|  |\n" not in text, f"{path.name}: a row says nothing"


@pytest.mark.parametrize(
    ("routes", "message"),
    [({"GET /new", "GET /ours"}, "does not say who else has GET /new"), (set(), "lists as ours GET /ours")],
    ids=["new", "gone"],
)
def test_no_route_is_without_a_word_on_who_else_has_it(reference, routes, message):
    """A route that is added, or removed, with the table of others left as it was."""
    with pytest.raises(SystemExit, match=message):
        reference.require_told(routes, known={"GET /ours", "GET /theirs"}, own={"GET /ours"})
