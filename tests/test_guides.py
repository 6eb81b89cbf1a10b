"""The README and the guides, followed by a reader who types all of it (`docs_reader.py`)."""

import re

import pytest
from docs_reader import ROOT, Reader, blocks_of

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
FOLLOWED = [page for page in PAGES if page.stem != "ray-serve"]  # that one by tests/ray_serve/test_ray_guide.py


@pytest.fixture
def reader(tiny_checkpoint, tiny_shuteye, core_cache, tmp_path):
    reader = Reader(checkpoint=tiny_checkpoint, cache_dir=core_cache, directory=tmp_path)
    yield reader
    reader.close()


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_the_page_works_from_top_to_bottom(page, reader):
    """A command, a flag, a call or an address that does not do what its page says."""
    reader.follow(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_not_run_says_why(page):
    """A block that is skipped because of a typing error in its mark, or in the name of its language."""
    typed = [block for block in blocks_of(page) if block.language in {"sh", "python"}]
    assert 2 * sum(block.is_run for block in typed) >= len(typed), "hardly anything of this page is run"
    for block in blocks_of(page):
        assert block.language in {"sh", "python", "json", "toml", "ini", "dockerfile", "yaml", "text"}, block.text
        assert re.fullmatch(r"(not run: .{8,}|fails|file: \S+|measured: \w+|)", block.mark), block.mark
