"""Answers and losses from the caches of several plans, after one prefill for all.

A method changes what is kept of a prompt and not how it is read, so its attention is
computed once, whatever the number of plans. What cuts a prompt before it is read
(`jmem.kvcache.shorten`) chooses in the same pass, and the prompt that it leaves is then
read alone. Each plan decodes from its own cache, all rows together:
a step costs what reading the weights does, so rows are nearly free.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmem.generate.decode import decode_step, extend
from jmem.generate.reading import prefill_for_all
from jmem.kvcache.full import Full
from jmem.kvcache.plan import Plan
from jmem.kvcache.shorten import Shorten, keep_tokens


class More(TypedDict, total=False):
    """Further arguments of `answer_prompts`, which says what they are, and of
    `measure_losses`.
    """

    filters: Mapping[str, Shorten] | None
    rows: int | None


def answer_prompts(
    model,
    params: dict,
    plans: Mapping[str, Plan],
    tokens: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, " B"],
    *,
    steps: int,
    **more: Unpack[More],
) -> dict[str, Int[np.ndarray, "B steps"]]:
    """Greedy answers of `steps` tokens a row from the cache of each plan, by name.

    Prompts are padded on the right to T tokens. `filters` answer too, from a full cache
    of the prompt that each leaves. `rows` are read at a time, which bounds the memory
    of attention and must divide B; None: all.

    Memory: the caches of all plans exist together, the sum of their bytes, and the
    one that is decoded from a second time where `rows` is less than B.

    Raises:
      ValueError: nothing to answer from, a plan for other rows, shorter prompts or
        fewer steps, more positions than the model has, or `rows` that do not divide B.
    """
    given = model, params, plans, tokens, lengths
    read = read_all(*given, steps=steps, where="answers", **more)
    return {name: continue_text(model, params, own, steps) for name, own in read}


def measure_losses(
    model,
    params: dict,
    plans: Mapping[str, Plan],
    tokens: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, " B"],
    continuation: Int[Array | np.ndarray, "B N"],
    **more: Unpack[More],
) -> dict[str, Float[np.ndarray, "B N"]]:
    """Loss of each token of a given continuation, in nats, from each plan's cache.

    Float32. Every token is predicted from the cut cache and the continuation before
    it, whatever the model would have said: `np.exp(losses.mean())` is the perplexity.
    The first token's is the same for all plans, as a prompt attends all of itself, but
    not for `filters`, which cut it before. Else as `answer_prompts`, with N steps.
    """
    given = model, params, plans, tokens, lengths
    steps = continuation.shape[1]
    read = read_all(*given, steps=steps, where="losses", **more)
    return {name: follow_text(model, params, own, continuation) for name, own in read}


# From what was kept -------------------------------------------------------------------


class Context(NamedTuple):
    """Prompts that were read, and the cache that one plan keeps of them."""

    plan: Plan
    logits: Float[Array, "B V"]
    """After each prompt's last token."""
    lengths: Int[Array, " B"]
    cache: Any
    last: Int[Array, " B"]
    """Each prompt's last token."""
    positions: Int[np.ndarray, "B N"] | None = None
    """Of a filter: where in the prompt its tokens stood; -1 behind the last."""


def continue_text(
    model, params: dict, context: Context, steps: int, *, reread_last: bool = False
) -> Int[np.ndarray, "B steps"]:
    """Greedy tokens after prompts that were read; consumes the context's cache.

    The first one is that of full attention, whatever the cache keeps. With
    `reread_last` it is not: the prompt's last token is decoded once more, at its own
    position, from what was kept; its keys and values take the slots that they already
    have. (What a filter leaves was cut before it was read at all.)
    """
    logits, lengths = context.logits, context.lengths
    again = reread_last and context.positions is None
    if again:
        logits = jax.nn.one_hot(context.last, logits.shape[1])
        lengths = lengths - 1
    produced, _ = extend(
        *(model, params, logits, lengths, context.cache, jax.random.key(0)),
        plan=context.plan,
        steps=steps + again,
    )
    return np.asarray(produced)[:, int(again) :]


def follow_text(
    model,
    params: dict,
    context: Context,
    continuation: Int[Array | np.ndarray, "B N"],
) -> Float[np.ndarray, "B N"]:
    """Losses of a given text after prompts that were read, in nats, as
    `measure_losses`.

    Consumes the context's cache.
    """
    given = jnp.asarray(continuation)
    return np.asarray(_measure_forced(model, params, *context[:4], given)[0])


@functools.partial(jax.jit, static_argnames=("model", "plan"), donate_argnames="cache")
def _measure_forced(
    model,
    params: dict,
    plan: Plan,
    logits: Float[Array, "B V"],
    lengths: Int[Array, " B"],
    cache: Any,
    continuation: Int[Array, "B N"],
) -> tuple[Float[Array, "B N"], Any]:
    def loss(logits, token):
        logits = logits.astype(jnp.float32)
        picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    def step(cache, xs):
        index, token, following = xs
        logits, cache = decode_step(model, params, token, lengths + index, cache, plan)
        return cache, loss(logits, following)

    first = loss(logits, continuation[:, 0])
    given = continuation.T
    indices = jnp.arange(len(given) - 1, dtype=jnp.int32)
    cache, rest = jax.lax.scan(step, cache, (indices, given[:-1], given[1:]))
    return jnp.concatenate([first[None], rest]).T, cache


