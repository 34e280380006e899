"""Prompts of LongBench's kinds: complete, reproducible, with documents held out."""

import re

import pytest

from jmem.data.builtin import RUN
from jmem.data.document import DataError
from jmem.data.instructions import INSTRUCTIONS, make_prompts
from jmem.data.longbench import TASKS


def test_each_data_set_has_its_share_and_form():
    found = make_prompts(3, seed=0)
    assert [name for name, _ in found] == [*TASKS] * 3
    for name, text in found:
        assert "{" + "input}" not in text
        if name in ("passage_count", "passage_retrieval_en"):
            assert "Paragraph 2: " in text
        if name == "samsum":
            assert text.count("Dialogue: ") == text.count("Summary: ") >= 4


def test_a_seed_fixes_them():
    assert make_prompts(2, seed=3) == make_prompts(2, seed=3)
    assert make_prompts(2, seed=3) != make_prompts(2, seed=4)


def test_held_out_documents_are_others():
    """No run of words in common, of the length that `builtin` promises."""

    def runs(held_out: bool) -> set[tuple[str, ...]]:
        found = make_prompts(
            60,
            seed=5,
            held_out=held_out,
            templates={"gov_report": "{context}"},
            datasets=("gov_report",),
        )
        texts = [re.findall(r"\w+", text.lower()) for _, text in found]
        return {
            tuple(words[i : i + RUN])
            for words in texts
            for i in range(len(words) - RUN + 1)
        }

    training, others = runs(False), runs(True)
    assert min(len(training), len(others)) > 1000
    assert not training & others


def test_templates_to_judge_by_are_not_in_the_training():
    """Sentences of the templates, as long as one that says something."""
    instructions = {
        part for before, after in INSTRUCTIONS.values() for part in (*before, *after)
    }
    for found in TASKS.values():
        for sentence in found.template.replace("\n", ". ").split(". "):
            if len(sentence) > 20 and "{" not in sentence:
                assert not any(sentence in part for part in instructions), sentence


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"count": 0}, "count=0 must be at least 1"),
        ({"datasets": ("hotpot",)}, r"datasets=\('hotpot',\) names"),
        ({"datasets": ()}, r"datasets=\(\) names"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(DataError, match=message):
        make_prompts(**({"count": 1, "seed": 0} | arguments))
