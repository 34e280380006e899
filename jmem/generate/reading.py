"""Prompts enter caches, at once or piece by piece, and further tokens after them.

`prefill` reads prompts, for any number of caches at once; `read_on` reads further
tokens against one cache: a later turn (`jmem.generate.conversation`), or the next piece
of a long prompt. Each is one compiled program, to which the caches are donated.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jmem.generate.checks import (
    check_finite,
    check_lengths,
    check_positive,
)
from jmem.kvcache.plan import Plan
from jmem.kvcache.prefill import read_prompts
from jmem.kvcache.shorten import Shorten, pad_rows
from jmem.lowering import JitInPlace
from jmem.models.next_token import token_positions
from jmem.nn.ops import Ops
from jmem.nn.pruned.in_place import read_in_place
from jmem.nn.stack import run_stack


def pad_right(
    tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Rows with their padding moved behind, and their lengths, as `prefill` takes them.

    `mask` is true for a row's own tokens, which lie together: Hugging Face's attention
    mask, padded on either side.
    """
    first = jnp.argmax(mask, axis=1)
    moved = jax.vmap(jnp.roll)(tokens, -first)
    return moved, jnp.sum(mask, axis=1, dtype=jnp.int32)


class Prefilled(NamedTuple):
    """What one pass over prompts gives to all that asked."""

    logits: Float[Array, "B V"]
    """After each row's last token."""
    caches: tuple[Any, ...]
    """Of each plan, filled."""
    chosen: tuple[Int[Array, "B N"], ...]
    """Positions that each filter keeps, ascending, -1 behind the last."""


def prefill_step(
    model,
    params: dict,
    tokens: Int[Array, "B T"] | Float[Array, "B T M"],
    lengths: Int[Array, " B"],
    caches: tuple[Any, ...],
    plans: tuple[Plan, ...],
    filters: tuple[Shorten, ...] = (),
    positions: Int[Array, "B T"] | None = None,
) -> Prefilled:
    """One pass over prompts, of which every plan and every filter takes what it keeps.

    Rows are padded on the right to T tokens; `lengths` counts each one's own. Attention
    is computed once, whatever the number of plans and filters. `tokens` may be what
    `model.embed` makes of them, or another encoder's output in the model's dtype.
    `positions` rotate (None: 0 ... T-1); a causal order and a sliding window go by the
    order of the tokens. Tokens that are decoded after others than 0 ... T-1 have places
    that are not their positions (`jmem.generate.decode.decode_step`).
    """
    if positions is None:
        row = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = jnp.broadcast_to(row[None], tokens.shape[:2])
    follow = tuple(shorten.follow for shorten in filters)
    ops = model.ops._replace(attend=read_prompts(model, plans, lengths, follow))
    carry = (
        *(
            (cache, plan.method.share(plan))
            for plan, cache in zip(plans, caches, strict=True)
        ),
        *(shorten.begin(tokens) for shorten in filters),
    )
    x = tokens if tokens.ndim == 3 else model.embed(params, tokens, positions)
    block, blocks = read_in_place(model, params["blocks"])
    x, carry, _ = run_stack(block, blocks, x, positions, ops, carry)
    logits = _compute_logits_after(model, params, x, lengths, ops)
    kept, chosen = carry[: len(plans)], carry[len(plans) :]
    return Prefilled(logits, tuple(cache for cache, _ in kept), chosen)


