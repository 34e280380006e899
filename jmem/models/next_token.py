"""Next-token cross-entropy whose logits exist for one chunk of tokens at a time.

Idea    The head is the only place where activations grow with the vocabulary. Its loss
        is a sum over tokens, so a chunk's logits, its loss and its gradient can be made
        and dropped before the next chunk: [B, T, V] never exists, in any dtype.
Memory  CHUNK * V * (4 + itemsize) bytes of logits and their gradient, and one gradient
        of the head's weight in float32 when somebody differentiates it.
Mesh    Every device takes a chunk of its own tokens. Their activations are gathered,
        and each device has the logits of its part of the vocabulary; the head is not.
Differs The usual form recomputes the logits in the backward pass. Here the forward pass
        of a differentiated loss already computes the head's gradients, as nothing that
        follows can change them but a factor: one of three products less.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmem.nn.ops import Ops
from jmem.nn.packed import Packed, number_positions
from jmem.nn.stack import run_stack
from jmem.sharding import Layout, find_layout

CHUNK = 256
"""Tokens (of a device) whose logits exist at the same time."""


def _cut(array: jax.Array) -> jax.Array:
    """[N, ...] as [ceil(N / CHUNK), CHUNK, ...], padded with zeros (weight 0)."""
    length = array.shape[0]
    size = min(CHUNK, length)
    padding = -length % size
    array = jnp.pad(array, ((0, padding),) + ((0, 0),) * (array.ndim - 1))
    return array.reshape(-1, size, *array.shape[1:])


def _cut_by_device(layout: Layout | None, array: jax.Array) -> jax.Array:
    """`_cut`; on a mesh every chunk has CHUNK tokens of each device."""
    if layout is None:
        return _cut(array)
    devices = layout.count_token_parts(array.shape[0])
    array = layout.divide_tokens(array).reshape(devices, -1, *array.shape[1:])
    chunks = jax.vmap(_cut, out_axes=1)(array)
    return chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])


def _join(layout: Layout | None, chunks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_cut_by_device`: [N, M], of `length` tokens, from its chunks."""
    width = chunks.shape[-1]
    if layout is None:
        return chunks.reshape(-1, width)[:length]
    devices = layout.count_token_parts(length)
    split = chunks.reshape(chunks.shape[0], devices, -1, width).swapaxes(0, 1)
    split = split.reshape(devices, -1, width)[:, : length // devices]
    return split.reshape(length, width)


def _compute_chunk_loss(model, ops, head_params, x, targets, weights) -> jax.Array:
    layout = find_layout(model)
    with jax.named_scope("head_loss"):
        if layout is not None:
            x, targets, weights = map(layout.replicate, (x, targets, weights))
        logits = model.head(head_params, x, ops)
        if layout is None:
            logits = logits.astype(jnp.float32)
            picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        else:  # a lookup in divided logits would gather them
            logits = layout.divide(logits, -1).astype(jnp.float32)
            own = targets[:, None] == jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
            picked = jnp.sum(jnp.where(own, logits, 0), axis=-1)
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def head_loss(
    model,
    ops: Ops,
    head_params: dict,
    x: Float[Array, "N M"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
) -> Float[Array, ""]:
    """Sum over tokens of weight * -log p(target); float32.

    Differentiable with respect to `head_params` and `x` only.
    """

    def step(total, chunk):
        return total + _compute_chunk_loss(model, ops, head_params, *chunk), None

    chunks = tuple(_cut_by_device(find_layout(model), a) for a in (x, targets, weights))
    return jax.lax.scan(step, jnp.float32(0), chunks)[0]


def _head_loss_forward(model, ops, head_params, x, targets, weights):
    def step(state, chunk):
        total, sums = state
        x, targets, weights = chunk
        loss, gradients = jax.value_and_grad(
            lambda p, x: _compute_chunk_loss(model, ops, p, x, targets, weights),
            argnums=(0, 1),
        )(head_params, x)
        sums = jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, gradients[0])
        return (total + loss, sums), gradients[1]

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), head_params)
    layout = find_layout(model)
    chunks = tuple(_cut_by_device(layout, a) for a in (x, targets, weights))
    (total, sums), dx = jax.lax.scan(step, (jnp.float32(0), zeros), chunks)
    dx = _join(layout, dx, x.shape[0])
    d_head = jax.tree.map(lambda s, p: s.astype(p.dtype), sums, head_params)
    return total, (d_head, dx)


def _head_loss_backward(model, ops, residuals, cotangent):
    del model, ops

    def scale(gradient):
        return (gradient.astype(jnp.float32) * cotangent).astype(gradient.dtype)

    d_head, dx = jax.tree.map(scale, residuals)
    return d_head, dx, None, None


head_loss.defvjp(_head_loss_forward, _head_loss_backward)


def token_positions(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0 ... T-1 in every row."""
    row = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(row[None], tokens.shape)


def find_positions(batch) -> Int[Array, "B T"] | Packed:
    """`token_positions` of a batch; with segments, those of every document.

    `Packed` tells attention to stay within each.
    """
    if (segments := getattr(batch, "segments", None)) is None:
        return token_positions(batch.tokens)
    return Packed(number_positions(segments))


def mean_weights(batch) -> Float[Array, " N"]:
    """The batch's weights over their sum, or 1 if that is less; float32.

    The factor goes into the weights, so gradients are scaled where they are made.
    """
    weights = batch.weights.reshape(-1).astype(jnp.float32)
    return weights / jnp.maximum(jnp.sum(weights), 1.0)


def mean_head_loss(model, ops, head_params, x, batch) -> Float[Array, ""]:
    """`head_loss` of [B, T, M] activations, over the sum of the batch's weights."""
    x, weights = x.reshape(-1, x.shape[-1]), mean_weights(batch)
    return head_loss(model, ops, head_params, x, batch.targets.reshape(-1), weights)


def next_token_loss(
    model, params: dict, batch, ops: Ops | None = None
) -> Float[Array, ""]:
    """Mean cross-entropy in nats a token over the batch's weights, plus `aux` losses.

    `batch` is a `jmem.data.batch.Batch`; `ops` defaults to the model's own.
    """
    ops = model.ops if ops is None else ops
    positions = find_positions(batch)
    x = model.embed(params, batch.tokens, positions)
    x, _, aux = run_stack(
        model.block, params["blocks"], x, positions, ops, remat=model.remat
    )
    loss = mean_head_loss(model, ops, model.head_params(params), x, batch)
    return loss + sum(jnp.sum(value) for value in jax.tree.leaves(aux))
