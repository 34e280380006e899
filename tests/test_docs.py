"""Every snippet of the documentation runs, and prints what the page says."""

import doctest
import pathlib

import pytest

DOCS = sorted((pathlib.Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_snippets_print_what_the_page_says(page, monkeypatch, tmp_path):
    import jax

    monkeypatch.chdir(tmp_path)
    # The pages are written as their readers write: ranks may be promoted.
    with jax.numpy_rank_promotion("allow"):
        failed, ran = doctest.testfile(str(page), module_relative=False)
    assert ran > 0
    assert failed == 0
