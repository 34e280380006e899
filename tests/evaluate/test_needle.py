"""The grid has every cell once, and only cells that the full cache answers count."""

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer

from jmem.data.document import DataError
from jmem.data.needle import Haystack
from jmem.evaluate.interval import wilson
from jmem.evaluate.needle import (
    Retained,
    count_answer_steps,
    count_retained,
    find_hits,
    make_grid,
)


@pytest.fixture(scope="module")
def haystack():
    return Haystack(byte_tokenizer(), "One is here. Two is there, and so on. " * 30)


@pytest.fixture(scope="module")
def cases(haystack):
    return make_grid(haystack, lengths=(200, 300), depths=(0.0, 0.5, 1.0), seeds=(3, 4))


def test_every_cell_once_in_order(cases):
    found = [(case.length, case.seed, case.depth) for case in cases]
    assert found == sorted(found)
    assert len(set(found)) == 12


def test_hits_read_the_answer_and_that_it_ends(haystack, cases):
    encode = haystack.tokenizer.encode
    steps = count_answer_steps(cases)
    texts = [f" {case.answer}." for case in cases]
    texts[1] = f" {cases[1].answer}7"  # another number
    texts[2] = f" {cases[3].answer}."  # another case's
    rows = np.array([encode(text).ids for text in texts], np.int32)
    assert rows.shape[1] == steps
    expected = [True, False, False, *[True] * (len(cases) - 3)]
    assert find_hits(haystack.tokenizer, cases, rows).tolist() == expected


def test_only_cells_that_the_full_cache_answers_count():
    full = np.array([True, True, True, False, False])
    cut = np.array([True, False, True, True, False])
    kept = count_retained(full, cut)
    assert kept == Retained(hits=2, cells=3, excluded=2)
    assert kept.share == 2 / 3
    assert kept.interval == wilson(2, 3)


def test_without_cells_there_is_no_share():
    kept = count_retained(np.zeros(4, bool), np.ones(4, bool))
    assert (kept.share, kept.interval, kept.excluded) == (None, None, 4)


def test_refuses_lengths_without_room(haystack):
    with pytest.raises(DataError, match="length=20 must lie in"):
        make_grid(haystack, lengths=(200, 20), depths=(0.5,), seeds=(0,))
