"""Attention in rows that hold several documents, none of which sees another.

Idea    Positions start at 0 in every document, so a token's own position says how far
        back it may look: no mask is given, and none is made of a row. Scores exist for
        a block of queries and a block of keys at a time, with a running maximum and
        sum; blocks that share no document are passed over.
Memory  B*H*BLOCK*BLOCK scores at a time, in float32, and a copy of them in the dtype of
        q. Kept for the backward pass: the result, and B*H*T*4 bytes. In it: the
        gradients of k and v in float32, 2*B*T*K*D*4 bytes, which where every head has
        its own keys is more than cuDNN takes (two layers of LLaMA-2-7B, full, 4 x 2,048
        tokens: 1.4 % of the step); that of q takes the result's place.
Differs cuDNN can do it too, from compute capability 9.0 on, for a number of documents a
        row that is set beforehand and with statistics for so many rows. JAX (0.12)
        refuses to trace that for a GPU that is not there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 256
"""Queries, and keys, whose scores exist at the same time."""


class Packed(NamedTuple):
    """Positions in rows of several documents; attention stays within each.

    Stands where positions [B, T] of rows of one document do (`jmem.nn.ops`).
    """

    positions: Int[Array, "B T"]
    """0, 1, 2 ... in every document."""


def number_positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions from 0 in every document: every run of one number."""
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    changed = segments[:, 1:] != segments[:, :-1]
    starts = jnp.pad(jnp.where(changed, places[:, 1:], 0), ((0, 0), (1, 0)))
    return places - jax.lax.cummax(starts, axis=1)


def attend_packed(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    positions: Int[Array, "B T"],
    window: int | None = None,
    block: int | None = None,
) -> Float[Array, "B T H D"]:
    """Every token attends itself and as many before it as its position says.

    `window` limits it to the last `window` of these. Exact; scores, softmax and sums
    are float32, of `block` queries and keys at a time (None: BLOCK).
    """
    batch, length, heads, dim = q.shape
    back = positions if window is None else jnp.minimum(positions, window - 1)
    first = jnp.arange(length, dtype=jnp.int32)[None] - back
    block = min(block or BLOCK, length)
    more = ((0, 0), (0, -length % block))
    q = q.reshape(batch, length, k.shape[2], -1, dim)
    q, k, v = (jnp.pad(a, more + ((0, 0),) * (a.ndim - 2)) for a in (q, k, v))
    first = jnp.pad(first, more, mode="edge")
    out = _attend(q, k, v, first, block)
    return out[:, :length].reshape(batch, length, heads, dim)


