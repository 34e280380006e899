"""Prefill and decode: greedy or by temperature, rows of different lengths, one cache.

Two compiled programs serve a whole generation: `prefill` reads the prompts, and one
more decodes all new tokens in a loop (`extend`, or `stream` some at a time). The cache
is donated to both, so it exists once. `read_on` reads further tokens against it: a
later turn (`jmem.generate.conversation`), or the next piece of a long prompt.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jmem.generate.checks import (
    check_finite,
    check_positions,
    check_positive,
    check_prompt,
    check_stops,
    check_tokens,
    checked_key,
    checked_lengths,
)
from jmem.generate.sampling import Sampling
from jmem.kvcache import gemfilter
from jmem.kvcache.budget import fitted
from jmem.kvcache.cache import Cache, decode_attend, empty, prefill_attend
from jmem.kvcache.full import Full
from jmem.kvcache.plan import Plan
from jmem.kvcache.policy import Policy
from jmem.kvcache.turn import check_turn, turn_attend
from jmem.nn.ops import Ops
from jmem.nn.stack import IN_PLACE, run_stack
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


# Reading ------------------------------------------------------------------------------


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
    ops = model.ops._replace(attend=attend)
    carry = tuple(
        (cache, plan.policy.begin(plan))
        for plan, cache in zip(plans, caches, strict=True)
    )
    x = model.embed(params, tokens, positions)
    x, carry, _ = run_stack(model.block, params["blocks"], x, positions, ops, carry)
    return _logits_after(model, params, x, lengths, ops), tuple(c for c, _ in carry)


def _logits_after(model, params, x, lengths, ops: Ops) -> Float[Array, "B V"]:
    """Those of each row's last token."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return model.head(params, jnp.take_along_axis(x, last, axis=1)[:, 0], ops)


_prefill = jax.jit(
    prefill_step, static_argnames=("model", "plans"), donate_argnames="caches"
)


def prefill(
    model,
    params: dict,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    caches: tuple[Cache, ...],
    plans: tuple[Plan, ...],
) -> tuple[Float[Array, "B V"], tuple[Cache, ...]]:
    """`prefill_step` as one compiled program, to which the caches are donated.

    Raises:
      ValueError: a plan for other rows or shorter prompts, a cache of another plan, or
        a length that is not in [1, T].
    """
    own = checked_lengths("prefill", tokens, lengths, caches, plans, least=1)
    if own is not None:
        for plan in plans:
            check_prompt("prefill", plan, own)
    return _prefill(model, params, tokens, lengths, caches, plans)


