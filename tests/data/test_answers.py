"""LongBench's metrics: numbers of the packages it uses, and values by hand."""

import random
from itertools import combinations

import numpy as np
import pytest

from jmem.data.answers import (
    classification,
    count,
    edit_similarity,
    f1,
    retrieval,
    rouge_l,
)
from jmem.data.document import DataError

AGENCIES = (
    "GAO found three agencies.\nThey agreed. They did not act.",
    "Three agencies agreed with GAO. They did not act on it. ",
)


class TestF1:
    @pytest.mark.parametrize(
        "produced, answer, expected",
        [
            ("Paris", "paris.", 1),
            ("in Paris, France", "Paris", 2 * (1 / 3) / (4 / 3)),
            ("The an A", "the", 0),  # articles alone leave no word
            ("the theme", "theme", 1),  # and are whole words
            ("well-known", "well known", 0),  # punctuation leaves no blank
            ("a a b b b", "b b c", 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # counted twice
            ("", "", 0),
            ("one\ttwo\n three", "three two one", 1),
        ],
    )
    def test_by_hand(self, produced, answer, expected):
        assert f1(produced, answer) == pytest.approx(expected)

    def test_is_the_harmonic_mean_over_matched_words(self):
        """Matched one by one, as in a matching of cards, not by counting."""
        draw = random.Random(0)
        for _ in range(100):
            ours, theirs = (draw.choices("uvwxyz", k=draw.randint(1, 9)) for _ in "12")
            left, matched = list(theirs), 0
            for word in ours:
                if word in left:
                    left.remove(word)
                    matched += 1
            precision, recall = matched / len(ours), matched / len(theirs)
            total = precision + recall
            expected = 2 * precision * recall / total if matched else 0
            assert f1(" ".join(ours), " ".join(theirs)) == pytest.approx(expected)


class TestRougeL:
    @pytest.mark.parametrize(
        "produced, answer, expected",
        [
            (
                "The report finds waste. It asks for audits.",
                "Audits are needed. The report finds much waste.",
                0.5,
            ),
            ("one two three. four five. ", "five four. three two one two. ", 2 / 3),
            ("a b a b c d", "b a c a d b", 1),
            (*AGENCIES, 4 / 7),
            ("x y z", "q r s", 0),
        ],
    )
    def test_package(self, produced, answer, expected):
        """rouge 1.0.1, which adds 1e-8 to a divisor."""
        assert rouge_l(produced, answer) == pytest.approx(expected, abs=1e-8)

    @pytest.mark.parametrize("empty", ["", "...", "."])
    def test_empty(self, empty):
        assert rouge_l(empty, "a b") == rouge_l("a b", empty) == 0

    def test_a_sentence_keeps_the_order_of_words(self):
        """All longest common subsequences of one sentence, tried out."""
        draw = random.Random(1)
        for _ in range(60):
            ours, theirs = (draw.sample("abcdefg", draw.randint(1, 7)) for _ in "12")
            longest = max(
                n
                for n in range(len(ours) + 1)
                for kept in combinations(ours, n)
                if [w for w in theirs if w in kept] == list(kept)
            )
            expected = 2 * longest / (len(ours) + len(theirs))
            found = rouge_l(" ".join(ours), " ".join(theirs))
            assert found == pytest.approx(expected)


class TestEditSimilarity:
    @pytest.mark.parametrize(
        "produced, answer, expected",
        [
            ("    return self.x + 1", "        return self.y", 0.76),
            ("for (int i = 0; i < n; i++) {", "for (int j = 0; j < m; ++j) {", 0.86),
            ("return foo(bar, baz=1)", "return foo(baz, bar=2)", 0.86),
            # difflib passes over letters that fill long texts.
            ("x" * 250 + "y" * 30, "y" * 30 + "x" * 250, 0),
            ("", "", 1),
            ("", "x", 0),
        ],
    )
    def test_package(self, produced, answer, expected):
        """fuzzywuzzy 0.18 without python-Levenshtein."""
        assert edit_similarity(produced, answer) == expected

    def test_within_the_bound_of_the_edit_distance(self):
        """Insertions and deletions: no matching of blocks is better than the best."""
        draw = random.Random(2)
        for _ in range(100):
            ours, theirs = ("".join(draw.choices("abc(", k=12)) for _ in "12")
            lengths = np.zeros((13, 13), int)
            for i, j in np.ndindex(12, 12):
                lengths[i + 1, j + 1] = max(
                    lengths[i, j] + (ours[i] == theirs[j]),
                    lengths[i, j + 1],
                    lengths[i + 1, j],
                )
            best = lengths[-1, -1] / 12
            assert 0 < edit_similarity(ours, theirs) <= best + 0.005
            assert edit_similarity(ours, ours) == 1

    @pytest.mark.parametrize(
        "produced",
        [
            "\n\nx = 1\ny = 2",
            "# set x\nx = 1",
            "```\n// C\nx = 1",
            "y = 2  # no\nx = 1",
        ],
    )
    def test_takes_the_first_line_of_code(self, produced):
        assert edit_similarity(produced, "x = 1") == 1

    def test_comments_only(self):
        assert edit_similarity("# x = 1", "x = 1") == 0


class TestClassification:
    CLASSES = ("City", "City name", "Food", "Currency name")

    @pytest.mark.parametrize(
        "produced, answer, expected",
        [
            ("Type: Food", "Food", 1),
            ("Food or City", "Food", 1 / 2),
            ("City name", "City name", 1),  # "City" is part of it
            ("City name", "City", 1 / 2),  # but then two are named
            ("city", "City", 0),
            ("Currency", "Currency name", 0),
            ("", "City", 0),
        ],
    )
    def test_by_hand(self, produced, answer, expected):
        assert classification(produced, answer, self.CLASSES) == expected

    def test_unknown_answer(self):
        with pytest.raises(DataError, match="answer='Colour' is none of the 4 classes"):
            classification("Colour", "Colour", self.CLASSES)


class TestNumbers:
    @pytest.mark.parametrize(
        "produced, answer, expected",
        [("8", "8", 1), ("8 of 10", "8", 0.5), ("18", "8", 0), ("many", "8", 0)],
    )
    def test_count(self, produced, answer, expected):
        assert count(produced, answer) == expected

    @pytest.mark.parametrize(
        "produced, expected",
        [("Paragraph 12", 1), ("12", 1), ("Paragraph 1 or 12, not 3", 1 / 3), ("", 0)],
    )
    def test_retrieval(self, produced, expected):
        assert retrieval(produced, "Paragraph 12") == pytest.approx(expected)

    def test_retrieval_without_a_paragraph(self):
        with pytest.raises(DataError, match=r"'12' must name a paragraph: .Paragraph"):
            retrieval("12", "12")
