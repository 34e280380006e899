"""Answers and losses from the caches of several plans, after one prefill for all.

A policy changes what is kept of a prompt and not how it is read, so its attention is
computed once, whatever the number of plans. GemFilter's choice is made in the same
pass, at its layer (by itself it would read the layers below only), and the prompt that
it leaves is then read alone. Each plan decodes from its own cache, all rows together:
a step costs what reading the weights does, so rows are nearly free.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmem.generate.decode import decode_step, extend, prefill
from jmem.kvcache.cache import Cache, empty
from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import GemFilter, best, token_scores
from jmem.kvcache.plan import Plan
from jmem.kvcache.policy import Policy, Seen


def answers(
    model,
    params: dict,
    plans: Mapping[str, Plan],
    tokens: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, " B"],
    *,
    steps: int,
    gems: Mapping[str, GemFilter] | None = None,
    rows: int | None = None,
) -> dict[str, Int[np.ndarray, "B steps"]]:
    """Greedy answers of `steps` tokens a row from the cache of each plan, by name.

    Prompts are padded on the right to T tokens. `gems` answer too, from a full cache of
    the prompt that each leaves. `rows` are read at a time, which bounds the memory of
    attention and must divide B; None: all.

    Memory: the caches of all plans exist together, the sum of `Plan.bytes()`, and the
    one that is decoded from a second time where `rows` is less than B.

    Raises:
      ValueError: nothing to answer from, a plan for other rows, shorter prompts or
        fewer steps, more positions than the model has, or `rows` that do not divide B.
    """
    work = "answers", model, params, plans, tokens, lengths, steps, gems or {}, rows
    found = {}
    for name, context in _contexts(*work):
        produced, _ = extend(
            model,
            params,
            context.logits,
            context.lengths,
            context.cache,
            jax.random.key(0),
            plan=context.plan,
            steps=steps,
        )
        found[name] = np.asarray(produced)
    return found


def losses(
    model,
    params: dict,
    plans: Mapping[str, Plan],
    tokens: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, " B"],
    continuation: Int[Array | np.ndarray, "B N"],
    *,
    gems: Mapping[str, GemFilter] | None = None,
    rows: int | None = None,
) -> dict[str, Float[np.ndarray, "B N"]]:
    """Loss of each token of a given continuation, in nats, from each plan's cache.

    Float32. Every token is predicted from the cut cache and the continuation before
    it, whatever the model would have said: `np.exp(losses.mean())` is the perplexity.
    The first token's is the same for all plans, as a prompt attends all of itself, but
    not for `gems`, which cut it before. Else as `answers`, with N steps.
    """
    continuation = jnp.asarray(continuation)
    steps = continuation.shape[1]
    work = "losses", model, params, plans, tokens, lengths, steps, gems or {}, rows
    return {
        name: np.asarray(_teacher_forced(model, params, *context, continuation)[0])
        for name, context in _contexts(*work)
    }


@functools.partial(jax.jit, static_argnames=("model", "plan"), donate_argnames="cache")
def _teacher_forced(
    model,
    params: dict,
    plan: Plan,
    logits: Float[Array, "B V"],
    lengths: Int[Array, " B"],
    cache: Cache,
    continuation: Int[Array, "B N"],
) -> tuple[Float[Array, "B N"], Cache]:
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


class Context(NamedTuple):
    """Prompts that were read, and the cache that one plan keeps of them."""

    plan: Plan
    logits: Float[Array, "B V"]
    """After each prompt's last token."""
    lengths: Int[Array, " B"]
    cache: Cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Votes(Policy):
    """Keeps, in a GemFilter's layer, what the filter would of the prompt; else nothing.

    Its cache is made for the positions in it.
    """

    gem: GemFilter

    @property
    def recent(self) -> int:
        return self.gem.queries

    def budgets(self, layers: int, prompt: int) -> tuple[int, ...]:
        return tuple(
            self.gem.tokens if layer == self.gem.layer else 0 for layer in range(layers)
        )

    def units(self, config) -> int:
        return 1

    def choose(
        self, plan: Plan, seen: Seen, layer: jax.Array, shared: Any
    ) -> tuple[Int[Array, "B 1 N"], Any]:
        gem, lengths = self.gem, seen.at[:, -1] + 1
        nothing = jnp.full((len(lengths), max(plan.selected)), -1, jnp.int32)

        def voted():
            scores = token_scores(gem, seen.queries, seen.at, seen.keys, lengths)
            kept = best(gem, scores, lengths)
            return jax.lax.dynamic_update_slice(nothing, kept, (0, 0))

        kept = jax.lax.cond(layer == gem.layer, voted, lambda: nothing)
        return kept[:, None], shared


