"""One training step of adapters over frozen weights, moved inside the backward pass.

Idea     A layer's adapters are read by nothing that the backward pass still has to do,
         so they move as soon as their gradient is known: the gradients of one layer's
         adapters exist, never those of all.
Memory   L*B*T*M activations, one block's internals and one layer's gradients.
Exact    The update that follows a whole backward pass. What is lost is anything that
         looks at all gradients first (clipping by a norm) or adds several
         (accumulation).
See      jmem/finetune/mixlora/, jmem/finetune/lora.py, tests/finetune/
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmem.finetune.descent import needs_key
from jmem.finetune.fused import find_states
from jmem.finetune.layerwise import put_row
from jmem.finetune.walk import make_salt
from jmem.models.next_token import find_positions
from jmem.nn.ops import Ops
from jmem.nn.stack import depth
from jmem.offload import fetch
from jmem.program import by_key, nest


def attach(tree: dict, adapters: dict) -> dict:
    """`tree` with the leaves of `adapters` added at the same paths (nothing copied)."""
    added = {
        name: attach(tree.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in adapters.items()
    }
    return tree | added


def check_fit(who: str, adapters: dict, wanted: dict, settings: str) -> None:
    """Refuses adapters that do not have the shapes of `wanted`, path by path.

    `settings` are those that demand them, for the message: "rank=4, maps=('q',)".
    """
    given, needed = (
        {path: leaf.shape for path, leaf in by_key(tree).items()}
        for tree in (adapters, wanted)
    )
    for path in sorted(given.keys() | needed.keys()):
        if given.get(path) != needed.get(path):
            raise ValueError(
                f"{who}: adapters hold {path} with shape {given.get(path)}, but "
                f"{settings} and this base need {needed.get(path)}. Use the adapters' "
                "own settings, over the base they were trained on."
            )


def fuses(model, update: str, max_grad_norm: float, parts: int) -> bool:
    """Whether adapters move inside the backward pass, which keeps block inputs only."""
    if update != "auto":
        return update == "fused"
    if needs_key(model) or max_grad_norm or parts > 1:
        return False
    return getattr(model, "remat", None) == "block"


def adapter_step(
    model,
    params: dict,
    adapters: Any,
    moments: Any,
    batch,
    ops: Ops,
    nothing: jax.Array,
    *,
    head: Callable[[jax.Array], tuple[jax.Array, Any]],
    balance: Callable[[dict], tuple[jax.Array, Any]],
    move: Callable[[jax.Array, Any, Any, Any], tuple[Any, Any, jax.Array]],
) -> tuple[Any, Any, jax.Array, Any, Any]:
    """(adapters, moments, squares, what `head` saw, what `balance` saw).

    `adapters` and `moments` are stacked on axis 0 as `params["blocks"]` is, at whose
    paths the adapters belong. The loss is that of `head(x)`, on the last block's output
    [B, T, M], and of `balance(aux)`, on what the blocks said, stacked to [L, ...]; each
    returns (loss, more). `move(layer, adapters, moments, gradients)` makes one layer's
    adapters and moments into the next, and what is summed over layers besides (squares
    of gradients, float32), from `nothing` on.
    """
    positions = find_positions(batch)

    def block(p, own, x, layer):
        x, _, aux = model.block(attach(p, own), x, positions, layer, ops, None)
        return x, aux

    def forward(x, xs):
        layer, p, own = xs
        out, aux = block(fetch(p), own, x, layer)
        return out, (x, aux)

    layers = jnp.arange(depth(params["blocks"]), dtype=jnp.int32)
    x = model.embed(params, batch.tokens, positions)
    x, (inputs, aux) = jax.lax.scan(forward, x, (layers, params["blocks"], adapters))
    (_, seen), dx = jax.value_and_grad(head, has_aux=True)(x)
    (_, traffic), d_aux = jax.value_and_grad(balance, has_aux=True)(aux)

    def backward(carry, xs):
        dx, held, squares = carry
        layer, p, x, d_aux = xs
        own, state = jax.tree.map(lambda a: a[layer], held)
        p = fetch(p)
        _, pull = jax.vjp(lambda own, x: block(p, own, x, layer), own, x)
        gradients, dx = pull((dx, d_aux))
        own, state, more = move(layer, own, state, gradients)
        return (dx, put_row(held, layer, (own, state)), squares + more), None

    (_, (adapters, moments), squares), _ = jax.lax.scan(
        backward,
        (dx, (adapters, moments), nothing),
        (layers, params["blocks"], inputs, d_aux),
        reverse=True,
    )
    return adapters, moments, squares, seen, traffic


def move_leaves(
    adapters: Any,
    moments: Any,
    gradients: Any,
    update: Callable[..., tuple[jax.Array, Any]],
    *numbers: jax.Array,
) -> tuple[Any, Any]:
    """(adapters, moments) after `update(path, w, moments, dw, salt)` of every leaf.

    dw is float32. The salt (uint32) is one that no other leaf has, nor other `numbers`
    (of the step, of the layer).
    """
    gradients, states, found = by_key(gradients), find_states(moments, adapters), {}
    for path, w in by_key(adapters).items():
        dw = gradients[path].astype(jnp.float32)
        salt = make_salt(path, *numbers)
        found[path] = update(path, w, states[path], dw, salt)
    weights, states = ({path: pair[i] for path, pair in found.items()} for i in (0, 1))
    return nest(weights, adapters), nest(states, adapters)
