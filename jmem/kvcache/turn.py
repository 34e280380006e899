"""A further turn: new tokens are read against a cache, which then selects again.

Idea     What a layer holds and the new tokens behind it are one list. The policy
         chooses from that list as it would from a prompt, by the queries of the new
         tokens, and the choice goes into the same slots. Full keeps it all: its turns
         equal one prefill of the whole conversation. The others stay within their plan
         for any number of turns, and forget for good what they drop.
Places   Keys are rotated by their true position, which goes on from turn to turn; for a
         policy with `rope="cache"` by their place in the list. To `choose` a position
         is a place in the list: neighbours there need not be neighbours in the text,
         and WindowKV's windows are consecutive tokens of the list. Layers that share a
         choice hold the same tokens, so their lists are the same.
Memory   The list of one layer, twice, besides the cache; and the scores of the new
         tokens with all of it, B * H * T * (slots + T) * 4 bytes, where attention is
         XLA's. cuDNN's takes a mask of B * T * (slots + T) in the model's dtype.
Differs  SnapKV and the others are published for one prompt; multi-turn use is ours. A
         turn shorter than the observed window has only its own queries to vote.
See      tests/kvcache/test_turn.py
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmem.kvcache.cache import Cache, find_offset, place, repeat_heads
from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.seen import Seen, take_last_queries
from jmem.nn.attention import grouped_attention
from jmem.nn.chunk import apply_by_chunks
from jmem.nn.ops import Attend


class Listed(NamedTuple):
    """A layer's tokens in their order: what it holds, then the new ones, then nothing.

    N places: the largest layer's slots, and T for the new tokens.
    """

    slots: Int[Array, "B N"]
    """Where each held token lies on the cache's slots axis."""
    new: Int[Array, "B N"]
    """Which of the new tokens each is; -1 for a held one."""
    positions: Int[Array, "B U N"]
    """True positions."""
    held: Int[Array, " B"]
    """How many tokens are held."""

    def take_rows(
        self, held: Float[Array, "B K slots D"], new: Float[Array, "B K T D"]
    ) -> Float[Array, "B K N D"]:
        """Keys or values of the list, from those of the cache and of the new tokens."""
        slots, at = self.slots[:, None, :, None], self.new[:, None, :, None]
        old = jnp.take_along_axis(held, slots, axis=2)
        fresh = jnp.take_along_axis(new, jnp.clip(at, 0, new.shape[2] - 1), axis=2)
        return jnp.where(at < 0, old, fresh)


def list_tokens(
    plan: PolicyPlan,
    cache: Cache,
    before: Int[Array, " B"],
    number: int,
    layer: jax.Array,
) -> Listed:
    """The list of a layer whose rows hold positions up to `before`, and `number` more.

    A layer holds as many tokens for every unit: the contract of `Policy.choose`.
    """
    places = jnp.arange(max(plan.sizes) + number, dtype=jnp.int32)[None]
    count = jnp.asarray(plan.selected, jnp.int32)[layer]
    filled, chosen = jnp.zeros_like(before), None
    if size := max(plan.selected):
        own = jnp.minimum(places[0], jnp.maximum(count - 1, 0))
        chosen = cache.positions[:, :, find_offset(plan.selected, layer) + own]
        there = (chosen[:, 0] >= 0) & (places < count)
        filled = there[:, :size].sum(axis=1, dtype=jnp.int32)
    oldest = jnp.maximum(cache.start, before - plan.tail)
    held = filled + before - oldest
    first, rest, start, end = (x[:, None] for x in (filled, held, cache.start, before))
    recent = oldest[:, None] + places - first
    slots = jnp.where(places < first, places, count + (recent - start) % plan.tail)
    slots = jnp.where(places < rest, slots, 0) + find_offset(plan.sizes, layer)
    new = jnp.where(places < rest, -1, places - rest)
    positions = jnp.where(new < 0, recent, end + new)[:, None]
    if chosen is None:
        positions = jnp.broadcast_to(positions, (len(before), plan.units, places.size))
    else:
        positions = jnp.where((places < first)[:, None], chosen, positions)
    return Listed(slots, new, positions, held)


