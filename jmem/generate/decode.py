"""Prefill and decode: greedy or by temperature, rows of different lengths, one cache.

Two compiled programs serve a whole generation: `prefill` reads the prompts, `extend`
decodes all new tokens in one loop. The cache is donated to both, so it exists once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jmem.generate.sampling import Sampling
from jmem.kvcache import gemfilter
from jmem.kvcache.cache import Cache, decode_attend, empty, prefill_attend
from jmem.kvcache.full import Full
from jmem.kvcache.plan import Plan
from jmem.kvcache.policy import Policy
from jmem.nn.ops import Ops
from jmem.nn.quantised import linear
from jmem.nn.stack import run_stack
from jmem.program import Program
from jmem.train.loss import token_positions

GREEDY = Sampling()


def padded_right(
    tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Rows with their padding moved behind, and their lengths, as `prefill` takes them.

    `mask` is true for a row's own tokens, which lie together: Hugging Face's attention
    mask, padded on either side.
    """
    first = jnp.argmax(mask, axis=1)
    moved = jax.vmap(jnp.roll)(tokens, -first)
    return moved, jnp.sum(mask, axis=1, dtype=jnp.int32)


def prefill_step(
    model,
    params: dict,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    caches: tuple[Cache, ...],
    plans: tuple[Plan, ...],
) -> tuple[Float[Array, "B V"], tuple[Cache, ...]]:
    """Logits after each row's last token, and the caches filled with the prompts.

    Rows are padded on the right to T tokens; `lengths` counts each one's own. Attention
    is computed once, whatever the number of plans.
    """
    positions = token_positions(tokens)
    attend = prefill_attend(
        plans, lengths, model.attention, model.config.sliding_window, model.chunk
    )
    ops = Ops(attend, linear)
    carry = tuple(
        (cache, plan.policy.begin(plan))
        for plan, cache in zip(plans, caches, strict=True)
    )
    x = model.embed(params, tokens, positions)
    x, carry, _ = run_stack(model.block, params["blocks"], x, positions, ops, carry)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.head(params, last, ops), tuple(cache for cache, _ in carry)


prefill = jax.jit(
    prefill_step, static_argnames=("model", "plans"), donate_argnames="caches"
)


