"""What attention says of a token: how much of it the last queries spend there."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Reduce = Literal["mean", "max", "sum"]
Pooling = Literal["average", "max"]

BLOCK = 8192
"""Keys whose scores exist at a time."""


def column_mass(
    queries: Float[Array, "B W H D"],
    at: Int[Array, "B W"],
    keys: Float[Array, "B T K D"],
    block: int = BLOCK,
) -> Float[Array, "B H T"]:
    """Attention that W queries at positions `at` pay each key, summed over them.

    The column sums of softmax(q kᵀ / sqrt(D)), causal: a key is seen from its own
    position on. A query at a negative position is none. Float32; the scores of `block`
    keys exist at a time, B * H * W * block * 4 bytes. Two passes read the keys twice.
    """
    batch, width, heads, dim = queries.shape
    length, groups = keys.shape[1], keys.shape[2]
    queries = queries.reshape(batch, width, groups, -1, dim) * dim**-0.5
    blocks = -(-length // block)
    size = -(-length // blocks)
    last = length - size

    def scores(index):
        """Of one block: [B, K, G, W, size]; the last begins where it still fits."""
        begin = jnp.minimum(index * size, last)
        part = jax.lax.dynamic_slice_in_dim(keys, begin, size, axis=1)
        raw = jnp.einsum(
            "bwkgd,bskd->bkgws", queries, part, preferred_element_type=jnp.float32
        )
        tokens = begin + jnp.arange(size, dtype=jnp.int32)
        seen = tokens[None, None] <= at[:, :, None]
        return begin, tokens, jnp.where(seen[:, None, None], raw, -jnp.inf)

    def accumulate(running, index):
        _, tokens, raw = scores(index)
        fresh = tokens >= index * size  # the last block may overlap the one before
        raw = jnp.where(fresh[None, None, None, None], raw, -jnp.inf)
        return jnp.logaddexp(running, jax.nn.logsumexp(raw, axis=-1)), None

    def distribute(mass, index):
        begin, _, raw = scores(index)
        part = jnp.exp(raw - total[..., None]).sum(axis=3)
        return jax.lax.dynamic_update_slice_in_dim(mass, part, begin, axis=3), None

    shape = (batch, groups, heads // groups)
    indices = jnp.arange(blocks, dtype=jnp.int32)
    nothing = jnp.full((*shape, width), -jnp.inf, jnp.float32)
    total, _ = jax.lax.scan(accumulate, nothing, indices)
    total = jnp.where(total > -jnp.inf, total, 0.0)
    mass = jnp.zeros((*shape, length), jnp.float32)
    mass, _ = jax.lax.scan(distribute, mass, indices)
    return mass.reshape(batch, heads, length)


def reduce_heads(
    mass: Float[Array, "B H T"], units: int, reduce: Reduce
) -> Float[Array, "B U T"]:
    """Scores of H heads reduced to `units`; neighbours share one, as they do keys."""
    batch, heads, length = mass.shape
    groups = mass.reshape(batch, units, heads // units, length)
    return getattr(jnp, reduce)(groups, axis=2)


def pool(
    scores: Float[Array, "B U T"], kernel: int, pooling: Pooling
) -> Float[Array, "B U T"]:
    """Each score with its neighbours': their sum over `kernel`, or their maximum.

    Beyond both ends lies zero (average), or nothing (max), as in PyTorch.
    """
    start = 0.0 if pooling == "average" else -jnp.inf
    pooled = jax.lax.reduce_window(
        scores,
        start,
        jax.lax.add if pooling == "average" else jax.lax.max,
        (1, 1, kernel),
        (1, 1, 1),
        "SAME",
    )
    return pooled / kernel if pooling == "average" else pooled


def average_windows(
    scores: Float[Array, "... T"], window: int, best: int = 0
) -> Float[Array, "... N"]:
    """Mean score of each `window` consecutive tokens, or of its `best` ones (0: all).

    The last window may have fewer tokens. One whose score is -inf is not there and does
    not count; a window with none that is there has -inf.
    """
    short = (0, -scores.shape[-1] % window)
    scores = jnp.pad(
        scores, (*[(0, 0)] * (scores.ndim - 1), short), constant_values=-jnp.inf
    )
    scores = scores.reshape(*scores.shape[:-1], -1, window)
    if 0 < best < window:
        scores = jax.lax.top_k(scores, best)[0]
    there = scores > -jnp.inf
    count = there.sum(axis=-1)
    mean = jnp.where(there, scores, 0.0).sum(axis=-1)
    mean /= jnp.maximum(count, 1).astype(jnp.float32)
    return jnp.where(count > 0, mean, -jnp.inf)
