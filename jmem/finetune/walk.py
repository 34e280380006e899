"""What a fused step's walks over the weights share: a block, a part, an update rule."""

import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jmem.nn.ops import Ops
from jmem.sharding import Layout, layout_of

Update = Literal["auto", "fused", "separate"]
"""Whether weights move inside the backward pass, after it, or as the rest allows."""

Rule = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
"""`rule(w, state, dw, rate, t, salt) -> (w, state)`: one update of a part of a weight.

`state` holds arrays that have w's rows, `dw` is float32, `t` the number of this update
since the state began (1 is the first; `state` is zeros then). `salt` is a uint32 that
no other part and no other step has."""


class Walk(NamedTuple):
    """The backward pass; what all of its parts share."""

    model: Any
    ops: Ops
    rule: Rule
    batch: Any
    positions: jax.Array
    number: jax.Array
    """Of the step."""

    def block(self, p, x, layer, ops: Ops):
        """A block's output, and the sum of its `aux` losses."""
        x, _, aux = self.model.block(p, x, self.positions, layer, ops, None)
        return x, sum(map(jnp.sum, jax.tree.leaves(aux)), jnp.float32(0))

    @property
    def layout(self) -> Layout | None:
        """How a mesh divides the model; None for one device."""
        return layout_of(self.model)

    def at_rest(self, path, dw):
        """A gradient, summed over the mesh into the parts that its weight has."""
        return dw if self.layout is None else self.layout.at_rest(path, dw)

    # Parts of a weight ----------------------------------------------------------------

    def trips(self, parts: int, after: jax.Array | None = None) -> jax.Array:
        """`parts`, as only the data knows, and not before `after` is known."""
        number = self.number
        if after is not None:
            number += zero_after(after)
        return jnp.where(number >= 0, jnp.int32(parts), 0)

    def apply(self, path, layer, index, w, state, dw, rate, t):
        """The rule on a part; a state begins as zeros at its first update."""
        state = tuple(jnp.where(t == 1, jnp.zeros_like(s), s) for s in state)
        salt = salt_of(path, self.number, layer, index)
        return self.rule(w, state, dw.astype(jnp.float32), rate, t, salt)

    def whole(self, path, w, state, dw, rate, t, layer=0):
        """A small leaf at once: (w, state, square of the gradient's norm)."""
        w, state = self.apply(path, layer, 0, w, state, dw, rate, t)
        return w, state, square_of(dw)


def salt_of(path: str, *numbers: Any) -> jax.Array:
    """A uint32 that no other path has, nor other `numbers` (of step, layer, part)."""
    salt = jnp.uint32(zlib.crc32(path.encode()))
    for number in numbers:
        salt = salt * jnp.uint32(0x9E3779B1) + jnp.asarray(number, jnp.uint32)
    return salt


def square_of(dw):
    return jnp.sum(jnp.square(dw.astype(jnp.float32)))


def flat(x):
    """[..., M] as [N, M]."""
    return x.reshape(-1, x.shape[-1])


def zero_after(x: jax.Array) -> jax.Array:
    """0 (int32), but XLA only knows when it has `x`: what uses it waits for `x`."""
    value = x.reshape(-1)[0].astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return jnp.minimum(bits & jnp.int32(0x7FFFFFFF), 0)
