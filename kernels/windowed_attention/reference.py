"""The definition, in plain jax.numpy: gather what is valid, attend in float32.

It is what `implementation="xla"` runs. The gathered keys and values are temporaries of
2 * B * K * (W * window + max_tail) * D * itemsize bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attend(
    q: Float[Array, "B H D"],
    keys: Float[Array, "N K S D"],
    values: Float[Array, "N K S D"],
    starts: Int[Array, "B W"],
    length: Int[Array, " B"],
    tail_start: Int[Array, " B"],
    tail_length: Int[Array, " B"],
    *,
    window: int,
    max_tail: int,
    scale: float,
) -> tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    """Output and log-sum-exp, float32; arguments as `windowed_attention` clamps them.

    Scores, softmax and sums are float32; weights are rounded to the values' dtype for
    the second product, as on a tensor core.
    """
    batch, heads, dim = q.shape
    inside = jnp.arange(window, dtype=jnp.int32)
    windows = (starts[:, :, None] + inside[None, None]).reshape(batch, -1)
    order = jnp.arange(windows.shape[1], dtype=jnp.int32)
    ahead = jnp.arange(max_tail, dtype=jnp.int32)
    slots = jnp.concatenate([windows, tail_start[:, None] + ahead[None]], axis=1)
    seen = jnp.concatenate(
        [order[None] < length[:, None], ahead[None] < tail_length[:, None]], axis=1
    )

    pools, kv_heads, _, _ = keys.shape
    of_row = (lambda x: x[0]) if pools == 1 else (lambda x: x)
    take = jax.vmap(
        lambda pool, at: jnp.take(pool, at, axis=1, mode="clip"),
        in_axes=(None if pools == 1 else 0, 0),
    )
    k, v = take(of_row(keys), slots), take(of_row(values), slots)  # [B, K, T, D]
    v = jnp.where(seen[:, None, :, None], v, 0)  # 0 * NaN would be NaN

    q = q.reshape(batch, kv_heads, -1, dim)
    scores = jnp.einsum("bkgd,bksd->bkgs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores * scale, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkgs,bksd->bkgd",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    out = jnp.where(total > 0, out / jnp.where(total > 0, total, 1.0), 0.0)
    lse = top + jnp.log(total)  # -inf where nothing is seen
    return out.reshape(batch, heads, dim), lse.reshape(batch, heads)


def merge(
    outs: Float[Array, "P B H D"], lses: Float[Array, "P B H *D"]
) -> tuple[Float[Array, "B H D"], Float[Array, "B H *D"]]:
    """One attention over P parts of the keys, from the attention over each; float32.

    A part that saw nothing has lse -inf and no weight. Written part by part: where the
    lses are as wide as the outputs XLA makes one launch of it (up to 66 parts, as seen
    in 0.12), and four of reductions over an axis of parts.
    """
    top = functools.reduce(jnp.maximum, lses)
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    weights = [jnp.exp(lse - shift) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    narrow = outs.ndim - lses.ndim  # axes
    along = functools.partial(jnp.expand_dims, axis=tuple(range(-narrow, 0)))
    weighted = [
        out.astype(jnp.float32) * along(weight)
        for out, weight in zip(outs, weights, strict=True)
    ]
    safe = along(jnp.where(total > 0, total, 1.0))
    return functools.reduce(jnp.add, weighted) / safe, shift + jnp.log(total)
