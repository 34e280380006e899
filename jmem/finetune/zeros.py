"""Pruned weights stay pruned: what is exactly 0 in a map of the blocks stays so.

Idea     No mask is stored: w == 0 is the mask, read where the weight is. The gradient
         is 0 there before anything sees it (norms, moments, the update), and so is the
         weight after the update. A weight that an update happens to make exactly 0 is
         one of them from then on.
LoRA     y = x W + s x (mask * A B), so that the merged matrix has the zeros of W. The
         product A B [in, out] exists in the activations' dtype, one map's at a time,
         and is made again in the backward pass, where its gradient is as large: rank 8
         of LLaMA-2-7B at 1,024 tokens takes 0.11 to 0.13 GiB more (13.28 without), a
         map of the MLP being 0.08.
Of maps  Only: biases, norms, embedding and head are trained where they are 0.
See      jmem/sparse/prune.py, tests/finetune/test_every_finetuner.py
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmem.nn.quantised import read_kernel
from jmem.program import format_path


def hold(values: jax.Array, weights: jax.Array) -> jax.Array:
    """`values`, but 0 where a weight is.

    Of no constant: JAX would take an array of zeros out of a rematerialised scan.
    """
    own = weights.astype(values.dtype)
    return jax.lax.select(weights.astype(bool), values, own)


def hold_maps(values: Any, params: Any) -> Any:
    """The tree `values`, 0 where a weight of the blocks' maps in `params` is.

    Both are as a model's parameters, None where something is not trained.
    """

    def leaf(path, own, weights):
        return hold(own, weights) if is_map(format_path(path)) else own

    return jax.tree.map_with_path(leaf, values, params)


def is_map(path: str) -> bool:
    """Whether the parameter at a path of the model is a linear map's of its blocks.

    >>> is_map("blocks/mlp/up/kernel"), is_map("head/kernel")
    (True, False)
    """
    return path.startswith("blocks/") and path.endswith("/kernel")


@jax.custom_vjp
def multiply_held(
    x: Float[Array, "*N in"],
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    leaf: dict[str, Any],
) -> Float[Array, "*N out"]:
    """The product with a b, which is 0 where the map of one layer is, packed or not.

    The map has no gradient.
    """
    return x @ _hold_product(a, b, leaf, x)


def _held_forward(x, a, b, leaf):
    return multiply_held(x, a, b, leaf), (x, a, b, leaf)


def _held_backward(residuals, dy):
    x, a, b, leaf = residuals
    rows = tuple(range(dy.ndim - 1))
    d_product = hold(jnp.tensordot(x, dy, (rows, rows)), _read_after(dy, leaf, a.dtype))
    d_a, d_b = d_product @ b.T, a.T @ d_product
    done = d_a[:1, :1] + d_b[:1, :1]  # d_product is no longer needed then
    return dy @ _hold_product(a, b, leaf, done).T, d_a, d_b, None


multiply_held.defvjp(_held_forward, _held_backward)


def _hold_product(a, b, leaf, first):
    """The product [in, out], made when the array `first` is there."""
    return hold(_wait(first, a) @ b, _read_after(first, leaf, a.dtype))


def _read_after(first, leaf, dtype):
    return _wait(first, read_kernel(leaf, dtype))


def _wait(first: jax.Array, values: jax.Array) -> jax.Array:
    """`values`, but XLA only knows when it has the array `first`.

    Left free, XLA (0.12) makes the products of all maps of a block at its start, and
    keeps them, or what is 0 in them, from the forward pass to the backward one.
    """
    value = first.reshape(-1)[0]
    never = (value > 1) & (value < -1)  # no pass of XLA knows
    return values + never.astype(values.dtype)
