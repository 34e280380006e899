"""A batch in parts, one after another: the gradient of all, the activations of one.

Memory   Activations of batch / parts sequences; gradients in float32, where one part
         alone would keep them in their parameters' dtype.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmem.models.contract import Batch


def accumulate[Found, Stats](
    gradients: Callable[[Any, Any, Stats], tuple[Found, Stats]],
    batch: Batch,
    parts: int,
    stats: Stats,
) -> tuple[Found, Stats]:
    """What `gradients` finds for the whole batch, from its `parts`, and statistics.

    `gradients(part, number, stats)` gives a tree of means over the part's weight (loss,
    gradients), which are summed by each part's share of the whole weight, so that the
    result is the mean over the batch. Sums are float32. Statistics go from part to
    part. One part is the batch itself, and nothing is added.

    Raises:
      ValueError: `parts` is below 1, or the batch cannot be divided into so many.
    """
    if parts < 1:
        raise ValueError(f"accumulate={parts} must be at least 1.")
    if parts == 1:
        return gradients(batch, 0, stats)
    split = batch.split(parts)
    total = jnp.maximum(batch.weight(), 1.0)

    def add(state, numbered):
        sums, stats = state
        number, part = numbered
        share = part.weight() / total
        found, stats = gradients(part, number, stats)
        sums = jax.tree.map(lambda s, g: s + share * g.astype(jnp.float32), sums, found)
        return (sums, stats), None

    first = jax.tree.map(lambda x: x[0], split)
    like, _ = jax.eval_shape(gradients, first, jnp.int32(0), stats)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), like)
    numbers = jnp.arange(parts, dtype=jnp.int32)
    return jax.lax.scan(add, (zeros, stats), (numbers, split))[0]
