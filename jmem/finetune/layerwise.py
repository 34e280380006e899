"""A backward pass that makes the gradients of chosen blocks only.

Differentiating "the active blocks" automatically saves what *both* kinds of block need,
or makes all gradients and drops most. Written by hand it is short: the forward scan
keeps each block's input; the reverse scan makes a block's output gradient into its
input gradient (`jmem.finetune.walk`) and, inside a `lax.cond`, parameter gradients if
the block holds a slot. Which blocks do is data, so changing them compiles nothing.

Memory   L*B*T*M activations, one block's internals, and gradients of `slots` blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmem.finetune.patterns import join, split
from jmem.finetune.walk import Blocks
from jmem.models.next_token import find_positions, mean_head_loss
from jmem.nn.stack import depth
from jmem.program import by_key, nest


def put_row(stacked: Any, layer: jax.Array, value: Any) -> Any:
    """`stacked` with row `layer` of every leaf replaced (in place when donated)."""
    return jax.tree.map(
        lambda s, v: jax.lax.dynamic_update_index_in_dim(s, v, layer, 0), stacked, value
    )


def make_slot_gradients(
    model,
    params: dict,
    batch,
    active: Int[Array, " S"],
    train: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], dict, Any]:
    """Loss and gradients of everything outside the blocks and of the `active` blocks.

    `active` holds distinct block indices in any order; S = 0 is allowed. Returns (loss,
    gradients of `params` without "blocks", gradients of the blocks with leaves
    [S, ...] in the order of `active`), each in its parameter's dtype. With patterns
    `train` (`jmem.finetune.patterns`), what they don't mean is None in both. The loss
    is `jmem.models.next_token.next_token_loss`.
    """
    chosen, rest = split(params, train, "make_slot_gradients: train")
    slots = active.shape[0]
    blocks = Blocks(model, find_positions(batch))

    def embed(table):
        table = join(table, rest["embed"])
        return model.embed(params | {"embed": table}, batch.tokens, blocks.positions)

    def head(p, x):
        p = join(p, model.head_params(rest))
        return mean_head_loss(model, model.ops, p, x, batch)

    x, embed_transpose = jax.vjp(embed, chosen["embed"])
    x, inputs, aux = blocks.forward(x, params["blocks"])
    loss, (d_head, dx) = jax.value_and_grad(head, argnums=(0, 1))(
        model.head_params(chosen), x
    )

    layers = jnp.arange(depth(params["blocks"]), dtype=jnp.int32)
    slot_of = jnp.full(layers.shape, -1, jnp.int32)
    slot_of = slot_of.at[active].set(jnp.arange(slots, dtype=jnp.int32))

    def backward(state, xs):
        (dx, grads), (layer, slot, p, q, x) = state, xs
        dx, sides = blocks.pull_back(
            by_key(p), lambda flat: join(nest(flat, p), q), x, layer, dx
        )

        def put():
            made = blocks.make_gradients(join(p, q), sides)
            return put_row(grads, slot, nest(made, p))

        if slots:
            grads = jax.lax.cond(slot >= 0, put, lambda: grads)
        return (dx, grads), None

    p, q = chosen["blocks"], rest["blocks"]
    zeros = jax.tree.map(lambda p: jnp.zeros((slots, *p.shape[1:]), p.dtype), p)
    (dx, d_blocks), _ = jax.lax.scan(
        backward, (dx, zeros), (layers, slot_of, p, q, inputs), reverse=True
    )
    d_table = embed_transpose(dx)[0]
    if "embed" in d_head and d_table["embedding"] is not None:  # tied: read twice
        read = d_head["embed"]["embedding"]
        d_table = d_table | {"embedding": d_table["embedding"] + read}
    return loss + jnp.sum(aux), d_head | {"embed": d_table}, d_blocks
