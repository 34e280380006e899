"""A prompt is read once, by exact attention, for all that keep something of it.

Caches of several plans, filters that choose tokens (`jmem.kvcache.shorten`) and studies
each say what they keep of a layer; the layers run once for all of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, Int

from jmem.kvcache.method import Read
from jmem.kvcache.plan import Plan
from jmem.nn.attention import causal_attention
from jmem.nn.chunk import apply_by_chunks
from jmem.nn.ops import Attend

Keep = Callable[[Read, Any], Any]
"""From what a layer makes of prompts, and what was kept before: what is kept now."""

QUERIES = 256
"""Of a prompt, that XLA's attention scores at a time."""


def attend_prompts(keeps: Sequence[Keep], lengths: Int[Array, " B"], model) -> Attend:
    """Causal attention among the prompts' own tokens, of which each of `keeps` keeps.

    The carry is a tuple with one entry for each. Prompts are padded on the right;
    padding is never seen.
    """
    window, chunk = model.config.sliding_window, model.chunk

    def attend(q, k, v, rope, positions, layer, carry):
        rotated = apply_by_chunks(rope, k, positions, size=chunk)
        q = apply_by_chunks(rope, q, positions, size=chunk)
        read = Read(q, rotated, k, v, lengths, layer)
        kept = [keep(read, own) for keep, own in zip(keeps, carry, strict=True)]
        # Caches first: what writing them needs is gone when attention begins.
        q, rotated, v, kept = jax.lax.optimization_barrier((q, rotated, v, tuple(kept)))
        out = causal_attention(
            q, rotated, v, model.attention, window=window, block=QUERIES
        )
        return out, kept

    return attend


def make_keep(plan: Plan) -> Keep:
    """The `Keep` of a plan's method; what is kept is (cache, shared)."""

    def keep(read, carry):
        return plan.method.keep(plan, read, *carry)

    return keep


def read_prompts(
    model,
    plans: tuple[Plan, ...],
    lengths: Int[Array, " B"],
    others: Sequence[Keep] = (),
) -> Attend:
    """How the prompts enter the caches of all plans, and what `others` keep of them.

    The carry is a tuple: (cache, shared) for each plan, then an entry for each other.

    Raises:
      ValueError: a method that attends a prompt in its own way is not alone.
    """
    own = [plan.method.prefill(plan, lengths, model) for plan in plans]
    for plan, attend in zip(plans, own, strict=True):
        if attend is not None:
            if len(plans) + len(others) > 1:
                raise ValueError(
                    f"{type(plan.method).__name__} attends a prompt in its own way, so "
                    "the prompt cannot be read for others in the same pass. Give its "
                    "plan alone."
                )
            return functools.partial(_attend_alone, attend)
    return attend_prompts([*map(make_keep, plans), *others], lengths, model)


def _attend_alone(attend: Attend, q, k, v, rope, positions, layer, carry):
    out, carry = attend(q, k, v, rope, positions, layer, carry[0])
    return out, (carry,)
