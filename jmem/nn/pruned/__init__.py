"""Linear maps kept as sparse matrices, expanded where they are used.

Idea     A pruned map holds its non-zeros and where they are; the product expands it, on
         the chip where there is a kernel (`jmem.kernels.spmm`), else one map at a time.
Memory   Bytes as the formats say. While it is used without a kernel, a map takes
         [out, in] in x's dtype besides.
See      frag_bitmap.py, tiled_csl.py, tca_bme.py (the formats), jmem/nn/quantised.py
         (the door), jmem/sparse/flash_llm.py (who makes them),
         tests/sparse/test_formats.py, test_leaf.py

A sparse leaf has lost "kernel" [L, in, out]; in its place leaf["sparse"] is one of the
dataclasses, whose arrays have layers on axis 0.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jmem.kernels.spmm import FragBitmap, spmm
from jmem.kernels.spmm import decode as decode_frag_bitmap
from jmem.nn.linear import tie
from jmem.nn.pruned import frag_bitmap, tca_bme, tiled_csl
from jmem.nn.pruned.tca_bme import TcaBme
from jmem.nn.pruned.tiled_csl import TiledCSL

Matrix = FragBitmap | TiledCSL | TcaBme


class Format(NamedTuple):
    """What can be done with one format's matrices."""

    make: type
    pack: Callable[[np.ndarray], Any]
    """A float matrix [out, in] on the host, as NumPy arrays."""
    unpack: Callable[[Any], np.ndarray]
    """And back."""
    check: Callable[[Any], None]
    """Refuses what no packer makes."""
    decode: Callable[..., jax.Array]
    """`unpack` in JAX: (matrix, dtype)."""
    arrays: tuple[str, ...]
    """Fields that are arrays; the first is as long as the layer needs."""
    sizes: tuple[str, ...]
    """Fields that are known without arrays."""
    ties: str
    """The array that holds the places."""


FORMATS: Mapping[str, Format] = {
    "FragBitmap": Format(
        FragBitmap,
        frag_bitmap.pack,
        frag_bitmap.unpack,
        frag_bitmap.check,
        decode_frag_bitmap,
        ("values", "masks", "prefixes", "starts", "scales"),
        ("outputs", "inputs", "cap"),
        "masks",
    ),
    "TiledCSL": Format(
        TiledCSL,
        tiled_csl.pack,
        tiled_csl.unpack,
        tiled_csl.check,
        tiled_csl.decode,
        ("entries", "offsets"),
        ("outputs", "inputs", "dtype"),
        "entries",
    ),
    "TcaBme": Format(
        TcaBme,
        tca_bme.pack,
        tca_bme.unpack,
        tca_bme.check,
        tca_bme.decode,
        ("values", "bitmaps", "group_offsets", "median_offsets"),
        ("outputs", "inputs"),
        "bitmaps",
    ),
}
"""By the names that folders and settings use."""


def find_format(matrix: Any) -> Format:
    """What can be done with this matrix."""
    return FORMATS[type(matrix).__name__]


def find_shape(matrix: Any) -> tuple[int, ...]:
    """[*L, in, out] of the kernel that it stands for."""
    places = getattr(matrix, find_format(matrix).ties)
    own = 1 if isinstance(matrix, TiledCSL) else 2
    return (*places.shape[: places.ndim - own], matrix.inputs, matrix.outputs)


def count_bytes(matrix: Any) -> int:
    """Bytes of the arrays, or of what is described."""
    leaves = jax.tree.leaves(matrix)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def decode(matrix: Any, dtype: DTypeLike | None = None) -> Float[Array, "out in"]:
    """W of one layer's matrix; None: in the dtype of its values, integers float32."""
    return find_format(matrix).decode(matrix, dtype)


def multiply(name: str, x: jax.Array, matrix: Any) -> jax.Array:
    """The product x @ W.T of one layer's matrix, in x's dtype.

    Its backward pass gives the gradient of x, expanding again; none of the values.

    Raises:
      ValueError: x is not as wide as the matrix.
    """
    if x.shape[-1] != matrix.inputs:
        raise ValueError(
            f"linear: the input of map {name!r} is {x.shape[-1]} wide, but its sparse "
            f"matrix has {matrix.inputs} inputs. They are another model's."
        )
    return _multiply(x, matrix)


def _expand_after(x: jax.Array, matrix: Any) -> Any:
    """`matrix`, which XLA cannot expand before `x` is computed."""
    name = find_format(matrix).ties
    leaves, tree = jax.tree.flatten_with_path(matrix)
    tied = [
        tie(x, leaf) if path[-1] == jax.tree_util.GetAttrKey(name) else leaf
        for path, leaf in leaves
    ]
    return jax.tree.unflatten(tree, tied)


def _product(x: jax.Array, matrix: Any) -> jax.Array:
    if x.size == x.shape[-1]:  # a single row: no dot, for which XLA writes W twice
        wide = decode(matrix, jnp.float32) * x.reshape(1, -1).astype(jnp.float32)
        return wide.sum(-1).astype(x.dtype).reshape(*x.shape[:-1], -1)
    if isinstance(matrix, FragBitmap):
        return spmm(x, matrix)
    return jnp.einsum("...i,oi->...o", x, decode(matrix, x.dtype))


@jax.custom_vjp
def _multiply(x, matrix):
    return _product(x, _expand_after(x, matrix))


def _multiply_forward(x, matrix):
    return _multiply(x, matrix), matrix


def _multiply_backward(matrix, dy):
    zeros = jnp.zeros((*dy.shape[:-1], matrix.inputs), dy.dtype)
    _, pull = jax.vjp(lambda x: _product(x, _expand_after(dy, matrix)), zeros)
    return *pull(dy), None


_multiply.defvjp(_multiply_forward, _multiply_backward)


# Layers, on the host ------------------------------------------------------------------


def stack(matrices: list[Any]) -> Any:
    """One matrix of all layers, as NumPy arrays; `matrices` is emptied meanwhile.

    Layers whose values need less room than the longest's end in zeros.
    """
    own = find_format(matrices[0])
    longest = own.arrays[0]
    sizes = {name: getattr(matrices[0], name) for name in own.sizes}
    needed = [getattr(matrix, longest).shape[0] for matrix in matrices]
    if "cap" in sizes:
        caps = [matrix.cap for matrix in matrices]
        sizes["cap"] = max(caps)
        needed = [n - cap + max(caps) for n, cap in zip(needed, caps, strict=True)]
    first = {name: getattr(matrices[0], name) for name in own.arrays}
    arrays = {
        name: None
        if array is None
        else make_zeros(
            (
                len(matrices),
                *((max(needed), *array.shape[1:]) if name == longest else array.shape),
            ),
            array.dtype,
        )
        for name, array in first.items()
    }
    del first
    for layer in range(len(matrices)):
        matrix = matrices.pop(0)
        for name, array in arrays.items():
            if array is not None:
                row = getattr(matrix, name)
                array[layer, : len(row)] = row
    return own.make(**arrays, **sizes)


def make_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that take no memory before they are written, and that JAX need not copy."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def take_layer(matrix: Any, layer: int) -> Any:
    """One layer of a stacked matrix."""
    return jax.tree.map(lambda array: array[layer], matrix)