@jax.custom_vjp
def take_rows(
    table: Float[Array, "V M"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T M"]:
    """`table[tokens]`, whose gradient is begun when that of the rows is there.

    Behind the loops of `attend_packed`, XLA (0.12) makes the zeros that rows are added
    to before the blocks' backward pass, and they lie beside its peak: these are made of
    what comes in. On a mesh, where that costs a copy, XLA's own are smaller.
    """
    return table[tokens]


def _take_rows_forward(table, tokens):
    return table[tokens], (table.shape, tokens)


def _take_rows_backward(residuals, rows):
    shape, tokens = residuals
    first = rows[0, 0, 0]
    zero = jnp.where(jnp.isfinite(first), first, 1) * 0
    return jnp.broadcast_to(zero, shape).at[tokens].add(rows), None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, first, block):
    """[B, T, H * D] of q [B, T, K, G, D], k and v [B, T, K, D], first [B, T]."""
    return _attend_forward(q, k, v, first, block)[0]


def _attend_forward(q, k, v, first, block):
    batch, length, heads, group, dim = q.shape
    lowest = _find_lowest(first, block)

    def attend_row(i, state):
        out, logs = state
        own, ahead = _take(q, i, block), _take(first, i, block)

        def add(n, state):
            top, total, mixed = state
            j = i - n  # its own block first: every query then has a finite maximum
            scores = _score(own, _take(k, j, block), ahead, i, j)
            higher = jnp.maximum(top, scores.max(-1))
            kept = jnp.exp(top - higher)
            weights = jnp.exp(scores - higher[..., None])
            more = _multiply("bkgts,bskd->bkgtd", weights, _take(v, j, block))
            mixed = mixed * kept[..., None] + more
            return higher, total * kept + weights.sum(-1), mixed

        shape = (batch, heads, group, block)
        zeros = jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, dim), jnp.float32)
        start = (jnp.full(shape, -jnp.inf, jnp.float32), *zeros)
        top, total, mixed = jax.lax.fori_loop(0, i - lowest[i] + 1, add, start)
        part = (mixed / total[..., None]).transpose(0, 3, 1, 2, 4).astype(q.dtype)
        return _put(out, part, i), _put(logs, top + jnp.log(total), i, axis=3)

    logs = jnp.zeros((batch, heads, group, length), jnp.float32)
    start = jnp.zeros_like(q), logs
    out, logs = jax.lax.fori_loop(0, length // block, attend_row, start)
    # Laid out for the product that reads it, or the backward pass would keep another.
    out = jax.lax.optimization_barrier(out.reshape(batch, length, -1))
    return out, (q, k, v, first, out, logs)


def _attend_backward(block, residuals, dout):
    q, k, v, first, out, logs = residuals
    lowest, scale = _find_lowest(first, block), q.shape[-1] ** -0.5
    wide = (dout.astype(jnp.float32) * out.astype(jnp.float32)).reshape(q.shape)
    inner = wide.sum(-1).transpose(0, 2, 3, 1)  # [B, K, G, T]
    dout = dout.reshape(q.shape)

    def attend_row(i, state):
        dq, dk, dv = state
        own, d_own = _take(q, i, block), _take(dq, i, block)  # still that of the result
        ahead = _take(first, i, block)
        sums, means = (_take(a, i, block, axis=3)[..., None] for a in (logs, inner))

        def add(j, state):
            d_queries, dk, dv = state
            keys, values = _take(k, j, block), _take(v, j, block)
            weights = jnp.exp(_score(own, keys, ahead, i, j) - sums)
            more = _multiply("bkgts,btkgd->bskd", weights, d_own)
            dv = _put(dv, _take(dv, j, block) + more, j)
            d_weights = _multiply("btkgd,bskd->bkgts", d_own, values) - means
            d_scores = weights * d_weights * scale
            more = _multiply("bkgts,btkgd->bskd", d_scores, own)
            dk = _put(dk, _take(dk, j, block) + more, j)
            d_queries += _multiply("bkgts,bskd->btkgd", d_scores, keys)
            return d_queries, dk, dv

        start = jnp.zeros(own.shape, jnp.float32), dk, dv
        d_queries, dk, dv = jax.lax.fori_loop(lowest[i], i + 1, add, start)
        return _put(dq, d_queries, i), dk, dv

    # Plain zeros would be made before the MLP's backward pass, and lie beside its peak
    # (XLA 0.12): these are made of what comes in.
    zeros = 0 * dout[:, :, :, 0].astype(jnp.float32)
    start = dout, zeros, zeros
    dq, dk, dv = jax.lax.fori_loop(0, lowest.size, attend_row, start)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _find_lowest(first, block):
    """[T / block]: the first block of keys that some query of each block sees."""
    return jnp.min(first.reshape(first.shape[0], -1, block), axis=(0, 2)) // block


def _score(queries, keys, first, i, j):
    """[B, K, G, block, block] of block i of queries and block j of keys; -inf: unseen.

    `first` [B, block] is the first key that each query sees.
    """
    block, scale = keys.shape[1], queries.shape[-1] ** -0.5
    places = jnp.arange(block, dtype=jnp.int32)
    rows, columns = (i * block + places)[:, None], (j * block + places)[None]
    seen = (columns <= rows)[None] & (columns[None] >= first[..., None])
    scores = _multiply("btkgd,bskd->bkgts", queries, keys) * scale
    return jnp.where(seen[:, None, None], scores, -jnp.inf)


def _multiply(spec, a, b):
    """The product of `a`, in the dtype of `b`, and `b`; sums and result float32."""
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _take(a, index, block, axis=1):
    return jax.lax.dynamic_slice_in_dim(a, index * block, block, axis)


def _put(a, part, index, axis=1):
    at = index * part.shape[axis]
    return jax.lax.dynamic_update_slice_in_dim(a, part.astype(a.dtype), at, axis)
