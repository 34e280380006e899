"""An MLP whose experts are low-rank adapters over one frozen MLP, for several models.

Idea     A token's experts differ from the base by products of rank r, so the base is
         computed once a token, not once an expert:
         1. down is linear: W2 sum_j w_j a_j in place of sum_j w_j W2 a_j;
         2. all E experts' A stand side by side in one [in, E*r], so that a slot's
            product is (x A * mask) B, with ones where a token chose the expert. No
            sort, no capacity, no dropped token, and shapes that no choice changes.
            Beyond `DENSE` columns tokens are sorted by expert instead, into blocks of
            `BLOCK` rows that have one expert each: also exact, also static.
Memory   Kept for the backward pass: x and a token's choices. The hidden activations of
         all slots are computed again there, `ROWS` tokens at a time, whatever k.
Cost     Base 6*M*F FLOPs a token forward, as the plain MLP; experts add
         2*E*r*(2*M + F) + k*2*E*r*(2*F + M), sorted 6*k*r*(M + F)*(1 + E*BLOCK/ROWS).
Models   J mixtures train over one base: x is [J*B, T, M], and rows of one mixture meet
         its own adapters only. Leaves carry J before their own axes.
Source   Li et al., MixLoRA, 2024, arXiv:2404.15159; its official code runs down once a
         slot, and every expert in turn.
See      jmem/finetune/mixlora/, tests/finetune/test_mixture.py
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jmem.finetune.lora import drop_out
from jmem.finetune.walk import einsum_wide
from jmem.nn import quantised

ROWS = 2048
"""Tokens, of all mixtures together, whose hidden activations exist at a time."""
DENSE = 256
"""Columns E*r up to which experts are masked.