def read_on_step(
    model,
    params: dict,
    tokens: Int[Array, "B T"],
    before: Int[Array, " B"],
    lengths: Int[Array, " B"],
    cache: Cache,
    plan: Plan,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after further tokens, and the cache that has selected from all again.

    Row b holds its positions up to `before[b]`; its next `lengths[b]` tokens are read
    against what it holds, see `jmem.kvcache.turn`. A row with none stays as it is, and
    its logits mean nothing. Rows are padded on the right to T tokens.
    """
    positions = before[:, None] + token_positions(tokens)
    attend = turn_attend(
        *(plan, cache.start, before, lengths),
        *(model.attention, model.config.sliding_window, model.chunk),
    )
    ops = model.ops._replace(attend=attend)
    carry = cache, plan.policy.begin(plan)
    x = model.embed(params, tokens, positions)
    x, carry, _ = run_stack(model.block, params["blocks"], x, positions, ops, carry)
    return _logits_after(model, params, x, lengths, ops), carry[0]


_read_on = jax.jit(
    read_on_step, static_argnames=("model", "plan"), donate_argnames="cache"
)


def read_on(
    model,
    params: dict,
    tokens: Int[Array, "B T"],
    before: Int[Array, " B"],
    lengths: Int[Array, " B"],
    cache: Cache,
    plan: Plan,
) -> tuple[Float[Array, "B V"], Cache]:
    """`read_on_step` as one compiled program, to which the cache is donated.

    Raises:
      ValueError: a plan for other rows, a cache of another plan, a length that is not
        in [0, T], or more tokens than a plan that drops none has slots.
    """
    own = checked_lengths("read_on", tokens, lengths, (cache,), (plan,), least=0)
    if own is not None and not isinstance(before, Tracer):
        check_turn(plan, np.asarray(before), own)
    return _read_on(model, params, tokens, before, lengths, cache, plan)


def read(
    model,
    params: dict,
    rows: Sequence[Sequence[int]],
    before: Sequence[int],
    cache: Cache,
    plan: Plan,
    *,
    chunk: int | None = None,
    width: int = 0,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after the next tokens of each row, `before` of which the cache has seen.

    Prompts by `prefill`, later turns by `read_on`, padded to `width` so that a program
    serves many. With `chunk` so many tokens a row are read at a time, by one program
    for texts of any length: attention then takes memory for `chunk` tokens and what the
    cache holds, not for the whole text. That is exact where all is kept. A policy that
    drops tokens selects after every chunk, and a later one does not see what is gone:
    another algorithm than prefill.

    Raises:
      ValueError: what `prefill` and `read_on` refuse, or logits that are not finite.
    """
    check_positive("read", chunk=chunk)
    tokens, lengths = padded(rows, width)
    if chunk is None and not any(before):
        logits, (cache,) = prefill(model, params, tokens, lengths, (cache,), (plan,))
    else:
        size = chunk or tokens.shape[1]
        tokens, _ = padded(rows, -(-max(map(len, rows)) // size) * size)
        logits = jnp.zeros((len(rows), model.config.vocab_size), model.dtype)
        done = np.asarray(before, np.int32)
        for begin in range(0, tokens.shape[1], size):
            own = np.clip(np.asarray(lengths) - begin, 0, size)
            given = tokens[:, begin : begin + size], jnp.asarray(done), jnp.asarray(own)
            latest, cache = read_on(model, params, *given, cache, plan)
            logits = jnp.where(jnp.asarray(own > 0)[:, None], latest, logits)
            done = done + own
    check_finite(logits, cache, plan)
    return logits, cache


def padded(
    rows: Sequence[Sequence[int]], width: int = 0
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Token ids, padded with 0 to the longest row or to `width`, and the lengths."""
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), max(width, lengths.max())), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return jnp.asarray(tokens), jnp.asarray(lengths)


# Decoding -----------------------------------------------------------------------------


def decode_step(
    model,
    params: dict,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    cache: Cache,
    plan: Plan,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after one more token a row, which enters the cache as `positions`."""
    attend = decode_attend(plan, model.config.sliding_window)
    ops = model.ops._replace(attend=attend)
    positions = positions[:, None]
    x = model.embed(params, tokens[:, None], positions)
    x, cache, _ = run_stack(model.block, params["blocks"], x, positions, ops, cache)
    return model.head(params, x[:, 0], ops), cache


class Answering(NamedTuple):
    """Where every row of an answer stands."""

    logits: Float[Array, "B V"]
    """Of the next token."""
    token: Int[Array, " B"]
    """The latest one, which the cache holds."""
    position: Int[Array, " B"]
    """Of `token`."""
    done: Bool[Array, " B"]
    """Whether it was the last. Then the row goes on with the same token in the same
    place, which changes nothing."""
    cache: Cache


def _begun(logits, lengths, cache) -> Answering:
    """After reading rows that are now `lengths` tokens long."""
    nothing = jnp.zeros(lengths.shape, jnp.int32)
    return Answering(logits, nothing, lengths - 1, nothing > 0, cache)


def _decode(
    model,
    params: dict,
    state: Answering,
    key: jax.Array,
    *,
    first: Int[Array, ""] | int,
    limit: Int[Array, ""] | None,
    plan: Plan,
    steps: int,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
) -> tuple[Int[Array, "B steps"], Answering]:
    """The next `steps` tokens; the first of them is number `first` of the answer.

    A row is done after a stop token, or `limit` tokens of its answer. The loop ends
    when all are, of which it asks only where there can be any: a GPU waits for that.
    """
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def going(carry):
        index, state, _ = carry
        more = index < steps
        return more & ~state.done.all() if stop_tokens or limit is not None else more

    def step(carry):
        index, state, made = carry
        _, token, position, done, cache = state
        drawn = sampling(state.logits, jax.random.fold_in(key, first + index))
        token = jnp.where(done, token, drawn)
        position = jnp.where(done, position, position + 1)
        if stop_tokens:
            done |= (token[:, None] == stops[None]).any(axis=1)
        if limit is not None:
            done |= first + index + 1 >= limit
        logits, cache = decode_step(model, params, token, position, cache, plan)
        state = Answering(logits, token, position, done, cache)
        return index + 1, state, made.at[index].set(token)

    made = jnp.zeros((steps, plan.batch_size), jnp.int32)
    count, state, made = jax.lax.while_loop(going, step, (jnp.int32(0), state, made))
    there = jnp.arange(steps, dtype=jnp.int32)[:, None] < count
    return jnp.where(there, made, state.token[None]).T, state


@functools.partial(
    jax.jit,
    static_argnames=("model", "plan", "steps", "sampling", "stop_tokens"),
    donate_argnames="cache",
    compiler_options=dict(IN_PLACE),
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
    stop_tokens: tuple[int, ...] = (),
) -> tuple[Int[Array, "B steps"], Cache]:
    """Decodes `steps` tokens a row after texts of `lengths`, in one program.

    All of them enter the cache. A row that has produced one of `stop_tokens` repeats
    it, and its cache stays as it is.

    Raises:
      ValueError: a plan for other rows.
    """
    if len(lengths) != plan.batch_size:
        raise ValueError(
            f"extend: lengths has {len(lengths)} rows, but the plan is for batch_size="
            f"{plan.batch_size}; plan for these."
        )
    tokens, state = _decode(
        *(model, params, _begun(logits, lengths, cache), key),
        first=0,
        limit=None,
        plan=plan,
        steps=steps,
        sampling=sampling,
        stop_tokens=stop_tokens,
    )
    return tokens, state.cache


_further = jax.jit(
    _decode,
    static_argnames=("model", "plan", "steps", "sampling", "stop_tokens"),
    donate_argnames="state",
    compiler_options=dict(IN_PLACE),
)


def answer(
    model,
    params: dict,
    logits: Float[Array, "B V"],
    lengths: Int[Array, " B"],
    cache: Cache,
    key: jax.Array,
    *,
    plan: Plan,
    max_new_tokens: int,
    every: int,
    sampling: Sampling = GREEDY,
    stop_tokens: tuple[int, ...] = (),
) -> Iterator[tuple[list[list[int]], Cache]]:
    """`extend`, `every` tokens at a time: the rows' next tokens, and the cache.

    One compiled program for all calls. A row that has stopped gives no more tokens;
    when all have, or have `max_new_tokens`, it ends. The cache holds the tokens given
    so far, and is donated when the next ones are asked for.
    """
    state = _begun(logits, lengths, cache)
    limit = None if max_new_tokens % every == 0 else jnp.int32(max_new_tokens)
    going = [True] * plan.batch_size
    for first in range(0, max_new_tokens, every):
        tokens, state = _further(
            *(model, params, state, key),
            first=jnp.int32(first),
            limit=limit,
            plan=plan,
            steps=every,
            sampling=sampling,
            stop_tokens=stop_tokens,
        )
        given = []
        for row, made in enumerate(np.asarray(tokens).tolist()):
            made = made[: max_new_tokens - first] if going[row] else []
            ends = (at + 1 for at, token in enumerate(made) if token in stop_tokens)
            end = next(ends, None)
            going[row] &= end is None
            given.append(made[:end])
        yield given, state.cache
        if not any(going):
            return


# From prompts to answers --------------------------------------------------------------


def generate(
    model,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    policy: Policy | None = None,
    cache_bytes: int | None = None,
    prompt_chunk: int | None = None,
    shorten: gemfilter.GemFilter | None = None,
) -> list[list[int]]:
    """Continues each prompt (token ids) by at most `max_new_tokens` tokens.

    Rows may differ in length; each gets what it would get alone. A row ends with the
    first of `stop_tokens` that it produced. `temperature`, `top_k` and `top_p` are
    those of `jmem.generate.sampling.Sampling`.

    `policy` says what of the prompts is kept for decoding (`jmem.kvcache`); None keeps
    all. `cache_bytes` cuts it to the largest capacity whose cache takes no more.
    `shorten` cuts longer prompts to their best tokens first: the answer continues
    those, counted from position 0. A prompt is read at once; with `prompt_chunk` so
    many tokens at a time, in bounded memory. What a policy keeps then differs, as it
    selects after every chunk; nothing does where all is kept (see `read`).

    Raises:
      ValueError: no or empty prompts, a token outside the vocabulary, sampling out of
        range or without `key`, more positions than the model has, a budget that is too
        small, or logits that are not finite.
    """
    pieces = stream(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        every=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=key,
        stop_tokens=stop_tokens,
        policy=policy,
        cache_bytes=cache_bytes,
        prompt_chunk=prompt_chunk,
        shorten=shorten,
    )
    return joined(pieces)


def joined(pieces: Iterator[list[list[int]]]) -> list[list[int]]:
    """The rows of `stream`, whole."""
    return [[token for part in row for token in part] for row in zip(*pieces)]


def stream(
    model,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    every: int = 8,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    policy: Policy | None = None,
    cache_bytes: int | None = None,
    prompt_chunk: int | None = None,
    shorten: gemfilter.GemFilter | None = None,
) -> Iterator[list[list[int]]]:
    """The answers of `generate`, `every` tokens at a time: each row's next ones.

    A row that has ended gives none. The prompts are read at once; decoding goes on when
    the next tokens are asked for, in one compiled program for all of them. Refuses what
    `generate` refuses, before it returns.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    policy = policy or Full()
    check_tokens("generate", model, prompts)
    check_stops("generate", model, stop_tokens)
    check_positive(
        "generate",
        max_new_tokens=max_new_tokens,
        every=every,
        prompt_chunk=prompt_chunk,
    )
    key = checked_key("generate", sampling, key)
    kept = max(map(len, prompts))
    if shorten is not None:
        kept = min(kept, shorten.tokens)
    check_positions("generate", model, policy, kept, max_new_tokens)
    plan = planned(
        model,
        policy,
        cache_bytes,
        prompt=kept,
        new_tokens=max_new_tokens,
        batch_size=len(prompts),
    )

    if shorten is not None:
        short = gemfilter.shorten(model, params, shorten, *padded(prompts))
        prompts = short.prompts()
    logits, cache = read(
        *(model, params, prompts, [0] * len(prompts), empty(plan), plan),
        chunk=prompt_chunk,
        width=kept,
    )
    pieces = answer(
        *(model, params, logits, padded(prompts)[1], cache, key),
        plan=plan,
        max_new_tokens=max_new_tokens,
        every=every,
        sampling=sampling,
        stop_tokens=tuple(stop_tokens),
    )
    return (rows for rows, _ in pieces)


def planned(
    model,
    policy: Policy,
    cache_bytes: int | None,
    *,
    prompt: int,
    new_tokens: int,
    batch_size: int,
) -> Plan:
    """The plan of `policy`, cut first to the largest that `cache_bytes` hold."""
    sizes: Any = {"prompt": prompt, "new_tokens": new_tokens, "batch_size": batch_size}
    if cache_bytes is not None:
        policy = fitted(policy, model, cache_bytes, **sizes)
    return policy.plan(model, **sizes)


# Programs to be measured --------------------------------------------------------------


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

    program = _program(step, model, params, inputs)
    return dataclasses.replace(program, options=IN_PLACE)


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
        return given, before, jnp.full_like(before, tokens), empty(plan)

    def step(params, tokens, before, lengths, cache):
        return read_on_step(model, params, tokens, before, lengths, cache, plan)

    return _program(step, model, params, inputs)


def _program(step, model, params: dict | None, inputs) -> Program:
    """Of a step over parameters and the `inputs(key)` that follow, the cache last."""

    def make(key):
        return model.init(key), *inputs(key)

    key = jax.random.key(0)
    if params is None:
        args = jax.eval_shape(make, key)
    else:
        args = params, *jax.eval_shape(inputs, key)
    last = len(args) - 1
    batch = [(index, "") for index in range(1, last)]
    return Program(
        step,
        args,
        donate=(last,),
        labels={"weights": (0, ""), "batch": batch, "kv cache": (last, "")},
        make=make if params is None else None,
    )