# One prefill for all ------------------------------------------------------------------


def read_all(
    model,
    params: dict,
    plans: Mapping[str, Plan],
    tokens: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, " B"],
    *,
    steps: int,
    filters: Mapping[str, Shorten] | None = None,
    rows: int | None = None,
    where: str = "read_all",
) -> Iterator[tuple[str, Context]]:
    """Yields the name and the context of each plan, then of each filter.

    A filter's prompt is read when its turn comes. Whoever takes a cache may donate it.
    Arguments and refusals are those of `answer_prompts`; messages begin with `where`.
    """
    filters = filters or {}
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    own = np.asarray(lengths)
    _check(where, model, plans, filters, own, tokens.shape[1], steps, rows)
    rows = rows or len(lengths)
    given = model, params, tokens, lengths, rows
    logits, read, chosen = _read(*given, tuple(plans.values()), (*filters.values(),))
    caches = dict(zip(plans, read, strict=True))
    last = take_last(tokens, lengths)
    for name, plan in plans.items():
        cache = plan.method.join(caches.pop(name))
        yield name, Context(plan, logits, lengths, cache, last)
    for name, kept in zip(filters, chosen, strict=True):
        short, own = keep_tokens(tokens, kept)
        plan = Full().plan(
            model, prompt=kept.shape[1], new_tokens=steps, batch_size=len(lengths)
        )
        after, (again,), _ = _read(model, params, short, own, rows, (plan,))
        cache, last = plan.method.join(again), take_last(short, own)
        yield name, Context(plan, after, own, cache, last, np.asarray(kept))


def take_last(tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Int[Array, " B"]:
    """Each row's last token."""
    return jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]


def _read(
    model,
    params: dict,
    tokens,
    lengths,
    rows: int,
    plans: tuple[Plan, ...],
    filters: tuple[Shorten, ...] = (),
) -> tuple[Float[Array, "B V"], list[list[Any]], list[Int[Array, "B N"]]]:
    """Logits after the prompts, `rows` of which are read at a time.

    And of each plan its filled caches, one for every `rows`; of each filter its choice.
    """
    own = tuple(dataclasses.replace(plan, batch_size=rows) for plan in plans)
    parts = []
    for start in range(0, len(lengths), rows):
        part = slice(start, start + rows)
        fresh = tuple(plan.method.begin(plan) for plan in own)
        given = tokens[part], lengths[part], fresh
        parts.append(prefill_for_all(model, params, *given, own, filters))
    logits, caches, chosen = zip(*parts, strict=True)
    caches, chosen = zip(*caches, strict=True), zip(*chosen, strict=True)
    return (
        jnp.concatenate(logits),
        [*map(list, caches)],
        [*map(jnp.concatenate, chosen)],
    )


def _check(
    where: str,
    model,
    plans: Mapping[str, Plan],
    filters: Mapping[str, Shorten],
    lengths: np.ndarray,
    width: int,
    steps: int,
    rows: int | None,
) -> None:
    batch, longest = len(lengths), int(lengths.max())
    if not plans and not filters:
        raise ValueError(f"{where}: plans is empty; give at least one, as Full's.")
    if both := plans.keys() & filters.keys():
        raise ValueError(f"{where}: {min(both)!r} is both in plans and in filters.")
    if steps < 1:
        raise ValueError(f"{where}: {steps} steps; need at least 1.")
    if rows is not None and (rows < 1 or batch % rows):
        raise ValueError(
            f"{where}: rows={rows} must divide the {batch} rows, so that all are read "
            "by one program."
        )
    if lengths.min() < 1 or longest > width:
        raise ValueError(
            f"{where}: lengths={lengths.tolist()} must lie in [1, {width}], the width "
            "of tokens."
        )
    limit = model.config.max_positions
    if longest + steps > limit:
        raise ValueError(
            f"{where}: {longest} prompt tokens + {steps} steps exceed the model's "
            f"max_positions={limit}."
        )
    for name, plan in plans.items():
        if plan.batch_size != batch:
            raise ValueError(
                f"{where}: plan {name!r} is for batch_size={plan.batch_size}, but "
                f"there are {batch} rows; plan for these."
            )
        if plan.prompt < longest or plan.new_tokens < steps:
            raise ValueError(
                f"{where}: plan {name!r} is for prompt={plan.prompt} and new_tokens="
                f"{plan.new_tokens}, but the longest row has {longest} and {steps} "
                "steps follow; plan for at least these."
            )
    for name, shorten in filters.items():
        try:
            shorten.check(model)
        except ValueError as error:
            raise ValueError(f"{where}: filter {name!r}: {error}") from error
