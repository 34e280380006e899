"""The documentation is true: snippets print what it says, commands and links exist."""

import doctest
import importlib.util
import pathlib
import re
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
GENERATED = ("claims",)
"""Pages without snippets; tests/experiments/test_claims.py compares with records."""
SNIPPETS = [page for page in ROOT.glob("docs/*.md") if page.stem not in GENERATED]


FILE = re.compile(r"^```python\n# ([\w/]+)\.py\n(.*?)^```$", re.S | re.M)
"""A snippet that is a whole file, whose path is its first line."""


def load_files(text: str, monkeypatch) -> None:
    """Makes the files that a page shows importable from its further snippets."""
    for path, code in FILE.findall(text):
        module = types.ModuleType(path.replace("/", "."))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, f"{path}.py", "exec"), module.__dict__)


@pytest.mark.parametrize("page", sorted(SNIPPETS), ids=lambda page: page.stem)
def test_snippets_print_what_the_page_says(page, monkeypatch, tmp_path):
    import jax

    monkeypatch.chdir(tmp_path)
    # The pages are written as their readers write: ranks may be promoted.
    with jax.numpy_rank_promotion("allow"):
        load_files(page.read_text(), monkeypatch)
        failed, ran = doctest.testfile(str(page), module_relative=False)
    assert ran > 0
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page):
    text = page.read_text()
    shown = {path.replace("/", ".") for path, _ in FILE.findall(text)}
    for module in set(re.findall(r"python -m\s+(\w[\w.]*\w)", text)) - shown:
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


def test_every_page_is_linked_from_the_readme():
    links = set(re.findall(r"\]\((docs/[\w-]+\.md)", (ROOT / "README.md").read_text()))
    assert links == {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")}
