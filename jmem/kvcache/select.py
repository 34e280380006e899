"""The choice of the best: a static number of slots, a traced number of tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def select(
    scores: Float[Array, "B U N"], count: Int[Array, "..."], size: int
) -> Int[Array, "B U size"]:
    """Indices of the `count` highest scores, ascending, -1 behind the last.

    `count` broadcasts against [B, U]. A score of -inf is never taken, so fewer may
    come. Of equal scores the lower index is taken.
    """
    choices = scores.shape[-1]
    best, indices = jax.lax.top_k(scores, min(size, choices))
    rank = jnp.arange(best.shape[-1], dtype=jnp.int32)
    count = jnp.broadcast_to(count, scores.shape[:2])[..., None]
    taken = (rank[None, None] < count) & (best > -jnp.inf)
    ascending = jnp.sort(jnp.where(taken, indices, choices), axis=-1)
    ascending = jnp.where(ascending < choices, ascending, -1).astype(jnp.int32)
    missing = ((0, 0), (0, 0), (0, size - best.shape[-1]))
    return jnp.pad(ascending, missing, constant_values=-1)
