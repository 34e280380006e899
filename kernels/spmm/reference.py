"""The definition, in plain jax.numpy: decode to a dense matrix, multiply.

It is what `implementation="xla"` runs. The dense matrix is a temporary of outputs *
inputs * itemsize bytes, one at a time in a loop over layers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from jmem.kernels.spmm.fragbitmap import SIDE, FragBitmap


def decode(matrix: FragBitmap, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
    """The dense matrix or matrices, [*L, outputs, inputs].

    `dtype` is the values' own if None, float32 for integers, which are multiplied by
    their scales in float32.
    """
    if matrix.layers:
        return jax.vmap(lambda one: decode(one, dtype))(matrix)
    if matrix.scales is None:
        return decode_numbers(matrix, dtype or matrix.values.dtype)
    dense = decode_numbers(matrix, jnp.float32) * matrix.scales[:, None]
    return dense.astype(dtype or jnp.float32)


def decode_numbers(
    matrix: FragBitmap, dtype: DTypeLike, layer: ArrayLike | None = None
) -> Float[Array, "out in"]:
    """The dense matrix before it is scaled; of row `layer` of a stack."""
    found, row, column = locate(matrix, layer)
    at = (row, column) if layer is None else (layer, row, column)
    if matrix.bits == 4:
        pair = matrix.values[*at[:-1], column // 2].astype(jnp.int32)
        half = (pair >> (column % 2 * 4)) & 15
        numbers = ((half ^ 8) - 8).astype(dtype)  # two's complement
    else:
        numbers = matrix.values[at].astype(dtype)
    return untile(jnp.where(found, numbers, jnp.zeros((), dtype)), matrix)


def locate(matrix: FragBitmap, layer: ArrayLike | None = None):
    """Of each number [tiles, 64, 64]: whether it is stored, and its row and column."""
    masks, prefixes, starts = (
        x if layer is None else lax.dynamic_index_in_dim(x, layer, keepdims=False)
        for x in (matrix.masks, matrix.prefixes, matrix.starts)
    )
    column = jnp.arange(SIDE, dtype=jnp.uint32)
    bit = column % 8 // 2 * 16 + column // 8 * 2 + column % 2
    high, shift = (bit >= 32)[None, None], (bit % 32)[None, None]
    low_words, high_words = masks[:, :SIDE, None], masks[:, SIDE:, None]
    word = jnp.where(high, high_words, low_words)
    before = lax.population_count(word & ((jnp.uint32(1) << shift) - 1))
    before = before + jnp.where(high, lax.population_count(low_words), 0)
    place = prefixes[:, :, None].astype(jnp.int32) + before.astype(jnp.int32)
    row = starts[:-1, None, None] + place // SIDE
    return (word >> shift & 1) != 0, row, place % SIDE


def untile(tiles: Array, matrix: FragBitmap) -> Array:
    """[tiles, 64, 64] as [outputs, inputs]."""
    down, across = matrix.tiles
    whole = tiles.reshape(down, across, SIDE, SIDE).swapaxes(1, 2)
    whole = whole.reshape(down * SIDE, across * SIDE)
    return whole[: matrix.outputs, : matrix.inputs]


def multiply(
    x: Float[Array, "... in"], matrix: FragBitmap, layer: ArrayLike | None = None
) -> Float[Array, "... out"]:
    """Multiplies, x @ W.T, in x's dtype; products are summed and scaled in float32."""
    dense = decode_numbers(matrix, x.dtype, layer)
    y = jnp.einsum("...i,oi->...o", x, dense, preferred_element_type=jnp.float32)
    return (y * scales_of(matrix, y.ndim, layer)).astype(x.dtype)


def scales_of(matrix: FragBitmap, ndim: int, layer: ArrayLike | None) -> Array:
    """The scales with `ndim` axes, the last of the outputs; 1 for floats."""
    if matrix.scales is None:
        return jnp.ones((1,) * ndim, jnp.float32)
    scales = matrix.scales if layer is None else matrix.scales[layer]
    return scales.reshape((1,) * (ndim - 1) + scales.shape)


def transpose(
    x: Float[Array, "... in"],
    matrix: FragBitmap,
    layer: ArrayLike | None,
    dy: Float[Array, "... out"],
) -> tuple[Array, FragBitmap]:
    """Cotangents of x and of the matrix: of its values at the non-zeros, or its scales.

    What has no cotangent is None in the second one: bits, places, integers.
    """
    dense = decode_numbers(matrix, x.dtype, layer)
    wide = dy.astype(jnp.float32)
    scaled = (wide * scales_of(matrix, dy.ndim, layer)).astype(x.dtype)
    dx = jnp.einsum("...o,oi->...i", scaled, dense, preferred_element_type=jnp.float32)
    values = scales = None
    if matrix.scales is None:
        dense = jnp.einsum("...o,...i->oi", dy, x, preferred_element_type=jnp.float32)
        values = _encode(dense, matrix, layer)
    else:
        y = jnp.einsum("...i,oi->...o", x, dense, preferred_element_type=jnp.float32)
        scales = jnp.sum(wide * y, axis=tuple(range(dy.ndim - 1)))
        if layer is not None:
            scales = jnp.zeros_like(matrix.scales).at[layer].set(scales)
    leaves, tree = jax.tree.flatten(matrix)
    cotangents = jax.tree.unflatten(tree, [None] * len(leaves))
    object.__setattr__(cotangents, "values", values)
    object.__setattr__(cotangents, "scales", scales)
    return dx.astype(x.dtype), cotangents


def _encode(dense: Array, matrix: FragBitmap, layer: ArrayLike | None) -> Array:
    """Values that `decode_numbers` would read as `dense` where a number is stored."""
    down, across = matrix.tiles
    padding = (0, down * SIDE - matrix.outputs), (0, across * SIDE - matrix.inputs)
    whole = jnp.pad(dense, padding).reshape(down, SIDE, across, SIDE)
    tiles = whole.swapaxes(1, 2).reshape(-1, SIDE, SIDE).astype(matrix.values.dtype)
    found, row, column = locate(matrix, layer)
    shape, rows = found.shape, matrix.values.shape[-2]
    # Numbers that are not stored go to places beyond the array, each its own.
    beyond = rows + jnp.arange(shape[0] * SIDE, dtype=jnp.int32).reshape(-1, SIDE, 1)
    row = jnp.where(found, row, beyond)
    column = jnp.where(found, column, lax.broadcasted_iota(jnp.int32, shape, 2))
    at = (row, column) if layer is None else (layer, row, column)
    zeros = jnp.zeros_like(matrix.values)
    return zeros.at[at].set(tiles, mode="drop", unique_indices=True)
