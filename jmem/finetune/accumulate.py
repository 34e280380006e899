"""A batch in parts, one after another: the gradient of all, the activations of one.

Memory   Activations of batch / parts sequences; gradients in float32, where one part
         alone would keep them in their parameters' dtype.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmem.data.batch import Batch


def accumulated(
    gradients: Callable[[Batch, Any], tuple[jax.Array, Any]], batch: Batch, parts: int
) -> tuple[jax.Array, Any]:
    """(loss, gradients) of the whole batch from those of its `parts`.

    `gradients(part, number)` gives means over the part's weights; they are summed by
    each part's share of all weights, so that the result is the mean over the batch.
    Sums are float32. One part is the batch itself, and nothing is added.

    Raises:
      ValueError: the batch's sequences cannot be divided into so many parts.
    """
    if parts == 1:
        return gradients(batch, 0)
    sequences = batch.tokens.shape[0]
    if sequences % parts:
        raise ValueError(
            f"accumulate={parts} does not divide a batch of {sequences} sequences; "
            "choose a divisor of it."
        )
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    total = jnp.maximum(jnp.sum(batch.weights.astype(jnp.float32)), 1.0)

    def add(sums, numbered):
        number, part = numbered
        share = jnp.sum(part.weights.astype(jnp.float32)) / total
        found = gradients(part, number)
        return jax.tree.map(
            lambda s, g: s + share * g.astype(jnp.float32), sums, found
        ), None

    first = jax.tree.map(lambda x: x[0], split)
    like = jax.eval_shape(gradients, first, jnp.int32(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), like)
    numbers = jnp.arange(parts, dtype=jnp.int32)
    return jax.lax.scan(add, zeros, (numbers, split))[0]


def check_parts(name: str, parts: int) -> None:
    """For the `accumulate` field of a finetuner."""
    if parts < 1:
        raise ValueError(f"{name}: accumulate={parts} must be at least 1.")
