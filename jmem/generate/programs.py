"""The programs of a generation, to be measured: nothing is materialised for them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jmem.generate.decode import decode_step
from jmem.generate.reading import prefill_step, read_on_step
from jmem.kvcache.plan import Plan
from jmem.lowering import IN_PLACE
from jmem.offload import describe_results
from jmem.program import Program


def decode_program(model, plan: Plan, *, params: dict | None = None) -> Program:
    """One decoding step at the end of a full cache, which is donated.

    `params` may be others than those of `model.init`, arrays or descriptions, such as
    packed ones (`jmem.nn.quantised.abstract`).
    """

    def inputs(key):
        del key
        tokens = jnp.zeros((plan.batch_size,), jnp.int32)
        last = jnp.full(
            (plan.batch_size,), plan.prompt + plan.new_tokens - 1, jnp.int32
        )
        return tokens, last, plan.method.begin(plan)

    def step(params, tokens, positions, cache):
        return decode_step(model, params, tokens, positions, cache, plan)

    return _build_program(step, model, params, inputs)


def prefill_program(model, plan: Plan, *, params: dict | None = None) -> Program:
    """The forward pass over the plan's longest prompts into a donated cache.

    `params` as in `decode_program`.
    """

    def inputs(key):
        shape = (plan.batch_size, plan.prompt)
        tokens = jax.random.randint(key, shape, 0, model.config.vocab_size, jnp.int32)
        lengths = jnp.full((plan.batch_size,), plan.prompt, jnp.int32)
        return tokens, lengths, plan.method.begin(plan)

    def step(params, tokens, lengths, cache):
        given = model, params, tokens, lengths, (cache,), (plan,)
        logits, (cache,), _ = prefill_step(*given)
        return logits, cache

    # By XLA's defaults: Llama-3-8B reads 131,072 tokens at once in 43.2 GB, in place
    # in 45.6, and what copies of its weights take is little beside their products.
    return _build_program(step, model, params, inputs, options={})


def read_on_program(
    model, plan: Plan, *, tokens: int, params: dict | None = None
) -> Program:
    """Reading `tokens` further tokens a row against a full cache, which is donated.

    `params` as in `decode_program`.
    """

    def inputs(key):
        shape = (plan.batch_size, tokens)
        given = jax.random.randint(key, shape, 0, model.config.vocab_size, jnp.int32)
        before = jnp.full((plan.batch_size,), plan.prompt, jnp.int32)
        return given, before, jnp.full_like(before, tokens), plan.method.begin(plan)

    def step(params, tokens, before, lengths, cache):
        return read_on_step(model, params, tokens, before, lengths, cache, plan)

    return _build_program(step, model, params, inputs)


def _build_program(
    step, model, params: dict | None, inputs, options: Mapping[str, Any] = IN_PLACE
) -> Program:
    """Of a step over parameters and the `inputs(key)` that follow, the cache last."""

    def make(key):
        return model.init(key), *inputs(key)

    key = jax.random.key(0)
    given = params if params is not None else jax.eval_shape(model.init, key)
    args = given, *describe_results(inputs, key)  # which of the cache lies on the host
    last = len(args) - 1
    batch = [(index, "") for index in range(1, last)]
    return Program(
        step,
        args,
        donate=(last,),
        labels={"weights": (0, ""), "batch": batch, "kv cache": (last, "")},
        make=make if params is None else None,
        options=options,
    )