def turn_attend(
    plan: PolicyPlan,
    start: Int[Array, " B"],
    before: Int[Array, " B"],
    lengths: Int[Array, " B"],
    model,
) -> Attend:
    """New tokens attend what is held and, causally, each other, and are selected from.

    The carry is (cache, what the policy hands from layer to layer). `start` is the
    cache's before the turn, `lengths` counts each row's new tokens; a row with none
    stays as it is. Rows are padded on the right; padding is never seen and never kept.
    If the model has a sliding window, a token sees that many true positions, its own
    among them.
    """
    inside = plan.policy.rope == "cache"
    chunk, window = model.chunk, model.config.sliding_window

    def attend(q, k, v, rope, positions, layer, carry):
        cache, shared = carry
        number = k.shape[1]
        tokens = list_tokens(plan, cache._replace(start=start), before, number, layer)
        if not inside:
            k = apply_by_chunks(rope, k, positions, size=chunk)
        k, v = (repeat_heads(jnp.swapaxes(x, 1, 2), plan.heads) for x in (k, v))
        kept, v = tokens.take_rows(cache.keys, k), tokens.take_rows(cache.values, v)
        stored = k = jnp.swapaxes(kept, 1, 2)
        places = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
        own = tokens.held[:, None] + jnp.arange(number, dtype=jnp.int32)[None]
        if inside:
            everywhere = jnp.broadcast_to(places, k.shape[:2])
            k = apply_by_chunks(rope, k, everywhere, size=chunk)
        q = apply_by_chunks(rope, q, own if inside else positions, size=chunk)

        total, chosen = tokens.held + lengths, None
        recent = jnp.maximum(total - min(plan.policy.recent, k.shape[1]), 0)
        first = jnp.maximum(recent, jnp.minimum(plan.sinks, total))
        if max(plan.selected):
            queries, last = take_last_queries(q, lengths, plan.recent)
            at = jnp.where(last < 0, -1, tokens.held[:, None] + last)
            seen = Seen(
                *(queries, at, k, first),
                lambda: stored if inside else unrotate(rope, k, tokens.positions),
                lambda: jnp.swapaxes(v, 1, 2),
            )
            chosen, shared = plan.policy.choose(plan, seen, layer, shared)
        changed = lengths > 0
        cache = place(
            *(plan, cache, kept, v, chosen, first, total, layer),
            tokens=tokens.positions,
            rows=changed,
        )
        moved = first + before + lengths - total  # from its place to its position
        cache = cache._replace(start=jnp.where(changed, moved, cache.start))

        seen = (places[:, None] <= own[:, :, None])[:, None]  # [B, 1, T, N]
        if window is not None:
            oldest = (positions - window)[:, None, :, None]
            seen &= tokens.positions[:, :, None] > oldest
        if model.attention == "cudnn" and seen.shape[1] == 1:  # all heads see the same
            given = q, k, jnp.swapaxes(v, 1, 2)
            out = jax.nn.dot_product_attention(
                *given, mask=seen, implementation="cudnn"
            )
        else:
            out = grouped_attention(q, jnp.swapaxes(k, 1, 2), v, seen)
        return out, (cache, shared)

    return attend


def unrotate(
    rope: Callable, keys: Float[Array, "B N K D"], positions: Int[Array, "B U N"]
) -> Float[Array, "B N K D"]:
    """Keys as they were before `rope` rotated them by `positions`, but for rounding.

    Position 0 shows what a rotation multiplies by besides (YaRN sharpens so).
    """
    batch, number, heads, dim = keys.shape
    positions = jnp.broadcast_to(positions, (batch, heads, number)).reshape(-1, number)
    rows = jnp.swapaxes(keys, 1, 2).reshape(-1, number, 1, dim)
    factor = rope(jnp.ones((1, 1, 1, dim), jnp.float32), jnp.zeros((1, 1), jnp.int32))
    back = rope(rows.astype(jnp.float32), -positions) / factor**2
    return jnp.swapaxes(back.reshape(batch, heads, number, dim), 1, 2).astype(
        keys.dtype
    )


def check_turn(
    plan: PolicyPlan,
    before: Int[np.ndarray, " B"],
    lengths: Int[np.ndarray, " B"],
    new_tokens: int = 0,
) -> None:
    """Refuses a turn of `lengths` and an answer of `new_tokens` that find no slots.

    The tail holds the recent tokens and the answer. All tokens are recent to `Full`, so
    its plan takes prompt + new_tokens in all. Other plans take turns of any length and
    an answer of new_tokens each time, but for one whose prompt is no longer than what
    the policy calls recent: then nothing is selected, and it is as `Full`'s. A policy
    that rolls takes any number.

    Raises:
      ValueError: names the row, and what its plan has.
    """
    if plan.policy.rolls:
        return
    after = before + lengths
    recent = min(plan.policy.recent, int(after.max()))
    needed = np.minimum(after, recent) + new_tokens
    row = int(needed.argmax())
    if needed[row] <= plan.tail:
        return
    has = f"the plan for prompt={plan.prompt} and new_tokens={plan.new_tokens} has"
    if needed[row] == after[row] + new_tokens:
        raise ValueError(
            f"A turn: row {row} comes to {after[row]} tokens and {new_tokens} to be "
            f"answered, all of which {type(plan.policy).__name__} keeps, but {has} "
            f"{plan.tail} slots a layer. Plan for the whole conversation, or choose a "
            "policy that drops tokens."
        )
    raise ValueError(
        f"A turn: {new_tokens} new tokens and {recent} recent ones need "
        f"{needed[row]} slots, but {has} {plan.tail} for them. Plan for longer answers."
    )
