"""The arrays of a cache, how a prompt enters it, and how a new token attends it.

Layout   One region of slots a layer, `[selected | tail]`, all regions on one axis
         behind the heads: [B, K, slots, D]. Slots before heads would make XLA transpose
         the whole cache around the layer loop of a grouped-query model (seen in 0.12).
Memory   `Plan.bytes()`. The cache is carried through the layer scan and addressed by
         the traced layer: donated, it is updated in place. XLA copies a layer's region
         to read it, the largest layer's size for every layer; the kernel reads it where
         it lies.
See      tests/kvcache, which asserts both on compiled programs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from jmem.kernels.windowed_attention import windowed_attention
from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.seen import find_tail_start
from jmem.nn.attention import grouped_attention
from jmem.nn.ops import Attend


class Cache(NamedTuple):
    """Keys and values of all layers, and which tokens they are."""

    keys: Float[Array, "B K slots D"]
    """Rotated by their true position, unless the policy rotates inside the cache."""
    values: Float[Array, "B K slots D"]
    positions: Int[Array, "B U selected"]
    """True positions of the selected tokens, ascending in a layer; -1: empty slot."""
    start: Int[Array, " B"]
    """The row's first position that lies in the tail, slot `(position - start) % tail`;
    the latest token overwrites the oldest."""


class Region(NamedTuple):
    """A layer's slots among those of all layers, as one slice of static length."""

    begin: Int[Array, ""]
    """Where the slice begins: moved back where it would end beyond the last layer."""
    slots: Int[Array, " N"]
    """Which of the layer's own slots each is; below 0 or too high: another layer's."""


def make_empty(plan: PolicyPlan) -> Cache:
    """A cache of zeros that holds no token."""
    cache = Cache(**plan.zeros())
    return cache._replace(positions=cache.positions - 1)


def find_offset(sizes: tuple[int, ...], layer: jax.Array) -> Int[Array, ""]:
    """The first slot of a traced `layer` among those of all layers."""
    return jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32)[layer]


def find_region(sizes: tuple[int, ...], layer: jax.Array) -> Region:
    """The region of a traced `layer`: a slice as long as the largest layer's."""
    longest, first = max(sizes), find_offset(sizes, layer)
    begin = jnp.minimum(first, sum(sizes) - longest)
    return Region(begin, jnp.arange(longest, dtype=jnp.int32) + begin - first)


def find_tail_positions(
    plan: PolicyPlan,
    start: Int[Array, " B"],
    last: Int[Array, " B"],
    slots: Int[Array, " N"],
) -> Int[Array, "B N"]:
    """Positions held by slots of the tail once the row's token `last` is in it.

    Below `start` for a slot nothing has been written to.
    """
    start, last, slots = start[:, None], last[:, None], slots[None]
    return last - (last - start - slots) % plan.tail


def write(
    plan: PolicyPlan,
    cache: Cache,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    chosen: Int[Array, "B U N"] | None,
    lengths: Int[Array, " B"],
    layer: jax.Array,
) -> Cache:
    """Writes the prompt's chosen and recent tokens into the layer's region, in place.

    `chosen` are positions, as `place` takes them.
    """
    k, v = (repeat_heads(jnp.swapaxes(x, 1, 2), plan.heads) for x in (k, v))
    start = find_tail_start(plan, lengths)
    if chosen is None and plan.tail >= k.shape[2]:  # nothing is left out
        # Else XLA lays the cache out as `k` is, and copies it on entry and exit (0.12).
        k, v = (with_layout_constraint(x, Layout((0, 1, 2, 3))) for x in (k, v))
        at = (0, 0, find_region(plan.sizes, layer).begin, 0)
        return cache._replace(
            keys=jax.lax.dynamic_update_slice(cache.keys, k, at),
            values=jax.lax.dynamic_update_slice(cache.values, v, at),
            start=start,
        )
    cache = place(plan, cache, k, v, chosen, start, lengths, layer)
    return cache._replace(start=start)


