"""TCA-BME, the format of SpInfer: a bitmap for each 8 x 8, and values in its order.

Paper    Fan et al., SpInfer, EuroSys 2025; code github.com/xxyux/SpInfer.
Idea     Blocks of 8 x 8 have 64 bits, bit 8*row + column, and their values in the order
         of the bits. Groups of 64 x 64 follow each other row by row; in a group four
         strips of 16 rows from top to bottom, in a strip four squares of 2 x 2 blocks,
         in a square the left blocks, then the right ones: the four registers of a
         tensor core's first operand.
Memory   Bytes: 2 a non-zero, 8 a block (1 bit a value), 20 a group, and up to 7 values
         of padding a group.
Differs  As Tiled-CSL: NaN stays, -0.0 is a zero, edges are padded by zeros.
See      tests/sparse/test_formats.py, tests/golden/README.md
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jmem.nn.pruned.tiles import (
    HALVES,
    check_matrix,
    count_from,
    count_tiles,
    find_nonzero,
    gather_up,
    list_strips,
    spread,
)

SIDE, PADDED = 64, 8
_BLOCKS, _STRIPS = 64, 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TcaBme:
    """The matrix W [outputs, inputs] of y = x @ W.T, or L of them."""

    values: Any
    """bfloat16 or float16 [*L, n]; zeros fill a group up to a multiple of 8."""
    bitmaps: Any
    """uint32 [*L, blocks, 2]: the low and the high word of each block's 64 bits."""
    group_offsets: Any
    """int32 [*L, groups + 1]: the value at which each group begins; last, the end."""
    median_offsets: Any
    """int32 [*L, 4 * groups]: values of the group before each strip of 16 rows."""
    outputs: int = dataclasses.field(metadata={"static": True})
    inputs: int = dataclasses.field(metadata={"static": True})


def pack(w: np.ndarray) -> TcaBme:
    """W [out, in] of a 16-bit dtype, bit for bit as the official packer has it.

    Raises:
      TypeError, ValueError: `w` is no matrix of such a dtype.
    """
    check_matrix("TcaBme", w, HALVES)
    values, bitmaps, counts = [], [], []
    for strip in list_strips(w, SIDE, SIDE):
        # Axes: group down, strip, block down, row; group across, square, block, column.
        parts = strip.reshape(-1, _STRIPS, 2, 8, strip.shape[1] // SIDE, 4, 2, 8)
        blocks = parts.transpose(0, 4, 1, 5, 6, 2, 3, 7).reshape(-1, 64)
        full = find_nonzero(blocks)
        values.append(blocks[full])
        bitmaps.append(np.packbits(full, axis=1, bitorder="little").view("<u4"))
        counts.append(np.count_nonzero(full, axis=1))
    by_strip = np.concatenate(counts).reshape(-1, _STRIPS, _BLOCKS // _STRIPS).sum(-1)
    by_group = by_strip.sum(-1)
    return TcaBme(
        spread(np.concatenate(values), by_group, PADDED).reshape(-1),
        np.concatenate(bitmaps).astype(np.uint32),
        count_from(-(-by_group // PADDED) * PADDED),
        (np.cumsum(by_strip, axis=1) - by_strip).reshape(-1).astype(np.int32),
        w.shape[0],
        w.shape[1],
    )


def _count(bitmaps: np.ndarray) -> np.ndarray:
    """Non-zeros of each group and block, [groups, 64]."""
    return np.bitwise_count(bitmaps).sum(-1, dtype=np.int32).reshape(-1, _BLOCKS)


def unpack(matrix: TcaBme) -> np.ndarray:
    """W [out, in]; what is not stored is +0.0."""
    down, across = count_tiles((matrix.outputs, matrix.inputs), SIDE, SIDE)
    bitmaps = np.ascontiguousarray(matrix.bitmaps, "<u4")
    full = np.unpackbits(bitmaps.view(np.uint8), axis=1, bitorder="little")
    stored = np.asarray(matrix.values)
    blocks = np.zeros(full.shape, stored.dtype)
    rows = stored.reshape(-1, PADDED)
    blocks[full.view(bool)] = gather_up(rows, _count(bitmaps).sum(-1))
    return _join(blocks, down, across)[: matrix.outputs, : matrix.inputs]


def _join(blocks, down: int, across: int):
    """Blocks [n, 64] as the padded matrix."""
    parts = blocks.reshape(down, across, _STRIPS, 4, 2, 2, 8, 8)
    parts = parts.transpose(0, 2, 5, 6, 1, 3, 4, 7)
    return parts.reshape(down * SIDE, across * SIDE)


def check(matrix: TcaBme) -> None:
    """Refuses arrays that no packer makes, of one matrix, on the host.

    Raises:
      ValueError: names the array and its rule.
    """
    down, across = count_tiles((matrix.outputs, matrix.inputs), SIDE, SIDE)
    groups = down * across
    shapes = {
        "bitmaps": (groups * _BLOCKS, 2),
        "group_offsets": (groups + 1,),
        "median_offsets": (groups * _STRIPS,),
    }
    for name, shape in shapes.items():
        if getattr(matrix, name).shape != shape:
            given = getattr(matrix, name).shape
            raise ValueError(f"{name} have shape {given}, where {shape} is needed")
    counts = _count(np.asarray(matrix.bitmaps))
    needed = -(-counts.sum(-1) // PADDED) * PADDED
    offsets = np.asarray(matrix.group_offsets).astype(np.int64)
    if offsets[0] != 0 or (np.diff(offsets) != needed).any():
        raise ValueError("group_offsets do not count the bits of each group's bitmaps")
    strips = counts.reshape(groups, _STRIPS, -1).sum(-1)
    before = (np.cumsum(strips, axis=1) - strips).reshape(-1)
    if (np.asarray(matrix.median_offsets) != before).any():
        raise ValueError("median_offsets do not count the bits of each strip's bitmaps")
    if offsets[-1] > matrix.values.shape[0] or matrix.values.shape[0] % PADDED:
        raise ValueError(
            f"group_offsets end at value {offsets[-1]}, of {matrix.values.shape[0]}"
        )


def decode(matrix: TcaBme, dtype: DTypeLike | None = None) -> Float[Array, "out in"]:
    """`unpack` of one matrix in JAX."""
    down, across = count_tiles((matrix.outputs, matrix.inputs), SIDE, SIDE)
    low, high = (matrix.bitmaps[:, i, None] for i in range(2))
    bit = jnp.arange(64, dtype=jnp.uint32)[None]
    word, shift = jnp.where(bit < 32, low, high), bit % 32
    counts = jax.lax.population_count(matrix.bitmaps).astype(jnp.int32)
    own = counts.sum(-1).reshape(-1, _BLOCKS)
    starts = matrix.group_offsets[:-1, None] + jnp.cumsum(own, axis=1) - own
    below = jax.lax.population_count(word & ((jnp.uint32(1) << shift) - 1))
    before = below.astype(jnp.int32) + jnp.where(bit < 32, 0, counts[:, :1])
    found, place = (word >> shift & 1) != 0, starts.reshape(-1, 1) + before
    values = jnp.pad(matrix.values, (0, not matrix.values.size))  # of all zeros, none
    values = values.at[place].get(mode="clip")
    blocks = jnp.where(found, values, jnp.zeros((), values.dtype))
    dense = _join(blocks, down, across)[: matrix.outputs, : matrix.inputs]
    return dense if dtype is None else dense.astype(dtype)
