"""Blocks stacked on axis 0 from their initialisation on, run by one `lax.scan`.

Freezing, offloading, streaming or evicting one layer is then array code on row
`layer` of every leaf, and compile time does not grow with depth.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jmem.lowering import IN_PLACE
from jmem.nn.ops import Ops
from jmem.nn.packed import Packed
from jmem.nn.quantised import list_packed
from jmem.offload import count_host_bytes, fetch, fetch_row
from jmem.program import HOST, by_key

Remat = Literal["none", "dots", "block", "offload"]


def depth(stacked: Any) -> int:
    """Layers in a stacked tree: the length of axis 0 of its leaves."""
    return jax.tree.leaves(stacked)[0].shape[0]


def choose_options(state: Any) -> Mapping[str, Any]:
    """XLA's compile options for a training step that holds `state`.

    Those by which products read a stack in place (`jmem.lowering.IN_PLACE`); none where
    no row is read in place: packed weights (`jmem.nn.quantised`) are made at full width
    first, and weights on the host are fetched. With them a step of QLoRA takes 0.1 to
    0.8 % more, and one of LoRA over fetched weights up to 4.
    """
    leaves = by_key(state)
    weights = [leaf for path, leaf in leaves.items() if path.startswith("params/")]
    copied = list_packed(state) or count_host_bytes(weights)
    return {} if copied else IN_PLACE


def init_stack(block: nn.Module, key: jax.Array, layers: int, *inputs: Any) -> Any:
    """Parameters of `layers` blocks, every leaf [layers, ...]."""
    return jax.vmap(lambda k: block.init(k, *inputs)["params"])(
        jax.random.split(key, layers)
    )


def rematerialise(step, remat: Remat):
    """`step` that keeps, for its backward pass, what `remat` allows.

    "none" keeps everything, "dots" keeps the results of matrix products, "block"
    keeps only the block's input and computes the rest again, "offload" as "block" with
    the inputs in pinned host memory: B*T*M a block go over and come back.
    """
    if remat == "none":
        return step
    policies = jax.checkpoint_policies
    policy = {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "block": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_BLOCK_INPUT],
            offload_src="device",
            offload_dst=HOST,
        ),
    }[remat]
    # Inside a scan nothing can be merged across the fence, so it need not be guarded.
    return jax.checkpoint(step, policy=policy, prevent_cse=False)


_BLOCK_INPUT = "block_input"


def run_stack(
    block: Callable,
    stacked: Any,
    x: jax.Array,
    positions: jax.Array | Packed,
    ops: Ops,
    carry: Any = None,
    *,
    remat: Remat = "none",
    first: int = 0,
    last: int | None = None,
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """Applies `block(layer_params, x, positions, layer, ops, carry)` to every row.

    Returns x, the carry after the last layer, and each entry of `aux` stacked to [L].

    With `first` and `last` the layers from the one up to, but not, the other; None: all
    above. Between two ranges the number of tokens may change. A range's rows are read
    where they lie: a slice of a stack would be a copy of it.

    Rows of a stack in host memory are fetched one at a time, and once more for the
    backward pass unless `remat` is "none" (see `jmem.offload`).

    A cache lives in `carry` and is addressed by the traced `layer`. Passed as scan
    inputs and outputs instead it would be held twice (see jmem.memory).
    """
    layers = depth(stacked)
    last = layers if last is None else last
    if not 0 <= first <= last <= layers:
        raise ValueError(
            f"run_stack: first={first} and last={last} are no range of {layers} layers;"
            " need 0 <= first <= last <= layers."
        )
    whole = (first, last) == (0, layers)

    def step(state, params):
        layer, x, carry = state  # counted here: a GPU would fetch a number from a list
        x = checkpoint_name(x, _BLOCK_INPUT) if remat == "offload" else x
        params = fetch(params) if whole else fetch_row(stacked, layer)
        x, carry, aux = block(params, x, positions, layer, ops, carry)
        return (layer + 1, x, carry), aux

    (_, x, carry), aux = jax.lax.scan(
        rematerialise(step, remat),
        (jnp.int32(first), x, carry),
        stacked if whole else None,
        length=last - first,
    )
    return x, carry, aux
