"""Recall rows: each checked token by token against what its text says."""

import dataclasses

import jaxtyping
import numpy as np
import pytest

from jmem.data.document import DataError
from jmem.data.recall import KINDS, Recall

RECALL = Recall(
    text=60, records=3, value=4, keys=5, values=20, symbols=4, most=6, lead=0.4
)
ROWS = RECALL.sample(64, seed=7, kinds=KINDS, questions=3)
SYMBOL, NUMBER, KEY, VALUE = 5, 9, 16, 21  # behind 0, three questions and the marker


def text_of(row: int) -> list[int]:
    return ROWS.tokens[row, :60].tolist()


def slots(row: int) -> list[list[int]]:
    """[kind, key, answer ...] of each question."""
    return ROWS.tokens[row, 60:].reshape(3, 6).tolist()


def test_shapes_are_static():
    assert ROWS.tokens.shape == ROWS.answered.shape == (64, 60 + 3 * 6)
    assert ROWS.kinds.shape == ROWS.places.shape == (64, 3)
    assert ROWS.tokens.dtype == np.int32
    assert RECALL.vocab_size == VALUE + 20
    assert ROWS.tokens.max() < RECALL.vocab_size
    assert RECALL.prompt == 62


@pytest.mark.parametrize("row", range(64))
def test_every_answer_is_what_the_text_says(row):
    """By a person's reading, from left to right."""
    text = text_of(row)
    symbols = [t for t in text if SYMBOL <= t < NUMBER]
    counts = sorted((symbols.count(s), s) for s in set(symbols))
    for index, (kind, key, *answer) in enumerate(slots(row)):
        assert kind == 1 + ROWS.kinds[row, index]
        place = ROWS.places[row, index]
        if KINDS[kind - 1] == "find":
            assert text.count(key) == 1
            assert place == text.index(key) + 1
            assert answer == text[place : place + 4]
            continue
        assert (key, place) == (0, -1)
        if KINDS[kind - 1] == "majority":
            assert counts[-1][0] > counts[-2][0], "no majority"
            assert answer == [counts[-1][1], 0, 0, 0]
        else:
            assert answer == [NUMBER + text.count(4), 0, 0, 0]


def test_texts_are_made_of_records_symbols_and_markers():
    for row in range(64):
        text, records = text_of(row), 0
        while any(token >= KEY for token in text):
            start = next(i for i, token in enumerate(text) if token >= KEY)
            key, *values = text[start : start + 5]
            assert KEY <= key < VALUE
            assert all(VALUE <= value < VALUE + 20 for value in values)
            del text[start : start + 5]
            records += 1
        assert records == 3
        assert all(token == 4 or SYMBOL <= token < NUMBER for token in text)
        tokens = [t for t in text_of(row) if t >= KEY]
        assert len(set(tokens)) == len(tokens), "a key or a value twice"


def test_the_loss_covers_answers_and_nothing_else():
    batch = ROWS.batch
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    for row in range(64):
        for index, kind in enumerate(ROWS.kinds[row]):
            start = 60 + index * 6 + 2
            weights = batch.weights[row, start - 3 : start + 3]
            length = 4 if KINDS[kind] == "find" else 1
            # Behind: the padding of an answer; before: kind and key.
            assert weights.tolist() == [0, 0] + [1] * length + [0] * (4 - length)
    assert not batch.weights[:, :59].any()


def test_everything_is_drawn():
    assert {*ROWS.kinds.ravel().tolist()} == {0, 1, 2}
    starts = ROWS.places[ROWS.places >= 0]
    assert starts.min() < 6
    assert starts.max() > 50
    answers = ROWS.tokens[:, 62::6]
    for kind, least in ((1, 4), (2, 7)):
        assert len({*answers[ROWS.kinds == kind].tolist()}) == least
    assert len(np.unique(ROWS.tokens[:, :60], axis=0)) == 64


def test_a_seed_fixes_the_rows():
    again = RECALL.sample(64, seed=7, kinds=KINDS, questions=3)
    for one, other in zip(ROWS, again):
        np.testing.assert_array_equal(one, other)
    one, other = (RECALL.sample(2, seed=(1, step)) for step in (0, 1))
    assert (one.tokens != other.tokens).any()


def test_kinds_are_those_asked_for():
    rows = RECALL.sample(20, seed=0, kinds=("count",))
    assert (rows.kinds == KINDS.index("count")).all()


def test_correct_looks_at_the_answer_alone():
    rows = RECALL.sample(30, seed=1, kinds=KINDS)
    answer = rows.tokens[:, 62:].copy()
    assert RECALL.correct(rows, answer).all()
    aggregated = rows.kinds[:, 0] != 0
    answer[:, -1] += 1  # of a value, or of what pads a shorter answer
    np.testing.assert_array_equal(RECALL.correct(rows, answer), aggregated)
    longer = np.concatenate([rows.tokens[:, 62:], answer], axis=1)
    assert RECALL.correct(rows, longer).all()
    with pytest.raises(DataError, match=r"shape \(30, 3\); need 30 rows of value=4"):
        RECALL.correct(rows, answer[:, :3])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"records": 0}, "records=0 must be at least 1"),
        ({"records": 6}, "records=6 of value=4 need .* keys=5"),
        ({"value": 7}, "need as many keys and 21 values, .* values=20 are fewer"),
        ({"text": 15}, "leaves -6 tokens"),
        ({"lead": 0.25}, r"lead=0\.25 makes none the commonest"),
        ({"lead": 1.1}, r"lead=1\.1 makes none"),
        ({"symbols": 1}, "symbols=1"),
    ],
)
def test_impossible_sizes(changed, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(RECALL, **changed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"questions": 0}, "questions=0"),
        ({"kinds": ("sum",)}, r"kinds=\('sum',\) are not of"),
        ({"kinds": ()}, "are not of"),
    ],
)
def test_impossible_samples(arguments, message):
    jaxtyping.config.update("jaxtyping_disable", True)  # or it would refuse first
    try:
        with pytest.raises(DataError, match=message):
            RECALL.sample(**({"batch_size": 2, "seed": 0} | arguments))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
