"""Time to the first token and tokens a second, on the attached device, and the bytes
that bound the second.

    plan = SnapKV(capacity=1024).plan(model, prompt=8192, new_tokens=64, batch_size=32)
    time_tokens(model, params, plan)            # of all 32 rows together
    time_prompt(model, params, plan)            # until a prompt's first logits

What a step costs depends on sizes alone, so the cache holds random keys and values. It
reads the weights and every row's cache: `count_weight_bytes(params) + plan.bytes()`.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from jmem.generate.decode import extend
from jmem.generate.reading import prefill
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


def time_prompt(model, params: dict, plan: PolicyPlan, repeats: int = REPEATS) -> float:
    """Seconds until one prompt of `plan.prompt` tokens is read; the median run."""
    plan = dataclasses.replace(plan, batch_size=1)
    shape = (1, plan.prompt)
    key = jax.random.key(2)
    tokens = jax.random.randint(key, shape, 0, model.config.vocab_size, jnp.int32)
    lengths = jnp.full((1,), plan.prompt, jnp.int32)
    caches, seconds = (plan.method.begin(plan),), []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        logits, caches = prefill(model, params, tokens, lengths, caches, (plan,))
        logits.block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


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
