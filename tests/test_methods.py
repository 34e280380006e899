"""The cards say what is there: no method is called built that is not, or hidden."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import pytest

from experiments.harness import claim
from jmem.methods import METHODS, UNITS, read_number, render_table

ROOT = pathlib.Path(__file__).parents[1]
BUILT = [method for method in METHODS if method.status == "built"]
PLANNED = [method for method in METHODS if method.status == "planned"]
BEGUN = [method for method in METHODS if method.status == "begun"]


def test_there_are_21_cards_and_no_name_is_used_twice():
    assert len(METHODS) == 21
    assert len({method.slug for method in METHODS}) == 21
    assert len({method.arxiv for method in METHODS}) == 21
    assert {*BUILT, *PLANNED, *BEGUN} == {*METHODS}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_a_card_is_well_formed(method):
    assert method.slug.isidentifier()
    assert re.fullmatch(r"\d{4}\.\d{5}", method.arxiv)
    assert len(method.idea.split()) <= 10
    words = method.title + method.idea + method.memory.paper + method.memory.what
    assert "\n" not in words
    assert "|" not in words  # would end a cell of the table
    assert method.memory.paper
    assert method.memory.source


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


@pytest.mark.parametrize("method", BUILT, ids=lambda method: method.slug)
def test_our_number_is_that_of_a_record_of_the_claim_as_it_stands(method):
    folder, memory = ROOT / "configs" / method.slug, method.memory
    claims = claim.read(folder / "claims.toml").by_name
    records = json.loads((folder / "records.json").read_text())
    for name in (memory.claim, *memory.against):
        assert records[name]["definition"] == claims[name].definition
        assert claims[name].unit in UNITS
    assert read_number(method)
    assert not re.search(r"\d", memory.ours), "our number is read, never written"


@pytest.mark.parametrize("method", BUILT, ids=lambda method: method.slug)
def test_the_paper_s_number_is_that_of_its_claim(method):
    folder, memory = ROOT / "configs" / method.slug, method.memory
    mine = claim.read(folder / "claims.toml").by_name[memory.claim]
    if mine.paper is not None:  # MixLoRA's claims compare forms of ours
        number = mine.paper if isinstance(mine.paper, str) else f"{mine.paper:g}"
        assert memory.paper.startswith(number)
        assert memory.confirmed == mine.confirmed


def test_our_number_follows_the_records(tmp_path):
    """Amount, share and saving of two records, 30 and 20 GB; a dash without them."""
    method = next(method for method in METHODS if method.slug == "lisa")
    memory = dataclasses.replace(
        method.memory, claim="a", against=("b",), ours="{amount}, {share}, {less}"
    )
    method = dataclasses.replace(method, memory=memory)
    assert read_number(method, tmp_path) == ""  # a wheel has no configs
    folder = tmp_path / "lisa"
    folder.mkdir()
    (folder / "claims.toml").write_text(
        '[defaults]\nunit = "GB"\n[[claim]]\nname = "a"\n[[claim]]\nname = "b"\n'
    )
    (folder / "records.json").write_text('{"a": {"value": 20000000000}}')
    assert read_number(method, tmp_path) == ""
    (folder / "records.json").write_text(
        '{"a": {"value": 20000000000}, "b": {"value": 30000000000}}'
    )
    assert read_number(method, tmp_path) == "20.0 GB, 66.7 %, 33 % less"
    memory = dataclasses.replace(memory, claim="c")
    with pytest.raises(ValueError, match="the card of lisa names the claim 'c'"):
        read_number(dataclasses.replace(method, memory=memory), tmp_path)


@pytest.mark.parametrize("method", BEGUN, ids=lambda method: method.slug)
def test_a_begun_method_has_a_page_and_its_tests(method):
    assert importlib.util.find_spec(method.module), f"no module {method.module}"
    assert (ROOT / "tests" / method.family / f"test_{method.slug}.py").is_file()


@pytest.mark.parametrize("method", [*PLANNED, *BEGUN], ids=lambda method: method.slug)
def test_a_planned_or_begun_method_claims_nothing_of_ours(method):
    assert not method.memory.claim
    assert read_number(method) == ""


@pytest.mark.parametrize("method", PLANNED, ids=lambda method: method.slug)
def test_a_planned_method_has_no_module_yet(method):
    place = ROOT.joinpath(*method.module.split("."))
    assert not place.with_suffix(".py").exists(), "it is there: set status='built'"
    assert not place.is_dir(), "it is there: set status='built'"
    assert not (ROOT / "experiments" / f"{method.slug}.py").exists()


def test_claims_are_of_an_experiment_which_builds_their_programs():
    slugs = {path.parent.name for path in ROOT.glob("configs/*/claims.toml")}
    assert slugs <= {path.stem for path in ROOT.glob("experiments/*.py")}


def test_the_readme_shows_the_cards():
    text = (ROOT / "README.md").read_text()
    shown = re.search(
        r"<!-- methods:begin -->\n(.*?)\n<!-- methods:end -->", text, re.S
    )
    assert shown is not None, "README.md has lost the markers of its methods table"
    assert shown[1] == render_table(), (
        "write it again: python -m experiments.claims --table"
    )
