"""What walks over the blocks share: a block, what its gradients are of, an update rule.

Idea     A linear map's gradient is `hᵀ dy`, of what it read and of the gradient of what
         it gave. Both are known once the gradient has passed the block, whose backward
         pass so stops before its weights: who wants their gradients makes them, all or
         some, whole or by parts, of blocks that only the data knows.
Copies   The backward pass reads a layer's weights where they lie in their stack. A
         branch that read them would be handed copies (XLA 0.12).
See      jmem/finetune/layerwise.py, jmem/finetune/fused.py
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jmem.nn.maps import find_dicts
from jmem.nn.ops import Ops
from jmem.nn.packed import Packed
from jmem.nn.stack import depth
from jmem.sharding import Layout, find_layout

Update = Literal["auto", "fused", "separate"]
"""Whether weights move inside the backward pass, after it, or as the rest allows."""

Rule = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
"""`rule(w, state, dw, rate, t, salt) -> (w, state)`: one update of a part of a weight.

`state` holds arrays that have w's rows, `dw` is float32, `t` the number of this update
since the state began (1 is the first; `state` is zeros then). `salt` is a uint32 that
no other part and no other step has. `weight_decay=` stands in for the rule's own."""


class Sides(NamedTuple):
    """What the gradients of one block's trained parameters are made of."""

    read: dict[str, list[jax.Array]]
    """By the path of a linear map's kernel, its inputs [B, T, in], one a reading."""
    given: dict[str, list[jax.Array]]
    """The gradients of its outputs [B, T, out]."""
    leaves: dict[str, jax.Array]
    """By path, the gradients of all others: norms, biases."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A decoder's blocks, one at a time, forward and back."""

    model: Any
    positions: jax.Array | Packed

    @property
    def ops(self) -> Ops:
        """What the model computes attention and linear maps by."""
        return self.model.ops

    def block(self, p, x, layer, ops: Ops | None = None):
        """A block's output, by `ops` if given, and the sum of its `aux` losses."""
        ops = ops or self.ops
        x, _, aux = self.model.block(p, x, self.positions, layer, ops, None)
        return x, sum(map(jnp.sum, jax.tree.leaves(aux)), jnp.float32(0))

    def forward(self, x, stacked):
        """What all blocks make of x, their inputs [L, ...] and their losses [L]."""

        def step(x, xs):
            layer, p = xs
            out, aux = self.block(p, x, layer)
            return out, (x, aux)

        layers = jnp.arange(depth(stacked), dtype=jnp.int32)
        x, (inputs, aux) = jax.lax.scan(step, x, (layers, stacked))
        return x, inputs, aux

    def pull_back(
        self,
        trained: dict[str, jax.Array],
        whole: Callable[[dict[str, jax.Array]], Any],
        x: jax.Array,
        layer: jax.Array,
        dx: jax.Array,
    ) -> tuple[jax.Array, Sides]:
        """A block's backward pass, up to its weights: the gradient of x, and `Sides`.

        `trained` are the block's trained parameters by path, and `whole` makes all of
        its parameters of them.
        """
        kernels = find_kernels(trained)

        def run(taps, leaves, x):
            """The block with taps, zeros, added to what each map gives."""
            read = {path: [] for path in taps}

            def linear(name, leaf, h):
                y, path = self.ops.linear(name, leaf, h), kernels.get(name)
                if path is None:
                    return y
                read[path].append(h)
                return y + taps[path][len(read[path]) - 1]

            ops = self.ops._replace(linear=linear)
            return self.block(whole(trained | leaves), x, layer, ops), read

        taps = self._shape_taps(kernels, whole(trained), x, layer)
        taps = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), taps)
        leaves = {path: leaf for path, leaf in trained.items() if path not in taps}
        _, transpose, read = jax.vjp(run, taps, leaves, x, has_aux=True)
        given, leaves, dx = transpose((dx, jnp.float32(1)))
        return dx, Sides(read, given, leaves)

    def make_gradients(self, p: Any, sides: Sides) -> dict[str, jax.Array]:
        """The gradients of a block's trained parameters, by path, in their dtypes.

        `p` are all parameters of the block.
        """
        maps = find_dicts(p, lambda tree: "kernel" in tree)

        def differentiate(name, path):
            def give(kernel):
                leaf = maps[name] | {"kernel": kernel}
                return [self.ops.linear(name, leaf, h) for h in sides.read[path]]

            return jax.vjp(give, maps[name]["kernel"])[1](sides.given[path])[0]

        kernels = find_kernels(sides.read)
        made = {path: differentiate(name, path) for name, path in kernels.items()}
        return sides.leaves | made

    def _shape_taps(self, kernels, p, x, layer):
        """By path of a kernel, what comes of each reading by `ops.linear`."""
        found: dict[str, list[Any]] = {}

        def linear(name, leaf, h):
            y = self.ops.linear(name, leaf, h)
            if name in kernels:
                found.setdefault(kernels[name], []).append(jax.typeof(y))
            return y

        ops = self.ops._replace(linear=linear)
        jax.eval_shape(lambda p, x: self.block(p, x, layer, ops), p, x)
        return found

    @property
    def layout(self) -> Layout | None:
        """How a mesh divides the model; None for one device."""
        return find_layout(self.model)


@dataclasses.dataclass(frozen=True)
class Walk(Blocks):
    """What every part of a fused step's backward pass needs: model, rule and batch."""

    rule: Rule
    batch: Any
    number: jax.Array
    """Of the step."""
    decays: Callable[[str], bool]
    """Whether the rule decays the weight at a path."""

    def at_rest(self, path, dw):
        """A gradient, summed over the mesh into the parts that its weight has."""
        return dw if self.layout is None else self.layout.place_at_rest(path, dw)

    # Parts of a weight ----------------------------------------------------------------

    def count_trips(self, parts: int) -> jax.Array:
        """`parts`, as only the data knows."""
        return jnp.where(self.number >= 0, jnp.int32(parts), 0)

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


def find_kernels(paths: Iterable[str]) -> dict[str, str]:
    """The paths of kernels, by the names of their linear maps.

    >>> find_kernels(["mlp/up/kernel", "mlp/up/bias", "mlp_norm/scale"])
    {'mlp/up': 'mlp/up/kernel'}
    """
    kernels = (path for path in paths if path.endswith("/kernel"))
    return {path.removesuffix("/kernel"): path for path in kernels}


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
