"""Decoding: greedy or by temperature, rows of different lengths, one cache.

Two compiled programs serve a whole generation: one reads the prompts
(`jmem.generate.reading`), and one more decodes all new tokens in a loop (`extend`, or
`stream` some at a time). The cache is donated to both, so it exists once.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jmem.generate.checks import (
    check_method,
    check_positions,
    check_positive,
    check_stops,
    check_tokens,
    require_key,
)
from jmem.generate.reading import read
from jmem.generate.sampling import Sampling
from jmem.kvcache.budget import fit_to_bytes
from jmem.kvcache.full import Full
from jmem.kvcache.method import CacheMethod
from jmem.kvcache.plan import Plan, Sizes
from jmem.kvcache.shorten import Shorten, pad_rows
from jmem.lowering import JitInPlace
from jmem.nn.pruned.in_place import read_in_place
from jmem.nn.stack import run_stack
from jmem.offload import check_host

GREEDY = Sampling()


def decode_step(
    model,
    params: dict,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    cache: Any,
    plan: Plan,
    places: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B V"], Any]:
    """Logits after one more token a row, which enters the cache as `positions`.

    `places` count the tokens that the row's cache has seen, where that is another
    number (`jmem.generate.reading.prefill_step`).
    """
    attend = plan.method.decode(plan, cache, model, positions, places)
    ops = model.ops._replace(attend=attend)
    positions = positions[:, None]
    x = model.embed(params, tokens[:, None], positions)
    block, blocks = read_in_place(model, params["blocks"])
    x, cache, _ = run_stack(block, blocks, x, positions, ops, cache)
    return model.head(params, x[:, 0], ops), cache


class Answering(NamedTuple):
    """The state of a loop that decodes an answer, between two tokens."""

    logits: Float[Array, "B V"]
    """Of the next token."""
    token: Int[Array, " B"]
    """The latest one, which the cache holds."""
    position: Int[Array, " B"]
    """Of `token`."""
    done: Bool[Array, " B"]
    """Whether it was the last. Then the row goes on with the same token in the same
    place, which changes nothing."""
    cache: Any


class Decoding(NamedTuple):
    """How tokens are decoded by one program; hashable, so it is compiled in."""

    plan: Plan
    steps: int
    """Tokens a row."""
    sampling: Sampling = GREEDY
    stop_tokens: tuple[int, ...] = ()
    """Those that end a row's answer."""


def _begin_answer(logits, lengths, cache) -> Answering:
    """The state before the first new token, once rows of `lengths` tokens are read."""
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
    how: Decoding,
) -> tuple[Int[Array, "B steps"], Answering]:
    """The next `steps` tokens; the first of them is number `first` of the answer.

    A row is done after a stop token, or `limit` tokens of its answer. The loop ends
    when all are, of which it asks only where there can be any: a GPU waits for that.
    """
    plan, steps, sampling, stop_tokens = how
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
    JitInPlace,
    static_argnames=("model", "plan", "steps", "sampling", "stop_tokens"),
    donate_argnames="cache",
)
def extend(
    model,
    params: dict,
    logits: Float[Array, "B V"],
    lengths: Int[Array, " B"],
    cache: Any,
    key: jax.Array,
    *,
    plan: Plan,
    steps: int,
    sampling: Sampling = GREEDY,
    stop_tokens: tuple[int, ...] = (),
) -> tuple[Int[Array, "B steps"], Any]:
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
    given = model, params, _begin_answer(logits, lengths, cache), key
    how = Decoding(plan, steps, sampling, stop_tokens)
    tokens, state = _decode(*given, first=0, limit=None, how=how)
    return tokens, state.cache


_further = JitInPlace(
    _decode, static_argnames=("model", "how"), donate_argnames="state"
)


