"""The cards say what is there: no method is called built that is not, or hidden."""

import importlib.util
import pathlib
import re

import pytest

from jmem.methods import METHODS, table

ROOT = pathlib.Path(__file__).parents[1]
BUILT = [method for method in METHODS if method.status == "built"]
PLANNED = [method for method in METHODS if method.status == "planned"]


def test_there_are_21_cards_and_no_name_is_used_twice():
    assert len(METHODS) == 21
    assert len({method.slug for method in METHODS}) == 21
    assert len({method.arxiv for method in METHODS}) == 21
    assert all(method.status in ("built", "planned") for method in METHODS)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_a_card_is_well_formed(method):
    assert method.slug.isidentifier()
    assert re.fullmatch(r"\d{4}\.\d{5}", method.arxiv)
    assert "\n" not in method.idea
    assert "|" not in method.title + method.idea  # would end a cell of the table


@pytest.mark.parametrize("method", BUILT, ids=lambda method: method.slug)
def test_a_built_method_has_all_its_parts(method):
    assert importlib.util.find_spec(method.module), f"no module {method.module}"
    assert importlib.util.find_spec(method.experiment), f"no {method.experiment}"
    configs = ROOT / "configs" / method.slug
    assert (configs / "claims.toml").is_file()
    assert [path for path in configs.glob("*.toml") if path.name != "claims.toml"]
    assert (ROOT / "tests" / method.family / f"test_{method.slug}.py").is_file()
    for kernel in method.kernels:
        assert (ROOT / "kernels" / kernel / "reference.py").is_file()


@pytest.mark.parametrize("method", PLANNED, ids=lambda method: method.slug)
def test_a_planned_method_has_no_module_yet(method):
    place = ROOT.joinpath(*method.module.split("."))
    assert not place.with_suffix(".py").exists(), "it is there: set status='built'"
    assert not place.is_dir(), "it is there: set status='built'"
    assert not (ROOT / "experiments" / f"{method.slug}.py").exists()


def test_claims_are_of_a_method_or_compare_a_family_or_predictions():
    slugs = {path.parent.name for path in ROOT.glob("configs/*/claims.toml")}
    families = {method.family for method in BUILT}
    assert slugs <= {method.slug for method in METHODS} | families | {"memory"}


def test_the_readme_shows_the_cards():
    text = (ROOT / "README.md").read_text()
    shown = re.search(
        r"<!-- methods:begin -->\n(.*?)\n<!-- methods:end -->", text, re.S
    )
    assert shown is not None, "README.md has lost the markers of its methods table"
    assert shown[1] == table(), "write it again: python -m experiments.claims --table"
