"""A layer's sparse maps, multiplied where they lie in the stack of all layers.

A kernel is handed whole arrays: a row of a stack that a loop is at would be copied out
for it. So the stacks stay outside of the loop, and the kernel is told the layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jmem.kernels.spmm import FragBitmap, Implementation, spmm, unserved
from jmem.nn.linear import add_bias
from jmem.nn.maps import find_maps, replace_maps
from jmem.offload import is_on_host


def read_in_place(
    model: Any, blocks: Mapping[str, Any]
) -> tuple[Callable, Mapping[str, Any]]:
    """`model.block` and `blocks` for `jmem.nn.stack.run_stack`, for inference.

    Stacks of `FragBitmap`s that `model.sparse` serves are taken out of the blocks, and
    the block multiplies by them in place. Others, and those in host memory, stay.
    """
    how: Implementation | None = model.sparse
    maps = find_maps(blocks)
    stacks = {
        name: leaf["sparse"]
        for name, leaf in maps.items()
        if how is not None and leaf.keys() <= {"sparse", "bias"}
        if _is_served(leaf.get("sparse"), how, model.dtype)
    }
    if not stacks:
        return model.block, blocks

    def block(params, x, positions, layer, ops, carry):
        def linear(name, leaf, h):
            if name not in stacks:
                return ops.linear(name, leaf, h)
            y = spmm(h, stacks[name], layer=layer, implementation=how)
            return add_bias(leaf, y)

        own = ops._replace(linear=linear)
        return model.block(params, x, positions, layer, own, carry)

    # A map without a leaf would be none to flax.
    empty = {"elsewhere": jnp.zeros((model.config.layers, 0), jnp.int8)}
    rest = {
        name: {k: part for k, part in maps[name].items() if k != "sparse"} | empty
        for name in stacks
    }
    return block, replace_maps(blocks, rest)


def _is_served(matrix: Any, how: Implementation, dtype: Any) -> bool:
    if not isinstance(matrix, FragBitmap) or is_on_host(matrix.values):
        return False
    return how == "xla" or unserved(dtype, matrix.values.dtype) is None