def answer(
    model,
    params: dict,
    logits: Float[Array, "B V"],
    lengths: Int[Array, " B"],
    cache: Any,
    key: jax.Array,
    how: Decoding,
) -> Iterator[tuple[list[list[int]], Any]]:
    """`extend`, `how.steps` tokens at a time: the rows' next tokens, and the cache.

    One compiled program for all calls. A row that has stopped gives no more tokens;
    when all have, or have the plan's `new_tokens`, it ends. The cache holds the tokens
    given so far, and is donated when the next ones are asked for.
    """
    state, most = _begin_answer(logits, lengths, cache), how.plan.new_tokens
    limit = None if most % how.steps == 0 else jnp.int32(most)
    going = [True] * how.plan.batch_size
    for first in range(0, most, how.steps):
        at = jnp.int32(first)
        tokens, state = _further(
            *(model, params, state, key), first=at, limit=limit, how=how
        )
        given = []
        for row, made in enumerate(np.asarray(tokens).tolist()):
            made = made[: most - first] if going[row] else []
            stops = (n for n, token in enumerate(made, 1) if token in how.stop_tokens)
            end = next(stops, None)
            going[row] &= end is None
            given.append(made[:end])
        yield given, state.cache
        if not any(going):
            return


# From prompts to answers --------------------------------------------------------------


class Options(TypedDict, total=False):
    """Arguments of `generate` that have defaults, for who hands them on."""

    temperature: float
    top_k: int
    top_p: float
    key: jax.Array | None
    stop_tokens: Sequence[int]
    policy: CacheMethod | None
    cache_bytes: int | None
    prompt_chunk: int | None
    shorten: Shorten | None


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
    policy: CacheMethod | None = None,
    cache_bytes: int | None = None,
    prompt_chunk: int | None = None,
    shorten: Shorten | None = None,
) -> list[list[int]]:
    """Continues each prompt (token ids) by at most `max_new_tokens` tokens.

    Rows may differ in length; each gets what it would get alone. A row ends with the
    first of `stop_tokens` that it produced.
    `temperature`, `top_k` and `top_p` are those of `jmem.generate.sampling.Sampling`,
    and `key` is what is drawn with; without them the likeliest token is taken.

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
    return join_pieces(pieces)


def join_pieces(pieces: Iterator[list[list[int]]]) -> list[list[int]]:
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
    policy: CacheMethod | None = None,
    cache_bytes: int | None = None,
    prompt_chunk: int | None = None,
    shorten: Shorten | None = None,
) -> Iterator[list[list[int]]]:
    """The answers of `generate`, `every` tokens at a time: each row's next ones.

    A row that has ended gives none. The prompts are read at once; decoding goes on when
    the next tokens are asked for, in one compiled program for all of them. Refuses what
    `generate` refuses, before it returns.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    policy = policy or Full()
    check_method("generate", policy)
    check_tokens("generate", model, prompts)
    check_stops("generate", model, stop_tokens)
    check_positive(
        "generate",
        max_new_tokens=max_new_tokens,
        every=every,
        prompt_chunk=prompt_chunk,
    )
    key = require_key("generate", sampling, key)
    kept = max(map(len, prompts))
    if shorten is not None:
        kept = min(kept, shorten.tokens)
    check_positions("generate", model, policy, kept, max_new_tokens)
    sizes = Sizes(prompt=kept, new_tokens=max_new_tokens, batch_size=len(prompts))
    plan = make_plan("generate", model, policy, cache_bytes, **sizes)
    if shorten is not None:
        prompts = shorten.shorten(model, params, *pad_rows(prompts)).prompts()
    cache = plan.method.begin(plan)
    logits, cache = read(
        *(model, params, prompts, [0] * len(prompts), cache, plan),
        chunk=prompt_chunk,
        width=kept,
    )
    how = Decoding(plan, every, sampling, tuple(stop_tokens))
    given = model, params, logits, pad_rows(prompts)[1], cache, key
    return (rows for rows, _ in answer(*given, how))


def make_plan(
    where: str,
    model,
    policy: CacheMethod,
    cache_bytes: int | None,
    **sizes: Unpack[Sizes],
) -> Plan:
    """The plan of `policy`, cut first to the largest that `cache_bytes` hold.

    Raises:
      ValueError: `cache_bytes` hold no cache of the policy's.
      HostMemoryError: the cache's part in host memory does not fit there; names the
        caller, `where`, and the bytes needed and available.
    """
    if cache_bytes is not None:
        policy = fit_to_bytes(policy, model, cache_bytes, **sizes)
    plan = policy.plan(model, **sizes)
    if plan.host_bytes():
        check_host(plan.host_bytes(), f"{where}: the cache")
    return plan
