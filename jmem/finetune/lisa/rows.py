"""An optimizer's state for each of several blocks, as rows of stacked arrays."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def take_rows(stacked: Any, active: Int[Array, " S"]) -> Any:
    """Rows `active` of every leaf: [S, ...]."""
    return jax.tree.map(lambda leaf: leaf[active], stacked)


def put_rows(stacked: Any, active: Int[Array, " S"], rows: Any) -> Any:
    """`stacked` with rows `active` replaced, in place when it is donated."""

    def put(leaf, value):
        value = value.astype(leaf.dtype)
        return leaf.at[active].set(
            value,
            unique_indices=True,
            indices_are_sorted=True,
            mode="promise_in_bounds",
        )

    return jax.tree.map(put, stacked, rows)


def init_rows(inner, blocks: Any, rows: int) -> Any:
    """`inner`'s state for `rows` blocks: each has its own moments and step count."""
    like = jax.tree.map(lambda p: jnp.zeros((rows, *p.shape[1:]), p.dtype), blocks)
    return jax.vmap(inner.init)(like)


def restart(fresh: jax.Array | bool, start: Any, state: Any) -> Any:
    """`start` where the scalar `fresh` holds, else `state`."""
    return jax.tree.map(lambda a, b: jnp.where(fresh, a, b), start, state)


def update_rows(inner, rows_of_all, fresh, active, grads, optimizer, params):
    """`inner` on every active block: (updates [S, ...], optimizer).

    `params`, as `grads`, are the rows of active blocks. The state of a block lives in
    row `layer` if there is one for each, else in row `slot`, where a draw starts it
    afresh.
    """
    if rows_of_all:
        own = take_rows(optimizer, active)
        updates, rows = jax.vmap(inner.update)(grads, own, params)
        return updates, put_rows(optimizer, active, rows)
    start = init_rows(inner, params, active.shape[0])
    return jax.vmap(inner.update)(grads, restart(fresh, start, optimizer), params)
