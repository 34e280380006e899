"""Pruning by magnitude: the least values of each output row become zero.

Source   Han et al., Learning both Weights and Connections, 2015, arXiv:1506.02626; the
         rows of Wanda's comparison (Sun et al., 2023, arXiv:2306.11695).
See      tests/sparse/test_magnitude.py
"""

import math

import numpy as np

_ROWS_VALUES = 1 << 21
"""Values that are looked at together."""


def check_sparsity(who: str, sparsity: float) -> None:
    """Refuses a share of zeros outside [0, 1).

    Raises:
      ValueError: names it.
    """
    if not (math.isfinite(sparsity) and 0 <= sparsity < 1):
        raise ValueError(
            f"{who}: sparsity={sparsity} must be at least 0 and below 1: it is the "
            "share of values that become zero."
        )


def zero_smallest(w: np.ndarray, sparsity: float) -> np.ndarray:
    """A copy of w [out, in] with floor(sparsity * in) zeros or more in every row.

    Zeros that are there count. Of equal magnitudes the first become zero. NaN counts as
    the greatest.

    Raises:
      ValueError: a sparsity outside [0, 1).
    """
    check_sparsity("zero_smallest", sparsity)
    count = int(sparsity * w.shape[1])
    kept = np.array(w, order="C")
    step = max(1, _ROWS_VALUES // w.shape[1])
    for start in range(0, len(w) if count else 0, step):
        rows = kept[start : start + step]
        bits = rows.view(f"u{w.itemsize}")
        # Without the sign, floats are ordered as the integers of their bits.
        size = bits & bits.dtype.type(2 ** (8 * w.itemsize - 1) - 1)
        limit = np.partition(size, count - 1, axis=1)[:, count - 1 : count]
        below, equal = size < limit, size == limit
        left = count - np.count_nonzero(below, axis=1)
        first = np.cumsum(equal, axis=1, dtype=np.int32) <= left[:, None]
        rows[below | (equal & first)] = 0
    return kept
