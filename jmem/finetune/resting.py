"""Moments of frozen blocks at rest in host memory; those of the active blocks visit.

Idea     A block's moments are read and written only while it is active. So the device
         holds those of the active blocks, a slot each, and the host those of all. When
         other blocks are drawn, the slots go out to the rows of the blocks they held,
         and the rows of the new ones come in.
Memory   Device: the slots. Host: the moments of every block. No second copy of either.
Traffic  Once a draw, the slots out and in: 2 * 8 bytes a parameter of the active
         blocks, with float32 moments. Nothing in the steps between.
Seen     XLA (0.12.0.1, for an H200) takes whole stacks to the device if they are read
         inside the fused backward scan. So the swap comes before it, as two loops over
         the slots for each leaf, whose trip count is 0 where nothing was drawn. Stacks
         and slots stay in place. A row on its way out is copied on the device first: of
         one leaf at a time, since all leaves in one loop took 1.5 GiB at 7B.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jmem.offload import fetch_row, store, store_row


class Resting(NamedTuple):
    """What a draw swaps the slots with."""

    moments: Any
    """Leaves [L, ...] in host memory, counters [L] on the device. The rows of blocks
    that a slot holds are those of the draw before."""
    held: Int[Array, " S"]
    """The block that each slot holds, ascending."""


def rest(slots: Any, layers: int) -> Resting:
    """Zeros for `layers` blocks, and slots [S, ...], zeros too, that hold the first."""
    moments = make_zero_rows(slots, layers)
    count = jax.tree.leaves(slots)[0].shape[0]
    return Resting(moments, jnp.arange(count, dtype=jnp.int32))


def make_zero_rows(like: Any, count: int) -> Any:
    """Zeros [count, ...] in host memory for leaves [N, ...]; scalars' on the device.

    Made a row at a time, since a value is made on the device before it is stored.
    """

    def row(_, __):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), like)
        return None, store(zeros)

    return jax.lax.scan(row, None, length=count)[1]


def swap(resting: Resting, slots: Any, active: Int[Array, " S"]) -> tuple[Resting, Any]:
    """Slots that hold the blocks `active`, distinct and ascending: (resting, slots).

    All go out before any comes in, since a block may change its slot. In place if both
    are donated.
    """
    held, count = resting.held, active.shape[0]
    turns = jnp.where(jnp.any(active != held), count, 0)

    def leaf(rested, slots):
        def leave(slot, rested):
            return store_row(rested, held[slot], fetch_row(slots, slot))

        def enter(slot, slots):
            return store_row(slots, slot, fetch_row(rested, active[slot]))

        rested = jax.lax.fori_loop(0, turns, leave, rested)
        return rested, jax.lax.fori_loop(0, turns, enter, slots)

    rested, structure = jax.tree.flatten(resting.moments)
    pairs = map(leaf, rested, jax.tree.leaves(slots))
    moments, slots = (structure.unflatten(half) for half in zip(*pairs))
    return Resting(moments, active), slots