def _compute_logits_after(model, params, x, lengths, ops: Ops) -> Float[Array, "B V"]:
    """Those of each row's last token."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return model.head(params, jnp.take_along_axis(x, last, axis=1)[:, 0], ops)


_prefill = jax.jit(
    prefill_step,
    static_argnames=("model", "plans", "filters"),
    donate_argnames="caches",
)


def prefill(
    model,
    params: dict,
    tokens: Int[Array, "B T"] | Float[Array, "B T M"],
    lengths: Int[Array, " B"],
    caches: tuple[Any, ...],
    plans: tuple[Plan, ...],
    *,
    positions: Int[Array, "B _"] | None = None,
) -> tuple[Float[Array, "B V"], tuple[Any, ...]]:
    """Logits after each row's last token, and the caches filled with the prompts.

    `prefill_step` as one compiled program, to which the caches are donated.

    Raises:
      ValueError: a plan for other rows or shorter prompts, a cache of another plan, a
        length that is not in [1, T], embeddings of another dtype or width than the
        model's, positions of another shape, or a method that attends a prompt in its
        own way beside others.
    """
    given = model, params, tokens, lengths, caches, plans
    logits, caches, _ = prefill_for_all(*given, positions=positions)
    return logits, caches


def prefill_for_all(
    model,
    params: dict,
    tokens: Int[Array, "B T"] | Float[Array, "B T M"],
    lengths: Int[Array, " B"],
    caches: tuple[Any, ...],
    plans: tuple[Plan, ...],
    filters: tuple[Shorten, ...] = (),
    *,
    positions: Int[Array, "B _"] | None = None,
) -> Prefilled:
    """`prefill`, and what each of the filters keeps of the prompts, by the same pass.

    Raises:
      ValueError: what `prefill` refuses, or a model that a filter cannot choose by.
    """
    _check_given("prefill", model, tokens, positions)
    own = check_lengths("prefill", tokens, lengths, caches, plans, least=1)
    if own is not None:
        for plan in plans:
            plan.method.check_prompt("prefill", plan, own)
    for shorten in filters:
        shorten.check(model)
    return _prefill(
        *(model, params, tokens, lengths, caches, plans, filters),
        positions=positions,
    )


def _check_given(where: str, model, tokens, positions) -> None:
    wanted = model.config.hidden, model.dtype
    if tokens.ndim == 3 and (tokens.shape[2], tokens.dtype) != wanted:
        raise ValueError(
            f"{where}: embeddings are {tokens.dtype} of {tokens.shape[2]} channels, "
            f"but the model's are {model.dtype} of {model.config.hidden}; make them "
            "by model.embed, or project and cast them."
        )
    if positions is not None and positions.shape != tokens.shape[:2]:
        raise ValueError(
            f"{where}: positions are {positions.shape}, but there are "
            f"{tokens.shape[:2]} tokens; give one for each, padding too."
        )


def read_on_step(
    model,
    params: dict,
    tokens: Int[Array, "B T"],
    before: Int[Array, " B"],
    lengths: Int[Array, " B"],
    cache: Any,
    plan: Plan,
) -> tuple[Float[Array, "B V"], Any]:
    """Logits after further tokens, and the cache that has selected from all again.

    Row b holds its positions up to `before[b]`; its next `lengths[b]` tokens are read
    against what it holds, see `jmem.kvcache.turn`. A row with none stays as it is, and
    its logits mean nothing. Rows are padded on the right to T tokens.
    """
    positions = before[:, None] + token_positions(tokens)
    method = plan.method
    ops = model.ops._replace(attend=method.turn(plan, cache, before, lengths, model))
    carry = cache, method.share(plan)
    x = model.embed(params, tokens, positions)
    block, blocks = read_in_place(model, params["blocks"])
    x, carry, _ = run_stack(block, blocks, x, positions, ops, carry)
    return _compute_logits_after(model, params, x, lengths, ops), carry[0]


_read_on = JitInPlace(
    read_on_step, static_argnames=("model", "plan"), donate_argnames="cache"
)


def read_on(
    model,
    params: dict,
    tokens: Int[Array, "B T"],
    before: Int[Array, " B"],
    lengths: Int[Array, " B"],
    cache: Any,
    plan: Plan,
) -> tuple[Float[Array, "B V"], Any]:
    """`read_on_step` as one compiled program, to which the cache is donated.

    Raises:
      ValueError: a plan for other rows, a cache of another plan, a length that is not
        in [0, T], or more tokens than a plan that drops none has slots.
    """
    own = check_lengths("read_on", tokens, lengths, (cache,), (plan,), least=0)
    if own is not None and not isinstance(before, Tracer):
        plan.method.check_turn(plan, np.asarray(before), own)
    return _read_on(model, params, tokens, before, lengths, cache, plan)


def read(
    model,
    params: dict,
    rows: Sequence[Sequence[int]],
    before: Sequence[int],
    cache: Any,
    plan: Plan,
    *,
    chunk: int | None = None,
    width: int = 0,
) -> tuple[Float[Array, "B V"], Any]:
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
    tokens, lengths = pad_rows(rows, width)
    if chunk is None and not any(before):
        logits, (cache,) = prefill(model, params, tokens, lengths, (cache,), (plan,))
    else:
        size = chunk or tokens.shape[1]
        tokens, _ = pad_rows(rows, -(-max(map(len, rows)) // size) * size)
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
