"""FragBitmap: a sparse matrix in tiles of 64 x 64, ordered as tensor cores take it.

A tile is a bit a number, 64 offsets, and the numbers that are not zero, row by row.
Column c of a tile is bit

    ((c mod 8) div 2) * 16 + (c div 8) * 2 + c mod 2

of its row, and the row's numbers lie in the order of their bits. So what one thread of
a warpgroup multiplies, two neighbours of every eight columns, is 16 bits of one word
and a contiguous run of numbers; their place is two counts of bits away.

Bytes  of [out, in] with n numbers of b bytes: n * b, in/8 + in/32 a row, and a tile up
       to 63 numbers of padding and 4 for its start; once more the fullest tile.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

SIDE = 64
"""Rows, and columns, of a tile; and the numbers that `starts` and `cap` count in."""
FLOATS = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class FragBitmap:
    """The matrix W [outputs, inputs] of y = x @ W.T, or L of them, leading axis first.

    Tiles go row by row over the matrix, whose edges are padded by zeros. All layers of
    a stack have one `rows` and one `cap`. A pytree: what JAX makes of it is unchecked.

    Raises:
      TypeError: an array is of another dtype than its own.
      ValueError: an array's shape does not fit the others', or `starts`, if known on
        the host, name rows that are not there or more than `cap` of them.
    """

    values: Any
    """bfloat16, float16, float32 or int8 [*L, rows, 64], or uint8 [*L, rows, 32]: 4-bit
    integers in two's complement, two a byte, low half first. Zeros follow a tile's last
    number up to its next row, and `cap` rows of zeros the last tile."""
    masks: Any
    """uint32 [*L, tiles, 128]: the low words of the 64 rows, then their high words."""
    prefixes: Any
    """uint16 [*L, tiles, 64]: numbers of the tile before each of its rows."""
    starts: Any
    """int32 [*L, tiles + 1]: the row of `values` where a tile begins; the end."""
    scales: Any
    """float32 [*L, outputs], by which integers are multiplied; None for floats."""
    outputs: int
    inputs: int
    cap: int
    """Rows of `values` of the fullest tile, 1 where all are empty."""

    def __post_init__(self):
        check_shapes(self)
        if isinstance(self.starts, np.ndarray | jax.Array) and not isinstance(
            self.starts, Tracer
        ):
            _check_starts(self)

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles down and across."""
        return -(-self.outputs // SIDE), -(-self.inputs // SIDE)

    @property
    def layers(self) -> tuple[int, ...]:
        """The leading axes, () for one matrix."""
        return self.masks.shape[:-2]

    @property
    def bits(self) -> int:
        """Of one number."""
        width = self.values.shape[-1]
        return self.values.dtype.itemsize * 8 * width // SIDE


ARRAYS = ("values", "masks", "prefixes", "starts", "scales")
SIZES = ("outputs", "inputs", "cap")


def _flatten(matrix: FragBitmap):
    arrays = [(jax.tree_util.GetAttrKey(n), getattr(matrix, n)) for n in ARRAYS]
    return arrays, tuple(getattr(matrix, name) for name in SIZES)


def _unflatten(sizes, arrays) -> FragBitmap:
    """Unchecked: a tree's leaves may be anything, such as shardings or their sums."""
    matrix = object.__new__(FragBitmap)
    names = (*ARRAYS, *SIZES)
    for name, value in zip(names, (*arrays, *sizes), strict=True):
        object.__setattr__(matrix, name, value)
    return matrix


jax.tree_util.register_pytree_with_keys(FragBitmap, _flatten, _unflatten)


def check_shapes(matrix: FragBitmap) -> None:
    """Refuses arrays whose dtypes or shapes are not those of a FragBitmap.

    Raises:
      TypeError, ValueError: the array, what it is and what it must be are named.
    """
    for name in SIZES:
        value = getattr(matrix, name)
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(
                f"FragBitmap: {name}={value!r}; need an integer, 1 or more."
            )
    layers = tuple(matrix.masks.shape[:-2])
    down, across = matrix.tiles
    tiles = down * across
    of_values = str(matrix.values.dtype)
    if of_values not in (*FLOATS, "int8", "uint8"):
        raise TypeError(
            f"FragBitmap: values are {of_values}; need {', '.join(FLOATS)}, int8, or "
            "uint8 that hold two 4-bit integers."
        )
    integers = of_values in ("int8", "uint8")
    if integers != (matrix.scales is not None):
        raise ValueError(
            f"FragBitmap: values are {of_values} and scales are "
            f"{'missing' if integers else 'given'}; integers need them, floats none."
        )
    rows = matrix.values.shape[-2] if matrix.values.ndim > 1 else 0
    expected = {
        "values": (of_values, (rows, SIDE // 2 if of_values == "uint8" else SIDE)),
        "masks": ("uint32", (tiles, 2 * SIDE)),
        "prefixes": ("uint16", (tiles, SIDE)),
        "starts": ("int32", (tiles + 1,)),
    }
    if integers:
        expected["scales"] = ("float32", (matrix.outputs,))
    for name, (dtype, shape) in expected.items():
        array = getattr(matrix, name)
        if str(array.dtype) != dtype:
            raise TypeError(f"FragBitmap: {name} are {array.dtype}; need {dtype}.")
        if tuple(array.shape) != (*layers, *shape):
            raise ValueError(
                f"FragBitmap: {name} have shape {tuple(array.shape)}; need "
                f"{(*layers, *shape)}, as outputs={matrix.outputs} and "
                f"inputs={matrix.inputs} are {tiles} tiles, and the masks' leading "
                f"axes are {layers}."
            )


def check(matrix: FragBitmap) -> None:
    """Refuses contents that no packer makes, for the host: it waits for the arrays.

    Raises:
      TypeError, ValueError: as at construction; or the prefixes are not the counts of
        the masks' bits, or a tile has fewer rows than its bits need. The first such
        tile is named.
    """
    check_shapes(matrix)
    _check_starts(matrix)
    masks, prefixes = np.asarray(matrix.masks), np.asarray(matrix.prefixes)
    ones = np.bitwise_count(masks).astype(np.int32)
    counts = ones[..., :SIDE] + ones[..., SIDE:]
    ends = np.cumsum(counts, axis=-1)
    wrong = (prefixes != ends - counts).any(axis=-1)
    _refuse(wrong, "prefixes are not the numbers that its masks put before each row")
    rows = np.diff(np.asarray(matrix.starts), axis=-1)
    _refuse(
        rows * SIDE < ends[..., -1], "starts leave it fewer rows than its bits need"
    )


def _check_starts(matrix: FragBitmap) -> None:
    starts = np.asarray(matrix.starts)
    rows = np.diff(starts, axis=-1)
    room = matrix.values.shape[-2] - matrix.cap
    _refuse(
        (rows < 0) | (rows > matrix.cap) | (starts[..., :-1] < 0),
        f"starts give it {{}} rows of values; need 0 to cap={matrix.cap}",
        rows,
    )
    if starts.size and starts.max() > room:
        raise ValueError(
            f"FragBitmap: starts end at row {starts.max()}; need {room} or less, as "
            f"there are {matrix.values.shape[-2]} rows of values, the last "
            f"cap={matrix.cap} of them zeros."
        )


def _refuse(wrong: np.ndarray, rule: str, found: np.ndarray | None = None) -> None:
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        words = rule if found is None else rule.format(found[at])
        raise ValueError(f"FragBitmap: at tile {list(at)}, {words}.")