def place(
    plan: PolicyPlan,
    cache: Cache,
    k: Float[Array, "B N T D"],
    v: Float[Array, "B N T D"],
    chosen: Int[Array, "B U S"] | None,
    start: Int[Array, " B"],
    lengths: Int[Array, " B"],
    layer: jax.Array,
    *,
    tokens: Int[Array, "B U T"] | None = None,
    rows: Bool[Array, " B"] | None = None,
) -> Cache:
    """Writes of a list of `lengths` tokens those chosen, and those from `start` on.

    They go into the layer's region, in place. `chosen` are places in the list,
    ascending, -1 behind the last; S is the largest layer's number of selected slots,
    and those beyond this layer's own are -1. `tokens` are the list's true positions, if
    they are not its places. Only `rows` are changed.
    """
    begin, slots = find_region(plan.sizes, layer)
    count = jnp.asarray(plan.selected, jnp.int32)[layer]
    source = find_tail_positions(plan, start, lengths - 1, slots - count)[:, None]
    positions = cache.positions

    def changed(mine, new, before):
        if rows is not None:
            mine = mine & rows.reshape(-1, *[1] * (new.ndim - 1))
        return jnp.where(mine, new, before)

    if chosen is not None:
        at, own = find_region(plan.selected, layer)
        mine = (own >= 0) & (own < count)
        size = max(plan.selected)
        filled = jnp.take(chosen, jnp.clip(own, 0, size - 1), axis=-1)
        if tokens is not None:
            true = jnp.take_along_axis(tokens, jnp.maximum(filled, 0), axis=-1)
            filled = jnp.where(filled < 0, -1, true)
        before = jax.lax.dynamic_slice_in_dim(positions, at, size, axis=2)
        positions = jax.lax.dynamic_update_slice_in_dim(
            positions, changed(mine[None, None], filled, before), at, axis=2
        )
        picked = jnp.take(chosen, jnp.clip(slots, 0, size - 1), axis=-1)
        source = jnp.where(slots < count, picked, source)
    mine = (slots >= 0) & (slots < count + plan.tail)
    source = jnp.maximum(source, 0)[..., None]  # [B, U, slots, 1]

    def written(whole, x):
        new = jnp.take_along_axis(x, source, axis=2)
        before = jax.lax.dynamic_slice_in_dim(whole, begin, len(slots), axis=2)
        new = changed(mine[None, None, :, None], new, before)
        return jax.lax.dynamic_update_slice_in_dim(whole, new, begin, axis=2)

    return cache._replace(
        keys=written(cache.keys, k),
        values=written(cache.values, v),
        positions=positions,
    )


def repeat_heads(x: Float[Array, "B K T D"], heads: int) -> Float[Array, "B N T D"]:
    """Keys or values of `heads` stored heads.

    Repeated where all query heads are stored, as the official code of SnapKV does.
    """
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


def find_held(
    plan: PolicyPlan, cache: Cache, last: Int[Array, " B"], layer: jax.Array
) -> tuple[Int[Array, "B U N"], Bool[Array, "B U N"]]:
    """Positions of the tokens in the slice of a layer's region, and which are there.

    `last` is the row's latest token, the one that is attending.
    """
    _, slots = find_region(plan.sizes, layer)
    count = jnp.asarray(plan.selected, jnp.int32)[layer]
    positions = find_tail_positions(plan, cache.start, last, slots - count)[:, None]
    there = (slots >= count) & (slots < count + plan.tail)
    there = there[None, None] & (positions >= cache.start[:, None, None])
    if size := max(plan.selected):
        at, own = find_region(plan.selected, layer)
        chosen = jax.lax.dynamic_slice_in_dim(cache.positions, at, size, axis=2)
        chosen = jnp.take(chosen, jnp.clip(slots - own[0], 0, size - 1), axis=-1)
        selected = (slots >= 0) & (slots < count)
        there = jnp.where(selected[None, None], chosen >= 0, there)
        positions = jnp.where(selected[None, None], chosen, positions)
    return positions, there


class Step(NamedTuple):
    """Where one new token a row goes and what it sees, in every layer."""

    slot: Int[Array, "L B"]
    """Of the new token, in the tail."""
    tables: tuple[Int[Array, "L B ..."], ...]
    """What `windowed_attention` is told of a layer: where windows of selected slots
    begin, how many slots hold a token, where its tail begins and how many it has."""


