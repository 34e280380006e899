"""Tiled-CSL, the format of Flash-LLM: every non-zero beside its place in a tile.

Paper    Xia et al., Flash-LLM, VLDB 2024, arXiv:2309.10285, section 4.1.
Idea     A tile is 128 x 64; element (r, c) has the place r*64 + (c XOR (r mod 8)*8),
         which is where it lies in shared memory. An entry is 32 bits: value in the low
         half, place in the high one. Tiles are padded to vectors of 4 entries.
Reorder  A warp scatters 32 entries at a time, each to bank (place / 2) mod 32 of shared
         memory. The order is such that they mostly fall on different banks: entries
         are taken from the fullest bank first, the last found first, and lane b reads
         vector b.
Memory   4 * entries + 4 * (tiles + 2) bytes: half as much again as a bitmap at 80 %
         sparsity, the least of all formats above 91 %.
Differs  The official packer drops NaN, refuses shapes that 128 x 64 does not divide,
         and its kernel loses entries of a tile with more than 4,096, unsaid; here NaN
         stays, edges are padded by zeros, and any density round-trips. A dense tile has
         no place to pad and needs none, as 8,192 is a multiple of 4.
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
    list_strips,
)

ROWS, COLUMNS, VECTOR = 128, 64, 4
_SIZE, _BANKS = ROWS * COLUMNS, 32
_DEPTH = _SIZE // _BANKS
"""Places of a tile that lie in one bank."""

_R, _C = np.divmod(np.arange(_SIZE), COLUMNS)
_PLACE = (_R * COLUMNS + (_C ^ (_R % 8 * 8))).astype(np.uint32)
"""The place of each element of a tile, row by row."""
_BY_BANK = np.argsort(_PLACE.reshape(ROWS, COLUMNS), axis=1) + np.arange(
    0, _SIZE, COLUMNS
).reshape(ROWS, 1)
_BY_BANK = _BY_BANK.reshape(ROWS, _BANKS, 2).swapaxes(0, 1).reshape(-1)
"""Elements of a tile, bank by bank; within a bank row by row."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledCSL:
    """The matrix W [outputs, inputs] of y = x @ W.T, or L of them."""

    entries: Any
    """uint32 [*L, n]: a value's 16 bits, and its place in the tile above them."""
    offsets: Any
    """int32 [*L, tiles + 2]: the vector of 4 entries at which each tile begins, and
    twice the end."""
    outputs: int = dataclasses.field(metadata={"static": True})
    inputs: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    """"float16" or "bfloat16"."""


