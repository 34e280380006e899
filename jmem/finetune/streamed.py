"""AdamW whose moments live in host memory and visit the GPU a piece at a time.

Idea     AdamW updates each value from its own gradient and moments alone, so a leaf can
         be updated piece by piece: a stack of blocks by layers, a table by equal parts
         of its rows. A piece is fetched, updated and stored; its leaf stays behind.
Memory   Device: six float32 copies of the largest piece (moments before and after, the
         update, the gradient). Host: 8 bytes a trained parameter with float32 moments.
Traffic  Moments cross PCIe twice a step: 2 * 8 bytes a trained parameter.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jmem.finetune.adamw import AdamW, descend, scale
from jmem.finetune.zeros import hold, hold_maps, is_map
from jmem.offload import store, update_rows
from jmem.program import format_path

_PARTS = 32
"""Most parts that a table is cut into."""


def init_on_host(adamw: AdamW, trained: Any) -> Any:
    """Moments of every leaf [N, ...], as pieces [P, N / P, ...] or layers [L, ...].

    Each piece has its own step count, on the device. Made a piece at a time, since a
    value is made on the device before it is stored.
    """
    inner = adamw.direction()

    def leaf(path, value):
        def piece(_, rows):
            return None, store(inner.init(rows))

        return jax.lax.scan(piece, None, _cut(path, value))[1]

    return jax.tree.map_with_path(leaf, trained)


def stream_step(
    adamw: AdamW,
    loss: jax.Array,
    grads: Any,
    trained: Any,
    optimizer: Any,
    step: jax.Array,
    layers: int,
    keep_zeros: bool = False,
):
    """`adamw.gradient_step` with the moments of `init_on_host`: the same update.

    Returns (trained, optimizer, metrics).
    """
    factor, norm = adamw.clip_factor(hold_maps(grads, trained) if keep_zeros else grads)
    rate = adamw.rate(step)
    rates = adamw.find_leaf_rates(trained, rate, layers)

    def leaf(path, value, grad, rates, moments):
        rows, inner = _cut(path, value), adamw.direction(format_path(path))
        holds = keep_zeros and is_map(format_path(path))

        def update(held, grads, rates):
            rows, moments = held
            grads = hold(grads, rows) if holds else grads
            grads = scale(grads, factor)  # here, or clipped stacks would exist besides
            updates, moments = inner.update(grads, moments, rows)
            moved = descend(rows, updates, rates)
            return hold(moved, rows) if holds else moved, moments

        # A rate is of a whole leaf, [], or of its layers, [L, 1, ...].
        rates = jnp.broadcast_to(rates, (rows.shape[0], *rates.shape[1:]))
        rows, moments = update_rows(update, (rows, moments), _cut(path, grad), rates)
        return rows.reshape(value.shape), moments

    done = jax.tree.map_with_path(leaf, trained, grads, rates, optimizer)
    structure = jax.tree.structure(trained)
    trained, optimizer = (
        structure.unflatten(half) for half in zip(*structure.flatten_up_to(done))
    )
    return trained, optimizer, {"loss": loss, "lr": rate, "grad_norm": norm}


def _cut(path: tuple, value: jax.Array) -> jax.Array:
    """A leaf as pieces along axis 0; a bitcast, since pieces are whole rows."""
    if format_path(path).startswith("blocks/"):
        return value
    count = value.shape[0]
    parts = max(n for n in range(1, _PARTS + 1) if count % n == 0)
    if value.ndim == 1:
        parts = 1
    return value.reshape(parts, count // parts, *value.shape[1:])
