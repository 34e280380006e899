"""Tokens a second of decoding on the attached device, and the bytes that bound it.

    plan = SnapKV(capacity=1024).plan(model, prompt=8192, new_tokens=64, batch_size=32)
    time_tokens(model, params, plan)            # of all 32 rows together

What a step costs depends on sizes alone, so the cache holds random keys and values. It
reads the weights and every row's cache: `count_weight_bytes(params) + plan.bytes()`.
"""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from jmem.generate.decode import extend
from jmem.kvcache.cache import Cache
from jmem.kvcache.plan import PolicyPlan

REPEATS = 5
"""Timed runs; the median counts."""


@functools.partial(jax.jit, static_argnames="plan")
def fill(plan: PolicyPlan, key: jax.Array) -> Cache:
    """A cache of random keys and values that holds as much as a whole prompt leaves.

    Which tokens were selected is of no account to the time: here the first ones.
    """
    arrays = plan.arrays()
    chosen = jnp.concatenate([jnp.arange(size) for size in plan.selected])
    first, second = jax.random.split(key)
    return Cache(
        jax.random.normal(first, arrays["keys"].shape, plan.dtype),
        jax.random.normal(second, arrays["values"].shape, plan.dtype),
        jnp.broadcast_to(chosen.astype(jnp.int32), arrays["positions"].shape),
        jnp.full(plan.batch_size, plan.prompt - plan.recent, jnp.int32),
    )


def time_tokens(model, params: dict, plan: PolicyPlan, repeats: int = REPEATS) -> float:
    """Tokens a second of all rows together, `plan.new_tokens` a run; the median run."""
    key = jax.random.key(1)
    cache = fill(plan, key)
    logits = jnp.zeros((plan.batch_size, model.config.vocab_size), model.dtype)
    lengths = jnp.full((plan.batch_size,), plan.prompt, jnp.int32)
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        tokens, cache = extend(
            *(model, params, logits, lengths, cache, key),
            plan=plan,
            steps=plan.new_tokens,
        )
        tokens.block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return plan.batch_size * plan.new_tokens / statistics.median(seconds[1:])


def count_weight_bytes(params: Any) -> int:
    """Bytes of the weights that a decoding step reads whole.

    An embedding, of which it reads some rows, counts only where it is the head too.
    """
    tied = "head" not in params
    leaves = jax.tree.leaves(params if tied else {**params, "embed": {}})
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
