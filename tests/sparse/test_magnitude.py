"""Pruning by magnitude: how many, which, and what counts as small."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmem.sparse.magnitude import zero_smallest


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    sparsity=st.floats(0, 0.999),
    dtype=st.sampled_from(["float32", "float16", ml_dtypes.bfloat16]),
    seed=st.integers(0, 9),
)
def test_each_row_loses_its_least(rows, columns, sparsity, dtype, seed):
    random = np.random.default_rng(seed)
    w = np.rint(4 * random.standard_normal((rows, columns))).astype(np.dtype(dtype))
    found = zero_smallest(w, sparsity)
    count = int(sparsity * columns)
    for row, given_row in zip(found, w, strict=True):
        size = np.abs(given_row.astype(np.float32))
        lost = np.argsort(size, kind="stable")[:count]  # the first of equals
        expected = given_row.copy()
        expected[lost] = 0
        np.testing.assert_array_equal(row, expected)


def test_the_given_matrix_stays_and_nan_is_great():
    w = np.array([[np.nan, 1, np.inf, -2, 0.5, -0.0]], np.float32)
    before = w.copy()
    found = zero_smallest(w, 0.67)
    np.testing.assert_array_equal(found, [[np.nan, 0, np.inf, 0, 0, 0]])
    np.testing.assert_array_equal(w, before)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, np.nan, np.inf])
def test_a_share_outside_is_refused(sparsity):
    with pytest.raises(ValueError, match=f"sparsity={sparsity} must be at least 0"):
        zero_smallest(np.ones((2, 2), np.float32), sparsity)