def _contexts(
    where: str,
    model,
    params: dict,
    plans: Mapping[str, Plan],
    tokens: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, " B"],
    steps: int,
    gems: Mapping[str, GemFilter],
    rows: int | None,
) -> Iterator[tuple[str, Context]]:
    """One plan after the other, and then one gem; each cache is made when its turn is.

    Whoever takes a cache may donate it.
    """
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    _check(where, model, plans, gems, np.asarray(lengths), tokens.shape[1], steps, rows)
    batch, width = tokens.shape
    votes = {
        name: _Votes(gem=gem).plan(
            model,
            # So long that all of `gem.tokens` are selected ones.
            prompt=max(width, gem.tokens) + gem.queries,
            new_tokens=0,
            batch_size=batch,
        )
        for name, gem in gems.items()
    }
    logits, read = _read(
        model, params, {**plans, **votes}, tokens, lengths, rows or batch
    )
    for name, plan in plans.items():
        yield name, Context(plan, logits, lengths, _joined(read.pop(name)))
    for name, gem in gems.items():
        kept = jnp.concatenate([cache.positions[:, 0] for cache in read.pop(name)])
        kept = kept[:, : min(gem.tokens, width)]
        short = jnp.take_along_axis(tokens, jnp.maximum(kept, 0), axis=1)
        own = (kept >= 0).sum(axis=1, dtype=jnp.int32)
        plan = Full().plan(
            model, prompt=kept.shape[1], new_tokens=steps, batch_size=batch
        )
        after, again = _read(model, params, {name: plan}, short, own, rows or batch)
        yield name, Context(plan, after, own, _joined(again.pop(name)))


def _read(
    model, params: dict, plans: Mapping[str, Plan], tokens, lengths, rows: int
) -> tuple[Float[Array, "B V"], dict[str, list[Cache]]]:
    """Logits after the prompts, and each plan's filled caches, one for every `rows`."""
    own = tuple(dataclasses.replace(plan, batch_size=rows) for plan in plans.values())
    logits, caches = [], []
    for start in range(0, len(lengths), rows):
        part = slice(start, start + rows)
        fresh = tuple(map(empty, own))
        after, filled = prefill(
            model, params, tokens[part], lengths[part], fresh, plans=own
        )
        logits.append(after)
        caches.append(filled)
    return jnp.concatenate(logits), dict(zip(plans, map(list, zip(*caches))))


def _joined(caches: list[Cache]) -> Cache:
    """Of all rows."""
    if len(caches) == 1:
        return caches[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)


def _check(
    where: str,
    model,
    plans: Mapping[str, Plan],
    gems: Mapping[str, GemFilter],
    lengths: np.ndarray,
    width: int,
    steps: int,
    rows: int | None,
) -> None:
    batch, longest = len(lengths), int(lengths.max())
    if not plans and not gems:
        raise ValueError(f"{where}: plans is empty; give at least one, as Full's.")
    if both := plans.keys() & gems.keys():
        raise ValueError(f"{where}: {min(both)!r} is both in plans and in gems.")
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
    for name, gem in gems.items():
        if gem.layer >= model.config.layers:
            raise ValueError(
                f"{where}: gem {name!r} has layer={gem.layer}, which is not below the "
                f"model's {model.config.layers} layers."
            )