def decode_step(
    model,
    params: dict,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    cache: Cache,
    plan: Plan,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after one more token a row, which enters the cache as `positions`."""
    ops = Ops(decode_attend(plan, model.config.sliding_window), linear)
    positions = positions[:, None]
    x = model.embed(params, tokens[:, None], positions)
    x, cache, _ = run_stack(model.block, params["blocks"], x, positions, ops, cache)
    return model.head(params, x[:, 0], ops), cache


@functools.partial(
    jax.jit,
    static_argnames=("model", "plan", "steps", "sampling", "stop_token"),
    donate_argnames="cache",
)
def extend(
    model,
    params: dict,
    logits: Float[Array, "B V"],
    lengths: Int[Array, " B"],
    cache: Cache,
    key: jax.Array,
    *,
    plan: Plan,
    steps: int,
    sampling: Sampling = GREEDY,
    stop_token: int | None = None,
) -> tuple[Int[Array, "B steps"], Cache]:
    """Decodes `steps` tokens a row after prompts of `lengths`, in one program.

    A row that has produced `stop_token` repeats it.
    """

    def step(state, index):
        logits, done, cache = state
        token = sampling(logits, jax.random.fold_in(key, index))
        if stop_token is not None:
            token = jnp.where(done, stop_token, token)
            done = done | (token == stop_token)
        logits, cache = decode_step(model, params, token, lengths + index, cache, plan)
        return (logits, done, cache), token

    start = (logits, jnp.zeros(lengths.shape, bool), cache)
    indices = jnp.arange(steps, dtype=jnp.int32)
    (_, _, cache), tokens = jax.lax.scan(step, start, indices)
    return tokens.T, cache


def generate(
    model,
    params: dict,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    stop_token: int | None = None,
    policy: Policy | None = None,
    shorten: gemfilter.GemFilter | None = None,
) -> list[list[int]]:
    """Continues each prompt (token ids) by at most `max_new_tokens` tokens.

    Rows may differ in length; each gets what it would get alone. A row ends with
    `stop_token` if it produced one. `temperature`, `top_k` and `top_p` are those of
    `jmem.generate.sampling.Sampling`. `policy` says what of the prompts is kept for
    decoding (`jmem.kvcache`); None keeps all. `shorten` cuts longer prompts to their
    best tokens first: the answer continues those, counted from position 0.

    Raises:
      ValueError: no or empty prompts, a token outside the vocabulary, sampling out of
        range or without `key`, or more positions than the model has.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    longest = _check(model, prompts, max_new_tokens, temperature, key, shorten)
    lengths = jnp.asarray([len(p) for p in prompts], jnp.int32)
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    tokens = jnp.asarray(tokens)
    if shorten is not None:
        short = gemfilter.shorten(model, params, shorten, tokens, lengths)
        tokens, lengths, longest = short.tokens, short.lengths, short.tokens.shape[1]
    plan = (policy or Full()).plan(
        model, prompt=longest, new_tokens=max_new_tokens, batch_size=len(prompts)
    )
    logits, (cache,) = prefill(
        model, params, tokens, lengths, (empty(plan),), plans=(plan,)
    )
    answer, _ = extend(
        model,
        params,
        logits,
        lengths,
        cache,
        jax.random.key(0) if key is None else key,
        plan=plan,
        steps=max_new_tokens,
        sampling=sampling,
        stop_token=stop_token,
    )
    rows = np.asarray(answer).tolist()
    if stop_token is None:
        return rows
    ends = [r.index(stop_token) + 1 if stop_token in r else len(r) for r in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def _check(model, prompts, max_new_tokens, temperature, key, shorten) -> int:
    config = model.config
    if not prompts or not all(prompts):
        raise ValueError(
            "generate: prompts must hold at least one prompt, and each at least one "
            "token; start an empty one with the model's begin-of-text token."
        )
    for index, prompt in enumerate(prompts):
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"generate: prompts[{index}] holds a token outside [0, "
                f"{config.vocab_size}); was it made with another model's tokenizer?"
            )
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens={max_new_tokens} must be positive.")
    if temperature and key is None:
        raise ValueError(
            f"generate: temperature={temperature} draws at random and needs key; pass "
            "jax.random.key(seed), or temperature=0 for the likeliest tokens."
        )
    longest = max(map(len, prompts))
    kept = longest if shorten is None else min(longest, shorten.tokens)
    if kept + max_new_tokens > config.max_positions:
        raise ValueError(
            f"generate: {kept} prompt tokens + max_new_tokens={max_new_tokens} "
            f"exceed the model's max_positions={config.max_positions}."
        )
    return longest


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
        return tokens, last, empty(plan)

    def step(params, tokens, positions, cache):
        return decode_step(model, params, tokens, positions, cache, plan)

    return _program(step, model, params, inputs)


def prefill_program(model, plan: Plan, *, params: dict | None = None) -> Program:
    """The forward pass over the plan's longest prompts into a donated cache.

    `params` as in `decode_program`.
    """

    def inputs(key):
        shape = (plan.batch_size, plan.prompt)
        tokens = jax.random.randint(key, shape, 0, model.config.vocab_size, jnp.int32)
        lengths = jnp.full((plan.batch_size,), plan.prompt, jnp.int32)
        return tokens, lengths, empty(plan)

    def step(params, tokens, lengths, cache):
        logits, (cache,) = prefill_step(
            model, params, tokens, lengths, (cache,), (plan,)
        )
        return logits, cache

    return _program(step, model, params, inputs)


def _program(step, model, params: dict | None, inputs) -> Program:
    """Of a step over parameters and the `inputs(key)` that follow them."""

    def make(key):
        return model.init(key), *inputs(key)

    key = jax.random.key(0)
    if params is None:
        args = jax.eval_shape(make, key)
    else:
        args = params, *jax.eval_shape(inputs, key)
    return Program(
        step,
        args,
        donate=(3,),
        labels={"weights": (0, ""), "batch": [(1, ""), (2, "")], "kv cache": (3, "")},
        make=make if params is None else None,
    )