Of the base's FLOPs (LLaMA-2-7B, k = 2) they add 7.5 % at 128 columns, 15 % at 256 and
59 % at 1,024; sorted 1.4, 1.7 and 3.3 %, in products of `BLOCK` rows, whose speed on a
GPU was not measured."""
BLOCK = 64
"""Rows of one expert that are multiplied together where tokens are sorted."""
ABSENT = -1e30
"""Logit of an expert that a mixture does not have."""

Router = Literal["top_k", "top_p"]


# Routing ------------------------------------------------------------------------------


def choose(
    logits: Float[Array, "J N E"],
    *,
    router: Router,
    top_k: tuple[int, ...],
    top_p: tuple[float, ...],
) -> tuple[Int[Array, "J N K"], Float[Array, "J N K"], Float[Array, "J N E"]]:
    """(experts, their weights, probabilities) of every token, float32.

    "top_k": the k most probable, weights summing to 1; among equals the first comes
    first. "top_p": the most probable until their sum reaches top_p, the one that
    passes it among them, weighed by their probabilities as they are. A slot that a
    token does not use has weight 0. `top_k` and `top_p` have an entry a mixture.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    slots = max(top_k) if router == "top_k" else logits.shape[-1]
    weights, chosen = lax.top_k(probabilities, slots)
    if router == "top_k":
        used = jnp.arange(slots)[None] < jnp.array(top_k)[:, None]  # [J, K]
        # An expert that is used counts as load, though its probability underflows.
        weights = jnp.maximum(weights, jnp.finfo(jnp.float32).tiny)
        weights = jnp.where(used[:, None], weights, 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return chosen, weights / total, probabilities
    before = jnp.cumsum(lax.stop_gradient(weights), axis=-1) - weights
    used = before < jnp.array(top_p, jnp.float32)[:, None, None]
    return chosen, jnp.where(used, weights, 0.0), probabilities


def measure_traffic(
    chosen: Int[Array, "J N K"],
    weights: Float[Array, "J N K"],
    probabilities: Float[Array, "J N E"],
    real: Bool[Array, "J N"],
) -> dict[str, Float[Array, "J E"]]:
    """What a layer's balance is judged by, means over the `real` tokens.

    "load": how many of a token's slots go to each expert; no gradient flows through it.
    "importance": the router's probabilities.
    """
    experts = probabilities.shape[-1]
    share = real.astype(jnp.float32)
    share = share / jnp.maximum(jnp.sum(share, axis=1, keepdims=True), 1.0)
    hot = jax.nn.one_hot(chosen, experts, dtype=jnp.float32)
    hot = jnp.sum(hot * (weights > 0)[..., None], axis=2)
    load = jnp.einsum("jn,jne->je", share, lax.stop_gradient(hot))
    importance = jnp.einsum("jn,jne->je", share, probabilities)
    return {"load": load, "importance": importance}


def compute_imbalance(
    load: Float[Array, "L J E"],
    importance: Float[Array, "L J E"],
    experts: tuple[int, ...],
    over: Literal["global", "per_layer"],
) -> Float[Array, " J"]:
    """E * sum_e load_e * importance_e of each mixture: k if balanced, more if not.

    "global" averages both over the layers first, as the official code does, so that
    layers may be unbalanced in ways that cancel; "per_layer" averages the product.
    """
    if over == "global":
        load, importance = (jnp.mean(a, 0, keepdims=True) for a in (load, importance))
    product = jnp.sum(load * importance, axis=-1)
    return jnp.array(experts, jnp.float32) * jnp.mean(product, axis=0)


# The experts --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Experts:
    """Static parts of a mixture's MLP; see `mixture`."""

    count: int
    """E, of the mixture that has most."""
    scales: tuple[float, ...]
    """Of the products A B, one a mixture."""
    activate: Callable
    every_slot: bool
    """Whether all slots are used, or only as many as some token needs (data)."""
    dropout: float = 0.0

    def sorts(self, adapters: dict) -> bool:
        """Whether tokens are sorted by expert, rather than experts masked."""
        widest = max((a.shape[-1] for a, _ in adapters.values()), default=0)
        return widest > DENSE


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mixture(
    experts: Experts,
    x: Float[Array, "J N M"],
    chosen: Int[Array, "J N K"],
    weights: Float[Array, "J N K"],
    adapters: dict,
    base: dict,
    key: jax.Array | None,
) -> Float[Array, "J N M"]:
    """Sum over a token's slots of weight * its expert's MLP(x).

    `base` holds the frozen maps by name ("gate", "up", "down"), `adapters` the tuple
    (A [J, in, E*r], B [J, E*r, out]) of those that have one. Products are in x's dtype,
    the sum over slots in float32. `key` drops out inputs of the A's, if it is given.
    Differentiable with respect to x, weights and adapters; the gradients of adapters
    are float32 sums.
    """
    parts = _cut(x, chosen, weights)

    def step(_, part):
        index, x, chosen, weights = part
        own = _fold_in(key, index)
        return None, _forward(experts, x, chosen, weights, adapters, base, own)

    _, y = lax.scan(step, None, parts)
    return _join(y)[:, : x.shape[1]]


def _cut(*arrays):
    """[J, N, ...] as [C, J, N / C, ...], padded with zeros, and 0 ... C-1 before."""
    mixtures, length = arrays[0].shape[:2]
    size = min(max(ROWS // mixtures, 1), length)

    def cut(a):
        width = [(0, 0), (0, -length % size)] + [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, width)
        return jnp.moveaxis(a.reshape(mixtures, -1, size, *a.shape[2:]), 1, 0)

    parts = tuple(map(cut, arrays))
    return jnp.arange(parts[0].shape[0], dtype=jnp.int32), *parts


def _join(parts):
    """[C, J, n, ...] as [J, C * n, ...]."""
    parts = jnp.moveaxis(parts, 0, 1)
    return parts.reshape(parts.shape[0], -1, *parts.shape[3:])


def _fold_in(key, index):
    return None if key is None else jax.random.fold_in(key, index)


def _drop(experts: Experts, x, key, number):
    """X with values dropped out, for one product, if there is a key."""
    if key is None:
        return x
    return drop_out(x, experts.dropout, jax.random.fold_in(key, number))


def _enter(experts: Experts, x, adapters, base, key):
    """What x is to the hidden maps: {name: (x W, scale * x A)}.

    The second is None where there is no A, and x itself where tokens are sorted.
    """
    scale = jnp.array(experts.scales, x.dtype)[:, None, None]
    sorts, found = experts.sorts(adapters), {}
    for number, name in enumerate(name for name in ("gate", "up") if name in base):
        product = quantised.linear(f"mlp/{name}", base[name], x)
        code = None
        if name in adapters:
            code = _drop(experts, x, key, number)
            if not sorts:
                a = adapters[name][0].astype(x.dtype)
                code = jnp.einsum("jni,jir->jnr", code, a) * scale
        found[name] = product, code
    return found


def _run_slot(experts: Experts, entering, adapters, chosen, weight, key, slot):
    """One slot of every token: (weight * hidden float32, its code for down).

    Where tokens are sorted the code is what down's product adds to y.
    """
    hidden, sorts = None, experts.sorts(adapters)
    plan = _make_plan(experts, chosen) if sorts else None
    for name, (product, code) in entering.items():
        if code is not None and plan is not None:
            product += _multiply_sorted(experts, plan, code, adapters[name])
        elif code is not None:
            mask = make_mask(experts, chosen, code)
            b = adapters[name][1].astype(code.dtype)
            product += jnp.einsum("jnr,jro->jno", code * mask, b)
        product = experts.activate(product) if hidden is None else product
        hidden = product if hidden is None else hidden * product
    assert hidden is not None
    code = None
    if "down" in adapters:
        own = _drop(experts, hidden, key, 2 + slot)
        if plan is not None:
            code = _multiply_sorted(experts, plan, own, adapters["down"])
            code = code.astype(jnp.float32) * weight[..., None]
        else:
            scale = jnp.array(experts.scales, jnp.float32)[:, None, None]
            a = adapters["down"][0].astype(hidden.dtype)
            code = jnp.einsum("jni,jir->jnr", own, a).astype(jnp.float32)
            mask = make_mask(experts, chosen, code)
            code *= mask * weight[..., None] * scale
    return weight[..., None] * hidden.astype(jnp.float32), code


def make_mask(experts: Experts, chosen, code):
    """Ones where a column of `code` [J, n, E*r] is of the token's expert [J, n]."""
    columns = jnp.arange(code.shape[-1]) // (code.shape[-1] // experts.count)
    return (chosen[..., None] == columns[None, None]).astype(code.dtype)


class _Plan(NamedTuple):
    """Where tokens go that are sorted by expert, each block of rows one expert's."""

    source: Int[Array, "J P"]
    """The token of each row, N for a row of padding."""
    place: Int[Array, "J N"]
    """The row of each token."""
    owner: Int[Array, "J blocks"]
    """The expert of each block."""


def _make_plan(experts: Experts, chosen: Int[Array, "J N"]) -> _Plan:
    """Room for any choice: every expert may leave one block that is not full."""
    tokens, count = chosen.shape[1], experts.count
    rows = (-(-tokens // BLOCK) + count) * BLOCK

    def of(chosen):
        order = jnp.argsort(chosen, stable=True)
        owned = jnp.zeros((count,), jnp.int32).at[chosen].add(1)
        blocks = -(-owned // BLOCK)
        ends = jnp.cumsum(blocks)
        first = jnp.cumsum(owned) - owned  # of an expert's tokens, among all sorted
        start = (ends - blocks) * BLOCK  # and of its rows
        own = chosen[order]
        at = start[own] + jnp.arange(tokens, dtype=jnp.int32) - first[own]
        place = jnp.zeros((tokens,), jnp.int32).at[order].set(at)
        source = jnp.full((rows,), tokens, jnp.int32).at[at].set(order)
        numbers = jnp.arange(rows // BLOCK, dtype=jnp.int32)
        owner = jnp.searchsorted(ends, numbers, side="right")
        return _Plan(source, place, jnp.minimum(owner, count - 1))

    return jax.vmap(of)(chosen)


def _multiply_sorted(experts: Experts, plan: _Plan, x, pair) -> Float[Array, "J N out"]:
    """Scale * x A B, of every token by its own expert."""

    def of(plan, x, a, b, scale):
        a = jnp.moveaxis(a.reshape(a.shape[0], experts.count, -1), 1, 0)
        b = b.reshape(experts.count, -1, b.shape[-1])
        own = jnp.pad(x, ((0, 1), (0, 0)))[plan.source]
        own = own.reshape(-1, BLOCK, x.shape[-1])
        code = jnp.einsum("pni,pir->pnr", own, a[plan.owner]) * scale
        y = jnp.einsum("pnr,pro->pno", code, b[plan.owner])
        return y.reshape(-1, y.shape[-1])[plan.place]

    a, b = (half.astype(x.dtype) for half in pair)
    return jax.vmap(of)(plan, x, a, b, jnp.array(experts.scales, x.dtype))


def _leave(experts: Experts, x_dtype, hidden, code, adapters, base):
    """Down of the summed slots: base product and low-rank product."""
    y = quantised.linear("mlp/down", base["down"], hidden.astype(x_dtype))
    if code is not None and experts.sorts(adapters):
        y += code.astype(x_dtype)
    elif code is not None:
        b = adapters["down"][1].astype(x_dtype)
        y += jnp.einsum("jnr,jro->jno", code.astype(x_dtype), b)
    return y


def _loop_slots(experts: Experts, chosen, weights, add, start):
    """`add(sums, slot, chosen, weight)` for the slots in use, from `start`."""
    if experts.every_slot:
        for slot in range(chosen.shape[-1]):
            start = add(start, slot, chosen[..., slot], weights[..., slot])
        return start
    used = jnp.max(jnp.sum(weights > 0, axis=-1))

    def body(slot, sums):
        own = (lax.dynamic_index_in_dim(a, slot, 2, False) for a in (chosen, weights))
        return add(sums, slot, *own)

    return lax.fori_loop(0, used, body, start)


def _make_zeros(experts: Experts, entering, chosen, weights, adapters):
    """Zeros of what a slot makes: (hidden, code)."""

    def first(chosen, weight):
        return _run_slot(experts, entering, adapters, chosen, weight, None, 0)

    like = jax.eval_shape(first, chosen[..., 0], weights[..., 0])
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def _forward(experts: Experts, x, chosen, weights, adapters, base, key):
    entering = _enter(experts, x, adapters, base, key)

    def add(sums, slot, chosen, weight):
        own = _run_slot(experts, entering, adapters, chosen, weight, key, slot)
        return jax.tree.map(jnp.add, sums, own)

    nothing = _make_zeros(experts, entering, chosen, weights, adapters)
    hidden, code = _loop_slots(experts, chosen, weights, add, nothing)
    return _leave(experts, x.dtype, hidden, code, adapters, base)


def _mixture_forward(experts, x, chosen, weights, adapters, base, key):
    y = mixture(experts, x, chosen, weights, adapters, base, key)
    return y, (x, chosen, weights, adapters, base, key)


def _mixture_backward(experts, kept, dy):
    x, chosen, weights, adapters, base, key = kept
    index, *parts = _cut(x, chosen, weights, dy.astype(x.dtype))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), adapters)

    def step(sums, part):
        number, x, chosen, weights, dy = part
        own = x, chosen, weights, dy, adapters, base, _fold_in(key, number)
        dx, d_weights, d_adapters = _backward(experts, *own)
        sums = jax.tree.map(lambda s, d: s + d.astype(jnp.float32), sums, d_adapters)
        return sums, (dx, d_weights)

    d_adapters, (dx, d_weights) = lax.scan(step, zeros, (index, *parts))
    d_adapters = jax.tree.map(lambda d, a: d.astype(a.dtype), d_adapters, adapters)
    dx, d_weights = (_join(d)[:, : x.shape[1]] for d in (dx, d_weights))
    return dx, None, d_weights, d_adapters, None, None


def _backward(experts: Experts, x, chosen, weights, dy, adapters, base, key):
    """Of one part of the tokens: gradients of x, weights and adapters.

    A slot's activations are made, used and dropped before the next slot's.
    """

    def enter(x, adapters):
        return _enter(experts, x, adapters, base, key)

    entering, to_input = jax.vjp(enter, x, adapters)

    def leave(hidden, code, adapters):
        return _leave(experts, x.dtype, hidden, code, adapters, base)

    # Down is linear in both, so their values only matter to the gradient of its B.
    hidden, code = _make_zeros(experts, entering, chosen, weights, adapters)
    _, to_slots = jax.vjp(leave, hidden, code, adapters)
    d_hidden, d_code, _ = to_slots(dy)

    def add(sums, number, chosen, weight):
        code, d_entering, d_adapters, d_weights = sums

        def one(entering, adapters, weight):
            return _run_slot(experts, entering, adapters, chosen, weight, key, number)

        (_, own), pull = jax.vjp(one, entering, adapters, weight)
        more = pull((d_hidden, d_code))
        code, d_entering, d_adapters = jax.tree.map(
            lambda s, d: s + d.astype(s.dtype),
            (code, d_entering, d_adapters),
            (own, *more[:2]),
        )
        d_weights = lax.dynamic_update_index_in_dim(d_weights, more[2], number, 2)
        return code, d_entering, d_adapters, d_weights

    wide = jax.tree.map(
        lambda a: jnp.zeros(a.shape, jnp.float32), (code, entering, adapters)
    )
    sums = _loop_slots(experts, chosen, weights, add, (*wide, jnp.zeros_like(weights)))
    code, d_entering, d_adapters, d_weights = sums
    d_entering = jax.tree.map(lambda d, e: d.astype(e.dtype), d_entering, entering)
    dx, more = to_input(d_entering)
    d_adapters = jax.tree.map(lambda s, d: s + d.astype(s.dtype), d_adapters, more)
    if code is not None and not experts.sorts(adapters):
        a, b = d_adapters["down"]
        d_b = einsum_wide("jnr,jno->jro", code.astype(dy.dtype), dy)
        d_adapters["down"] = a, b + d_b
    return dx, d_weights, d_adapters


mixture.defvjp(_mixture_forward, _mixture_backward)
