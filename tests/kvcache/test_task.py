"""The classifier of prompts: what it reads, and how often it is right."""

import numpy as np
import pytest

from jmem.data.longbench import TASKS
from jmem.kvcache import task
from jmem.kvcache.task import (
    LABELS,
    Classifier,
    extract_features,
    label,
    measure_accuracy,
    train,
)


@pytest.fixture(scope="module")
def quick():
    """Takes seconds; the default learns from 16 times as many prompts."""
    return train(count=60, steps=200, batch_size=32)


class TestClassifier:
    def test_is_right_on_what_it_has_not_seen(self, quick):
        """The default reaches over 99 % (the module's docstring)."""
        found = measure_accuracy(quick, count=12, seed=11)
        assert found.contexts > 0.9
        assert found.templates > 0.9

    def test_names_the_task(self, quick):
        text = "The mill stood by the river. It was built by Ann's father. " * 40
        question = f"{text}\n\nQuestion: Who built the mill?\nAnswer:"
        summary = f"Summarise this report on one page.\n\n{text}\n\nSummary:"
        assert quick(question) == "localization"
        assert quick(summary) == "aggregation"

    def test_takes_any_text(self, quick):
        for text in ("", "ab", "é🐍\ud800", "x" * 100_000):
            assert quick(text) in LABELS

    def test_a_seed_fixes_it(self):
        one, other = (train(seed=4, count=2, steps=3) for _ in range(2))
        for name in one.params:
            np.testing.assert_array_equal(one.params[name], other.params[name])
            assert one.params[name].any()

    def test_is_small(self, quick):
        assert sum(leaf.size for leaf in quick.params.values()) == 262_242

    def test_the_default_is_trained_once(self, monkeypatch):
        monkeypatch.setattr(task, "train", lambda: Classifier({}))
        task.get_classifier.cache_clear()
        try:
            assert task.get_classifier() is task.get_classifier()
        finally:
            task.get_classifier.cache_clear()


class TestFeatures:
    def test_are_the_ends_of_the_text(self):
        head, tail = "h" * task.END, "t" * task.END
        one, other, third = extract_features(
            [head + "middle" * 9 + tail, head + "other" + tail, tail + head]
        )
        np.testing.assert_array_equal(one, other)
        assert (one != third).any()

    def test_are_sets_of_n_grams(self):
        """Three different 3-grams in "abcabc", one of them twice, and two 5-grams."""
        (row,) = extract_features(["abcabc"])
        first, last = row.reshape(2, -1)
        np.testing.assert_array_equal(first, last)
        np.testing.assert_allclose(first[first > 0], np.full(5, 5**-0.5), rtol=1e-6)

    def test_short_texts_have_none(self):
        assert not extract_features(["", "ab"]).any()


def test_labels():
    asks = {name for name in TASKS if label(name) == "localization"}
    passages = {"hotpotqa", "2wikimqa", "musique"}
    assert asks == passages | {"narrativeqa", "qasper", "multifieldqa_en"}
