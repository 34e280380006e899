"""Blocks stacked on axis 0 from birth, walked by one `lax.scan`.

Freezing, offloading, streaming or evicting one layer is then array code on row
`layer` of every leaf, and compile time does not grow with depth.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jmem.nn.ops import Ops

Remat = Literal["none", "dots", "block"]


def depth(stacked: Any) -> int:
    """Layers in a stacked tree: the length of axis 0 of its leaves."""
    return jax.tree.leaves(stacked)[0].shape[0]


def row(stacked: Any, layer: jax.Array) -> Any:
    """The parameters of one layer; `layer` may be traced (out of range: clamped)."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stacked
    )


def init_stack(block: nn.Module, key: jax.Array, layers: int, *inputs: Any) -> Any:
    """Parameters of `layers` blocks, every leaf [layers, ...]."""
    return jax.vmap(lambda k: block.init(k, *inputs)["params"])(
        jax.random.split(key, layers)
    )


def rematerialise(step, remat: Remat):
    """`step` that keeps, for its backward pass, what `remat` allows.

    "none" keeps everything, "dots" keeps the results of matrix products, "block"
    keeps only the block's input and computes the rest again.
    """
    if remat == "none":
        return step
    policy = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "block": jax.checkpoint_policies.nothing_saveable,
    }[remat]
    # Inside a scan nothing can be merged across the fence, so it need not be guarded.
    return jax.checkpoint(step, policy=policy, prevent_cse=False)


def run_stack(
    block: Callable,
    stacked: Any,
    x: jax.Array,
    positions: jax.Array,
    ops: Ops,
    carry: Any = None,
    *,
    remat: Remat = "none",
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """Applies `block(layer_params, x, positions, layer, ops, carry)` to every row.

    Returns x, the carry after the last layer, and each entry of `aux` stacked to [L].

    A cache lives in `carry` and is addressed by the traced `layer`. Passed as scan
    inputs and outputs instead it would be held twice (see jmem.memory).
    """

    def step(state, xs):
        layer, params = xs
        x, carry, aux = block(params, state[0], positions, layer, ops, state[1])
        return (x, carry), aux

    layers = jnp.arange(depth(stacked), dtype=jnp.int32)
    (x, carry), aux = jax.lax.scan(
        rematerialise(step, remat), (x, carry), (layers, stacked)
    )
    return x, carry, aux
