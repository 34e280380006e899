"""Packing and unpacking FragBitmap, the format that `jmem.kernels.spmm` reads.

Memory   Bytes: b a non-zero, 1/8 + 1/32 a value, 4 a tile of 64 x 64, and up to 63
         values of padding a tile, about 32; integers besides 4 an output row.
Integers Of 8 or 4 bits, with a scale an output row: its largest magnitude / 127 or / 7,
         in float32; rounded half to even. A non-zero that rounds to 0 is a stored 0:
         what is pruned is told by the bits alone.
See      kernels/spmm/fragbitmap.py (the format), tests/sparse/test_formats.py
"""

import ml_dtypes
import numpy as np

from jmem.kernels.spmm import FragBitmap
from jmem.kernels.spmm import check as check_bits
from jmem.nn.pruned.tiles import (
    FLOATS,
    check_matrix,
    count_from,
    count_tiles,
    find_nonzero,
    gather_up,
    list_strips,
    spread,
)

SIDE = 64
INTEGERS = {"int8": 127, "int4": 7}
"""Kinds of integer values, and the largest of each."""


def pack(w: np.ndarray, values: str | None = None) -> FragBitmap:
    """W [out, in], float, as NumPy arrays; `values` "int8" or "int4", None: as w's.

    NaN and infinities are kept. -0.0 is a zero.

    Raises:
      TypeError, ValueError: `w` is no float matrix, or it is not finite and `values`
        are integers.
    """
    check_matrix("FragBitmap", w, FLOATS)
    numbers, scales = (w, None) if values is None else _quantise(w, values)
    found, masks, counts = [], [], []
    strips = list_strips(w, SIDE, SIDE), list_strips(numbers, SIDE, SIDE)
    for own, stored in zip(*strips, strict=True):
        full = find_nonzero(_order_by_fragment(own))
        found.append(_order_by_fragment(stored)[full])
        bits = np.packbits(full, axis=-1, bitorder="little").view("<u4")
        masks.append(bits.swapaxes(-1, -2).reshape(-1, 2 * SIDE).astype(np.uint32))
        counts.append(np.count_nonzero(full, axis=-1))
    by_row = np.concatenate(counts)
    by_tile = by_row.sum(-1)
    rows = spread(np.concatenate(found), by_tile, SIDE)
    starts = count_from(-(-by_tile // SIDE))
    cap = max(1, int(np.diff(starts).max()))
    rows = np.concatenate([rows, np.zeros((cap, SIDE), rows.dtype)])
    return FragBitmap(
        _join_nibbles(rows) if values == "int4" else rows,
        np.concatenate(masks),
        (np.cumsum(by_row, axis=1) - by_row).astype(np.uint16),
        starts,
        scales,
        w.shape[0],
        w.shape[1],
        cap,
    )


def _order_by_fragment(strip: np.ndarray) -> np.ndarray:
    """Tiles [n, 64, 64] of a strip, each row in the order of its bits."""
    parts = strip.reshape(-1, SIDE, strip.shape[1] // SIDE, 8, 4, 2)
    return parts.transpose(0, 2, 1, 4, 3, 5).reshape(-1, SIDE, SIDE)


def _quantise(w: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Integers of a row's scale, int8 [out, in], and the scales, float32 [out]."""
    if kind not in INTEGERS:
        raise ValueError(
            f"FragBitmap: values={kind!r}; need {', '.join(INTEGERS)}, or None for w's "
            f"own, {w.dtype}."
        )
    scales = np.empty(len(w), np.float32)
    numbers = np.empty(w.shape, np.int8)
    most, step = INTEGERS[kind], max(1, (1 << 21) // w.shape[1])
    for start in range(0, len(w), step):
        rows = slice(start, start + step)
        wide = w[rows].astype(np.float32)
        largest = np.abs(wide).max(axis=1)
        if not np.isfinite(largest).all():
            raise ValueError(
                f"FragBitmap: row {start + int(np.argmin(np.isfinite(largest)))} of w "
                f"holds a value that is not finite, and values={kind!r} have none. "
                "Mend it, or keep floats."
            )
        scales[rows] = largest / np.float32(most)
        divisor = np.where(scales[rows] > 0, scales[rows], 1)[:, None]
        numbers[rows] = np.clip(np.rint(wide / divisor), -most, most)
    return numbers, scales


def _join_nibbles(rows: np.ndarray) -> np.ndarray:
    """Two 4-bit integers a byte, the first in the low half: [n, 64] to [n, 32]."""
    nibbles = rows.view(np.uint8) & 15
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def _split_nibbles(rows: np.ndarray) -> np.ndarray:
    nibbles = np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), SIDE)
    return ((nibbles ^ 8).astype(np.int8) - 8).astype(np.int8)


def count_nonzero(matrix: FragBitmap) -> np.ndarray:
    """Non-zeros of each tile, [down, across], of one matrix."""
    down, across = count_tiles((matrix.outputs, matrix.inputs), SIDE, SIDE)
    ones = np.bitwise_count(np.asarray(matrix.masks))
    return ones.sum(-1, dtype=np.int64).reshape(down, across)


def unpack(matrix: FragBitmap) -> np.ndarray:
    """W [out, in] in the dtype of its values; of integers in float32."""
    down, across = count_tiles((matrix.outputs, matrix.inputs), SIDE, SIDE)
    rows = np.asarray(matrix.values)
    rows = _split_nibbles(rows) if rows.dtype == np.uint8 else rows
    words = np.asarray(matrix.masks, "<u4").reshape(-1, 2, SIDE).swapaxes(1, 2)
    full = np.ascontiguousarray(words).view(np.uint8)
    full = np.unpackbits(full, axis=-1, bitorder="little").view(bool)
    tiles = np.zeros(full.shape, rows.dtype)
    tiles[full] = gather_up(rows, count_nonzero(matrix).reshape(-1))
    parts = tiles.reshape(down, across, SIDE, 4, 8, 2).transpose(0, 2, 1, 4, 3, 5)
    dense = parts.reshape(down * SIDE, across * SIDE)
    dense = dense[: matrix.outputs, : matrix.inputs]
    if matrix.scales is None:
        return dense
    return dense.astype(np.float32) * np.asarray(matrix.scales)[:, None]


def check(matrix: FragBitmap) -> None:
    """Refuses arrays that no packer makes, of one matrix, on the host.

    Raises:
      TypeError, ValueError: names the array and its rule.
    """
    check_bits(matrix)
    needed = -(-count_nonzero(matrix).reshape(-1) // SIDE)
    starts = np.asarray(matrix.starts)
    if starts[0] != 0 or (np.diff(starts) != needed).any():
        raise ValueError("starts do not count the bits of each tile's masks")
    if matrix.scales is not None and not np.isfinite(matrix.scales).all():
        raise ValueError("scales are not finite")
    inside = np.ones((matrix.outputs, matrix.inputs), ml_dtypes.bfloat16)
    if any(n % SIDE for n in inside.shape):
        # Bits beyond the edge would be counted, and never read.
        whole = pack(inside)
        if (np.asarray(matrix.masks) & ~whole.masks).any():
            raise ValueError("masks have bits beyond the matrix's edge")
