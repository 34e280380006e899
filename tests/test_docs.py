"""The documentation is true: snippets print what it says, commands and links exist."""

import doctest
import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
GENERATED = ("claims",)
"""Pages without snippets; tests/experiments/test_claims.py compares with records."""
SNIPPETS = [page for page in ROOT.glob("docs/*.md") if page.stem not in GENERATED]


@pytest.mark.parametrize("page", sorted(SNIPPETS), ids=lambda page: page.stem)
def test_snippets_print_what_the_page_says(page, monkeypatch, tmp_path):
    import jax

    monkeypatch.chdir(tmp_path)
    # The pages are written as their readers write: ranks may be promoted.
    with jax.numpy_rank_promotion("allow"):
        failed, ran = doctest.testfile(str(page), module_relative=False)
    assert ran > 0
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page):
    for module in set(re.findall(r"python -m\s+(\w[\w.]*\w)", page.read_text())):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        place, _, heading = link.partition("#")
        aim = (page.parent / place) if place else page
        assert aim.exists(), link
        if heading:
            heads = re.findall(r"^#+ (.*)$", aim.read_text(), re.M)
            slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads]
            assert heading in slugs, link