def pack(w: np.ndarray, *, reorder: bool = True) -> TiledCSL:
    """W [out, in] of a 16-bit dtype, in the official packer's order, bit for bit.

    `reorder=False` is that of its plain packer: row by row, with the first zeros of a
    tile as padding. -0.0 is a zero.

    Raises:
      TypeError, ValueError: `w` is no matrix of such a dtype.
    """
    check_matrix("TiledCSL", w, HALVES)
    order = _order_by_bank if reorder else _order_by_row
    found, counts = [], []
    for strip in list_strips(w, ROWS, COLUMNS):
        tiles = strip.reshape(-1, ROWS, strip.shape[1] // COLUMNS, COLUMNS)
        tiles = tiles.swapaxes(1, 2).reshape(-1, _SIZE)
        entries, sizes = order(tiles)
        found.append(entries)
        counts.append(sizes)
    offsets = count_from(np.concatenate(counts) // VECTOR)
    return TiledCSL(
        np.concatenate(found),
        np.append(offsets, offsets[-1:]),
        w.shape[0],
        w.shape[1],
        str(w.dtype),
    )


def _order_by_row(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries of tiles [N, 8192], and how many each has."""
    full = find_nonzero(tiles)
    padding = -np.count_nonzero(full, axis=1) % VECTOR
    zeros = np.cumsum(~full, axis=1, dtype=np.int16)
    full |= ~full & (zeros <= padding[:, None])
    entries = tiles.view(np.uint16) | _PLACE << 16
    return entries[full], np.count_nonzero(full, axis=1)


def _order_by_bank(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_order_by_row`, in the order that spreads a warp's entries over banks.

    Of n entries of a bank the k-th found has level k. The fullest bank first, the
    lowest among equals, means: by falling level, within one by bank.
    """
    shape = len(tiles), _BANKS, _DEPTH
    places = _PLACE[_BY_BANK]
    tiles = tiles[:, _BY_BANK]
    full = find_nonzero(tiles).reshape(shape)
    found = (tiles.view(np.uint16) | places << 16)[full.reshape(tiles.shape)]
    levels = np.arange(_DEPTH)
    heights = np.count_nonzero(full, axis=2)
    stacks = np.zeros(shape, np.uint32)
    stacks[levels < heights[:, :, None]] = found
    free = full.argmin(axis=2)  # of each bank, the first place with a zero
    padding = -heights.sum(axis=1) % VECTOR
    for n in range(VECTOR - 1):  # +0.0 on the lowest bank
        at = np.flatnonzero(padding > n)
        bank = heights[at].argmin(axis=1)
        place = places.reshape(_BANKS, _DEPTH)[bank, free[at, bank]]
        stacks[at, bank, heights[at, bank]] = place << 16
        heights[at, bank] += 1
    held = levels < heights[:, :, None]
    counts = heights.sum(axis=1)
    rank = np.cumsum(held, axis=1, dtype=np.int16)  # within a level, from 1
    above = counts[:, None] - np.cumsum(rank[:, -1], axis=1, dtype=np.int16)
    turn = (rank + above[:, None].astype(np.int16) - 1)[held]
    places = _place_in_vectors(turn.astype(np.int32), counts)
    entries = np.empty(len(turn), np.uint32)
    entries[places] = stacks[held]
    return entries, counts


def _place_in_vectors(turn: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Where the entries that are taken at each turn lie, in tiles of so many.

    Vectors that fill no round of 32 are taken first and lie last; each list is written
    from its end.
    """
    rounds, tail = np.divmod(counts // VECTOR, _BANKS)
    start = np.cumsum(counts) - counts
    rounds, tail, start = (np.repeat(a, counts) for a in (rounds, tail, start))
    early = turn < VECTOR * tail
    late = turn - VECTOR * tail
    width = np.where(early, np.maximum(tail, 1), _BANKS)
    within = np.where(early, turn, late % (VECTOR * _BANKS))
    number, lane = np.divmod(within, width)
    back = np.where(early, rounds, rounds - 1 - late // (VECTOR * _BANKS))
    return start + back * VECTOR * _BANKS + lane * VECTOR + VECTOR - 1 - number


def unpack(matrix: TiledCSL) -> np.ndarray:
    """W [out, in]; what is not stored, and padding, is +0.0."""
    down, across = count_tiles((matrix.outputs, matrix.inputs), ROWS, COLUMNS)
    starts = np.asarray(matrix.offsets[:-1]).astype(np.int64) * VECTOR
    entries = np.asarray(matrix.entries[: starts[-1]])
    tile = np.repeat(np.arange(down * across), np.diff(starts))
    bits, place = (entries & 0xFFFF).astype(np.uint16), (entries >> 16).astype(np.int64)
    r = place // COLUMNS
    row = tile // across * ROWS + r
    column = tile % across * COLUMNS + (place % COLUMNS ^ (r % 8 * 8))
    dense = np.zeros((down * ROWS, across * COLUMNS), np.uint16)
    kept = (bits & 0x7FFF) != 0
    dense[row[kept], column[kept]] = bits[kept]
    return dense[: matrix.outputs, : matrix.inputs].view(np.dtype(matrix.dtype))


def check(matrix: TiledCSL) -> None:
    """Refuses arrays that no packer makes, of one matrix, on the host.

    Raises:
      ValueError: names the array and its rule.
    """
    down, across = count_tiles((matrix.outputs, matrix.inputs), ROWS, COLUMNS)
    offsets, entries = np.asarray(matrix.offsets), np.asarray(matrix.entries)
    if offsets.shape != (down * across + 2,):
        raise ValueError(
            f"offsets have shape {offsets.shape}, for {down * across} tiles"
        )
    steps = np.diff(offsets.astype(np.int64))
    if offsets[0] != 0 or steps.min() < 0 or steps.max() > _SIZE // VECTOR or steps[-1]:
        raise ValueError(
            "offsets do not begin with 0, rise by 0 to 2,048 vectors a tile and end "
            "with the end twice"
        )
    if offsets[-1] * VECTOR > entries.size:
        raise ValueError(
            f"offsets end at entry {offsets[-1] * VECTOR}, of {entries.size} entries"
        )
    if entries.size and (entries >> 16).max() >= _SIZE:
        raise ValueError(f"entries name places beyond the {_SIZE} of a tile")
    # A place twice would be a value that is lost; padding may repeat a place.
    used = entries[: offsets[-1] * VECTOR]
    used_tile = np.repeat(np.arange(down * across), steps[:-1] * VECTOR)
    whole = used_tile * _SIZE + (used >> 16)
    whole = whole[(used & 0x7FFF) != 0]
    if np.bincount(whole, minlength=1).max() > 1:
        raise ValueError("entries name a place of a tile twice")


def decode(matrix: TiledCSL, dtype: DTypeLike | None = None) -> Float[Array, "out in"]:
    """`unpack` of one matrix in JAX."""
    down, across = count_tiles((matrix.outputs, matrix.inputs), ROWS, COLUMNS)
    number = jnp.arange(matrix.entries.shape[0], dtype=jnp.int32) // VECTOR
    tile = jnp.searchsorted(matrix.offsets[:-1], number, side="right") - 1
    # Beyond a layer's own entries, up to those of the longest: nowhere.
    tile = jnp.where(number < matrix.offsets[-1], tile, down * across)
    place = (matrix.entries >> 16).astype(jnp.int32)
    r = place // COLUMNS
    row = tile // across * ROWS + r
    column = tile % across * COLUMNS + (place % COLUMNS ^ (r % 8 * 8))
    bits = (matrix.entries & 0xFFFF).astype(jnp.uint16)
    # Padding may repeat a place that holds a zero, with a zero.
    row = jnp.where((bits & 0x7FFF) != 0, row, down * ROWS)
    dense = jnp.zeros((down * ROWS, across * COLUMNS), jnp.uint16)
    dense = dense.at[row, column].set(bits, mode="drop")
    dense = dense[: matrix.outputs, : matrix.inputs]
    values = jax.lax.bitcast_convert_type(dense, jnp.dtype(matrix.dtype))
    return values if dtype is None else values.astype(dtype)
