"""What packers of sparse matrices share: non-zeros, tiles, and rows padded by zeros."""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

HALVES = tuple(np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16))
"""Dtypes of two bytes, which Tiled-CSL and TCA-BME hold."""
FLOATS = (*HALVES, np.dtype(np.float32))
_STRIP_VALUES = 1 << 21
"""Values that are packed together, so that they stay in the processor's cache."""


def find_nonzero(values: np.ndarray) -> np.ndarray:
    """Where floats are not zero; NaN is not, -0.0 is."""
    size = values.itemsize
    bits = values.view(f"u{size}")
    return (bits & bits.dtype.type(2 ** (8 * size - 1) - 1)) != 0


def check_matrix(who: str, w: np.ndarray, dtypes: tuple[np.dtype, ...]) -> None:
    """Refuses what is no matrix [out, in] of one of these dtypes.

    Raises:
      ValueError: names the shape.
      TypeError: names the dtype.
    """
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(
            f"{who}: w has shape {w.shape}; need a matrix [out, in] with a value."
        )
    if w.dtype not in dtypes:
        known = ", ".join(map(str, dtypes))
        raise TypeError(f"{who}: w is {w.dtype}; need {known}. Cast it first.")


def count_tiles(shape: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Tiles of rows x columns down and across a matrix; the last may be cut."""
    return -(-shape[0] // rows), -(-shape[1] // columns)


def list_strips(w: np.ndarray, rows: int, columns: int) -> Iterator[np.ndarray]:
    """Some rows of tiles at a time, [n * rows, m * columns], padded by zeros."""
    down, across = count_tiles(w.shape, rows, columns)
    step = max(1, _STRIP_VALUES // (rows * across * columns)) * rows
    for start in range(0, down * rows, step):
        strip = w[start : start + step]
        more = (-strip.shape[0] % rows, -w.shape[1] % columns)
        yield np.pad(strip, [(0, n) for n in more]) if any(more) else strip


def spread(values: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
    """Runs of `counts` values, each in rows of `width` of its own: [rows, width].

    Zeros fill a run's last row.
    """
    needed = -(-counts // width)
    before = np.cumsum(needed) - needed
    number = np.arange(needed.sum()) - np.repeat(before, needed)
    left = np.repeat(counts, needed) - number * width
    rows = np.zeros((len(left), width), values.dtype)
    rows[np.arange(width) < left[:, None]] = values
    return rows


def gather_up(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The values that `spread` put in rows, end to end."""
    width = rows.shape[-1]
    needed = -(-counts // width)
    before = np.cumsum(needed) - needed
    number = np.arange(needed.sum()) - np.repeat(before, needed)
    left = np.repeat(counts, needed) - number * width
    return rows[: len(left)][np.arange(width) < left[:, None]]


def count_from(totals: np.ndarray) -> np.ndarray:
    """0 and the running sums: where each run begins, and the end; int32.

    Raises:
      ValueError: the end is beyond what an int32 counts.
    """
    ends = np.concatenate([[0], np.cumsum(totals, dtype=np.int64)])
    if ends[-1] >= 2**31:
        raise ValueError(
            f"pack: the matrix has {ends[-1]:,} places of values; offsets are int32 "
            "and count to 2,147,483,647. Split it."
        )
    return ends.astype(np.int32)