def plan_step(plan: PolicyPlan, cache: Cache, last: Int[Array, " B"]) -> Step:
    """Of the token that is the row's number `last`; made once, before the layers."""
    sizes, selected = np.asarray(plan.sizes), np.asarray(plan.selected)
    offsets, ends = np.cumsum(sizes) - sizes, np.cumsum(selected)
    tails = jnp.asarray(offsets + selected, jnp.int32)[:, None]
    held = jnp.cumsum(cache.positions[:, 0] >= 0, axis=-1, dtype=jnp.int32)
    held = jnp.pad(held, ((0, 0), (1, 0)))
    window = find_window(plan)
    starts = offsets[:, None] + window * np.arange(max(plan.selected) // window)
    rows = len(sizes), plan.batch_size
    tables = (
        jnp.asarray(starts, jnp.int32)[:, None],
        (held[:, ends] - held[:, ends - selected]).T,
        tails,
        jnp.minimum(last - cache.start + 1, plan.tail)[None],
    )
    return Step(
        tails + ((last - cache.start) % plan.tail)[None],
        tuple(jnp.broadcast_to(x, (*rows, *x.shape[2:])) for x in tables),
    )


def find_window(plan: PolicyPlan) -> int:
    """Slots that the kernel reads at once, a divisor of every layer's selected ones."""
    return math.gcd(*plan.selected, 64)


def append(
    plan: PolicyPlan,
    cache: Cache,
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    slot: Int[Array, " B"],
) -> Cache:
    """Writes a new token into a slot of every row, in place."""
    rows, heads = jnp.arange(len(slot))[:, None], jnp.arange(plan.heads)[None]
    at = (rows, heads, slot[:, None])  # [B, K]: one slot a row and head
    k, v = (repeat_heads(jnp.swapaxes(x, 1, 2), plan.heads)[:, :, 0] for x in (k, v))
    return cache._replace(
        keys=cache.keys.at[at].set(k), values=cache.values.at[at].set(v)
    )


def decode_attend(
    plan: PolicyPlan,
    config,
    cache: Cache,
    positions: Int[Array, " B"],
    places: Int[Array, " B"] | None = None,
) -> Attend:
    """An `Attend`: a new token enters its row's tail and attends all that is kept.

    The carry is the cache. With a sliding window (of `config`, a decoder's) it sees
    that many positions, its own among them. `places` count the tokens that came before
    it, where these are not its position: its slot and the window go by them, its
    rotation by its position. What layers share is made here, before them.
    """
    window, inside = config.sliding_window, plan.policy.rope == "cache"
    last = positions if places is None else places
    made = plan_step(plan, cache, last)
    turn = config.rope.at(positions[:, None])

    def attend(q, k, v, rope, positions, layer, cache):
        cache = append(plan, cache, k if inside else turn(k), v, made.slot[layer])
        if plan.attention == "mosaic_gpu":
            out = windowed_attention(
                *(turn(q)[:, 0], cache.keys, cache.values, *made.tables),
                layer=layer,
                window=find_window(plan),
                max_tail=plan.tail,
                implementation=plan.attention,
            )
            assert isinstance(out, jax.Array)  # a pair with return_lse
            return out[:, None], cache
        held_positions, seen = find_held(plan, cache, last, layer)
        if window is not None:
            seen &= held_positions > (last - window)[:, None, None]
        begin, slots = find_region(plan.sizes, layer)
        keys, values = (
            jax.lax.dynamic_slice_in_dim(whole, begin, len(slots), axis=2)
            for whole in (cache.keys, cache.values)
        )
        if inside:
            given = plan, cache.start, held_positions, seen, last
            order, positions = rank_held(*given)
            keys = jnp.swapaxes(rope(jnp.swapaxes(keys, 1, 2), order), 1, 2)
            q = rope(q, positions)
        else:
            q = turn(q)
        return grouped_attention(q, keys, values, seen[:, :, None]), cache

    return attend


def rank_held(
    plan: PolicyPlan,
    start: Int[Array, " B"],
    positions: Int[Array, "B 1 N"],
    seen: Bool[Array, "B 1 N"],
    last: Int[Array, " B"],
) -> tuple[Int[Array, "B N"], Int[Array, "B 1"]]:
    """The rank of every held token among its row's, and that of the token `last`."""
    positions, seen = positions[:, 0], seen[:, 0]
    start, last = start[:, None], last[:, None]
    selected = seen & (positions < start)
    oldest = jnp.maximum(start, last - plan.tail + 1)
    before = jnp.sum(selected, axis=-1, keepdims=True)
    rank = jnp.where(
        positions < start,
        jnp.cumsum(selected, axis=-1) - 1,
        before + positions - oldest,
    )
    return rank, before + last - oldest
