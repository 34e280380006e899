"""Which blocks train in a period: drawn anew, or each in its turn.

Drawn       LISA: every block as likely, or by weights. OwLore (Li et al., 2024,
            arXiv:2405.18380) weighs a block by its outliers: `outlier_weights`.
In turn     BAdam (Luo et al., 2024, arXiv:2404.02827): from the first block up, from
            the last one down, or through a new permutation each time. With one active
            block, its embedding and head frozen: Lisa(active_layers=1,
            order="reshuffled", train=("blocks",)).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jmem.program import by_key

Order = Literal["drawn", "ascending", "descending", "reshuffled"]


def draw(
    key: jax.Array, layers: int, active_layers: int, weights: tuple[float, ...] = ()
) -> Int[Array, " S"]:
    """`active_layers` distinct block indices, ascending, by Gumbel top-k.

    Without `weights` every block is drawn with probability active_layers / layers. With
    them, blocks are drawn one after another without replacement in proportion to
    `weights`.
    """
    scores = jax.random.gumbel(key, (layers,), jnp.float32)
    if weights:
        with np.errstate(divide="ignore"):
            scores += jnp.asarray(np.log(np.asarray(weights)), jnp.float32)
    return jnp.sort(jax.lax.top_k(scores, active_layers)[1]).astype(jnp.int32)


def choose_active(
    number: jax.Array,
    order: Order,
    key: jax.Array,
    layers: int,
    active_layers: int,
    weights: tuple[float, ...] = (),
) -> Int[Array, " S"]:
    """The blocks that train in period `number` (from 0), ascending and distinct.

    "ascending" and "descending" go round for ever, so a group may hold the last blocks
    and the first. A permutation is cut into groups of `active_layers`; of layers that
    these do not divide, other blocks sit out each time.
    """
    if order == "drawn":
        return draw(jax.random.fold_in(key, number), layers, active_layers, weights)
    places = jnp.arange(active_layers, dtype=jnp.int32)
    if order == "reshuffled" and active_layers:
        groups = layers // active_layers
        key = jax.random.fold_in(key, number // groups)
        places = places + number % groups * active_layers
        return jnp.sort(jax.random.permutation(key, layers)[places]).astype(jnp.int32)
    blocks = (number % layers * active_layers + places) % layers
    return jnp.sort(layers - 1 - blocks if order == "descending" else blocks)


def outlier_weights(params: dict, threshold: float = 13.0) -> tuple[float, ...]:
    """For `Lisa(weights=...)`: each block's share of outlying weights.

    Of the entries of its kernels, those whose size is more than `threshold` times the
    mean size in their kernel; OwLore's rule, which takes 13 to 19.

    Raises:
      ValueError: no block has any.
    """

    def outliers(kernel):
        size = jnp.abs(kernel.astype(jnp.float32))
        return jnp.sum(size > threshold * jnp.mean(size), dtype=jnp.int32)

    count = jax.jit(lambda stacked: jax.lax.map(outliers, stacked))
    kernels = [
        leaf
        for path, leaf in by_key(params["blocks"]).items()
        if path.endswith("/kernel")
    ]
    entries = sum(kernel[0].size for kernel in kernels)
    total = np.sum([np.asarray(count(kernel), np.int64) for kernel in kernels], axis=0)
    if not total.any():
        raise ValueError(
            f"outlier_weights: threshold={threshold:g} leaves no outlier in any block. "
            "Lower it."
        )
    return tuple(float(share) for share in total / entries)
