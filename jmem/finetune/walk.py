"""What a fused step's walks over the weights share: a block, a part, an update rule."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jmem.nn.ops import Ops
from jmem.nn.packed import Packed
from jmem.sharding import Layout, find_layout

Update = Literal["auto", "fused", "separate"]
"""Whether weights move inside the backward pass, after it, or as the rest allows."""

Rule = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
"""`rule(w, state, dw, rate, t, salt) -> (w, state)`: one update of a part of a weight.

`state` holds arrays that have w's rows, `dw` is float32, `t` the number of this update
since the state began (1 is the first; `state` is zeros then). `salt` is a uint32 that
no other part and no other step has. `weight_decay=` stands in for the rule's own."""


@dataclasses.dataclass(frozen=True)
class Walk:
    """What every part of a fused step's backward pass needs: model, rule and batch."""

    model: Any
    rule: Rule
    batch: Any
    positions: jax.Array | Packed
    number: jax.Array
    """Of the step."""
    decays: Callable[[str], bool]
    """Whether the rule decays the weight at a path."""

    @property
    def ops(self) -> Ops:
        """What the model computes attention and linear maps by."""
        return self.model.ops

    def block(self, p, x, layer, ops: Ops | None = None):
        """A block's output, by `ops` if given, and the sum of its `aux` losses."""
        ops = ops or self.ops
        x, _, aux = self.model.block(p, x, self.positions, layer, ops, None)
        return x, sum(map(jnp.sum, jax.tree.leaves(aux)), jnp.float32(0))

    @property
    def layout(self) -> Layout | None:
        """How a mesh divides the model; None for one device."""
        return find_layout(self.model)

    def at_rest(self, path, dw):
        """A gradient, summed over the mesh into the parts that its weight has."""
        return dw if self.layout is None else self.layout.place_at_rest(path, dw)

    # Parts of a weight ----------------------------------------------------------------

    def count_trips(self, parts: int, after: jax.Array | None = None) -> jax.Array:
        """`parts`, as only the data knows, and not before `after` is known."""
        number = self.number
        if after is not None:
            number += wait_for(after)
        return jnp.where(number >= 0, jnp.int32(parts), 0)

    def apply(self, path, layer, index, w, state, dw, rate, t):
        """The rule on a part; a state begins as zeros at its first update."""
        state = tuple(jnp.where(t == 1, jnp.zeros_like(s), s) for s in state)
        salt = make_salt(path, self.number, layer, index)
        dw, decay = dw.astype(jnp.float32), self.override_decay(path)
        return self.rule(w, state, dw, rate, t, salt, **decay)

    def override_decay(self, path) -> dict[str, float]:
        """What a rule is told where the weight at `path` is not to be decayed."""
        return {} if self.decays(path) else {"weight_decay": 0.0}

    def move_leaf(self, path, w, state, dw, rate, t, layer=0):
        """A small leaf at once: (w, state, square of the gradient's norm)."""
        w, state = self.apply(path, layer, 0, w, state, dw, rate, t)
        return w, state, sum_squares(dw)


def einsum_wide(spec: str, *arrays: jax.Array) -> jax.Array:
    """`jnp.einsum` whose sums, and result, are float32."""
    return jnp.einsum(spec, *arrays, preferred_element_type=jnp.float32)


def take_part(a: jax.Array, index: Any, parts: int, axis: int) -> jax.Array:
    """Part `index` of `a`, cut along `axis` into so many equal ones."""
    size = a.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(a, index * size, size, axis)


def put_part(a: jax.Array, part: jax.Array, index: Any, axis: int) -> jax.Array:
    """`a` with part `index` along `axis` replaced."""
    at = index * part.shape[axis]
    return jax.lax.dynamic_update_slice_in_dim(a, part, at, axis)


def make_salt(path: str, *numbers: Any) -> jax.Array:
    """A uint32 that no other path has, nor other `numbers` (of step, layer, part)."""
    salt = jnp.uint32(zlib.crc32(path.encode()))
    for number in numbers:
        salt = salt * jnp.uint32(0x9E3779B1) + jnp.asarray(number, jnp.uint32)
    return salt


def sum_squares(dw):
    """The sum of squares of a gradient, float32."""
    return jnp.sum(jnp.square(dw.astype(jnp.float32)))


def flatten(x):
    """[..., M] as [N, M]."""
    return x.reshape(-1, x.shape[-1])


def wait_for(x: jax.Array) -> jax.Array:
    """0 (int32), but XLA only knows when it has `x`: what uses it waits for `x`."""
    value = x.reshape(-1)[0].astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return jnp.minimum(bits & jnp.int32(0x7FFFFFFF), 0)
