"""One training step that updates weights inside the backward pass, a tile at a time.

Idea     A block's weights are read by nothing that the backward pass still has to do,
         so they can move as soon as their gradient is known, and the gradient of a
         matrix is a product that can be made for some of its rows at a time: dW never
         exists. The block's own backward pass is that of its activations; each linear
         map's input and output gradient come from a tap, a zero added to its output.
Memory   L*B*T*M activations, one block's internals, and a tile: no gradient of a whole
         weight, whatever the number of active blocks.
Exact    The update is the one that follows a whole backward pass, in other order. What
         is lost is anything that looks at all gradients first (clipping by their
         global norm) or adds several (accumulation): `make_slot_gradients` is for
         those.
Fence    XLA's scheduler may make all dW before it uses the first, whatever barriers
         say. A branch that the data choose, and a loop whose trip count only they know,
         are what it keeps in order; weights and moments carried there are updated in
         place. A block moves in a branch that waits for its dx.
See      jmem/finetune/lisa/, tests/finetune/test_fused.py
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmem.finetune.layerwise import put_row
from jmem.finetune.patterns import join, split
from jmem.finetune.rules import Factored
from jmem.finetune.tables import Tables
from jmem.finetune.walk import (
    Rule,
    Sides,
    Walk,
    einsum_wide,
    find_kernels,
    flatten,
    sum_squares,
    take_part,
    wait_for,
)
from jmem.finetune.zeros import hold
from jmem.models.next_token import find_positions
from jmem.program import by_key, nest

TILES = 4
"""Parts that a block's weight is updated in."""


class Moved(NamedTuple):
    """Parameters and optimizer states after a step, and the loss before it."""

    loss: Float[Array, ""]
    params: dict
    blocks: Any
    """States of the blocks' parameters, leaves [S, ...]."""
    outside: Any
    """States of all other parameters."""
    square: Float[Array, ""]
    """The squared norm of all gradients, float32."""


def fused_step(
    model,
    params: dict,
    batch,
    rule: Rule,
    *,
    outside_rule: Rule | None = None,
    row_of: Int[Array, " L"],
    blocks: Any,
    block_counts: Int[Array, " S"],
    outside: Any,
    outside_count: Int[Array, ""],
    rates: dict,
    step: Int[Array, ""],
    decays: Callable[[str], bool],
    train: tuple[str, ...] = (),
    keep_zeros: bool = False,
) -> Moved:
    """One update of everything outside the blocks, and of the blocks that have a row.

    `outside_rule`, if any, is that of what is outside the blocks.
    `row_of` says which row of `blocks` holds a block's state, -1 for a frozen block.
    `blocks` and `outside` are trees as the trained parameters, each leaf a tuple of
    arrays; those of the blocks are [S, ...]. Counts are the numbers of this update.
    `rates` is a tree as the trained parameters (`AdamW.find_leaf_rates`). `step`
    counts from 0 and must be traced (see Fence). `decays(path)` says whether the rule
    decays a weight (`AdamW.decays`). `keep_zeros`: see `jmem.finetune.zeros`. The loss
    is a decoder's (`Decoder.loss`).
    """
    chosen, rest = split(params, train, "fused_step: train")
    positions = find_positions(batch)
    own_rates, below = by_key(rates["blocks"]), bool(jax.tree.leaves(chosen["embed"]))
    walk = _Blocks(
        *(model, positions, rule, batch, step, decays),
        *(chosen["blocks"], rest["blocks"], block_counts, own_rates, below, keep_zeros),
    )
    tables = Tables(model, positions, outside_rule or rule, batch, step, decays)

    table = chosen["embed"].get("embedding")
    added = {k: v for k, v in chosen["embed"].items() if k != "embedding"}

    def embed(added):
        whole = params["embed"] | {k: v for k, v in added.items() if v is not None}
        return model.embed(params | {"embed": whole}, batch.tokens, positions)

    x, embed_transpose = jax.vjp(embed, added)
    x, inputs, aux = walk.forward(x, params["blocks"])

    head = tables.head(params, chosen, x, outside, outside_count, rates)
    dx, moved_blocks, blocks, square = walk.backward(row_of, inputs, head.dx, blocks)
    moved = dict(params)
    moved["blocks"] = join(moved_blocks, rest["blocks"])
    state = dict(head.state)
    for name, tree in head.params.items():
        moved[name] = join(tree, rest[name])

    d_added = embed_transpose(dx)[0]
    fresh, own_state, square = tables.move_small(
        *("embed", added, d_added, outside, rates, outside_count, square)
    )
    if table is not None:
        fresh["embedding"], own_state["embedding"], more = tables.move_embedding(
            table,
            outside["embed"]["embedding"],
            *(dx, head if model.config.tied else None),
            *(rates["embed"]["embedding"], outside_count),
        )
        square += more
    moved["embed"] = join(chosen["embed"] | fresh, rest["embed"])
    state["embed"] = outside["embed"] | own_state
    loss = head.loss + jnp.sum(aux)
    return Moved(loss, moved, blocks, state, square + head.square)


@dataclasses.dataclass(frozen=True)
class _Blocks(Walk):
    """The backward pass through the blocks, from the last to the first."""

    chosen: Any
    """Trained parameters of all blocks; only their structure is used."""
    rest: Any
    """Those that are not trained."""
    counts: jax.Array
    """Number of this update, by row of the states."""
    rates: dict
    """Rates of the trained parameters, by path."""
    whole: bool
    """Whether dx is wanted at the bottom. If not, nothing below the lowest block with
    a row asks for it, and the blocks there compute nothing."""
    keep_zeros: bool
    """Whether weights that are 0 stay so."""

    def backward(self, row_of, inputs, dx, states):
        """(dx, blocks, states, square) after all layers."""
        stacks, states = by_key(self.chosen), find_states(states, self.chosen)
        layers = jnp.arange(len(row_of), dtype=jnp.int32)
        count = len(row_of)
        if not self.whole:
            count -= jnp.min(jnp.where(row_of >= 0, layers, len(row_of)))

        def step(carry):
            index, carry = carry
            layer = len(row_of) - 1 - index
            return index + 1, self.step(layer, row_of[layer], inputs[layer], *carry)

        # Counted by the loop itself: of no other number does XLA (0.12) know that it is
        # the number of a row, which products then read in the stack.
        _, (dx, stacks, states, square) = jax.lax.while_loop(
            lambda carry: carry[0] < count,
            step,
            (jnp.int32(0), (dx, stacks, states, jnp.float32(0))),
        )
        return dx, nest(stacks, self.chosen), nest(states, self.chosen), square

    def step(self, layer, place, x, dx, stacks, states, square):
        """(dx, stacks, states, square) before and after a layer.

        The gradient passes the block first, for in a branch its weights would be read
        from copies. Then it moves, if it has a row.
        """
        p = _take_row(stacks, layer)
        dx, sides = self.pull_back(p, lambda p: self.join(p, layer), x, layer, dx)
        leaves = {path: p[path] for path in sides.leaves}
        self.check_read(sides)
        if not self.counts.shape[0]:
            return dx, stacks, states, square
        place = place + wait_for(dx)  # the stacks have been read
        stacks, states, more = jax.lax.cond(
            place >= 0,
            lambda: self.move(layer, place, leaves, sides, stacks, states),
            lambda: (stacks, states, jnp.float32(0)),
        )
        return dx, stacks, states, square + more

    def check_read(self, sides: Sides) -> None:
        """Refuses a block of which not every kernel is read once, by `ops.linear`."""
        for name, path in find_kernels(by_key(self.chosen)).items():
            if (count := len(sides.read.get(path, ()))) != 1:
                raise ValueError(
                    f"fused_step: a block reads the linear map {name!r} {count} times "
                    "by `ops.linear`, and its gradient is made of one reading. Use the "
                    "step that is not fused."
                )

    def move(self, layer, place, leaves, sides: Sides, stacks, states):
        """The block moves: (stacks, states, square). `leaves` are its small weights."""
        t, square = self.counts[place], jnp.float32(0)
        stacks, states = dict(stacks), dict(states)
        for path in sides.read:
            (h,), (dy,) = sides.read[path], sides.given[path]
            stacks[path], states[path], more = self.move_kernel(
                *(path, stacks[path], states[path], flatten(h), flatten(dy)),
                *(layer, place, _take_rate(self.rates[path], layer), t),
            )
            square += more
        for path, leaf in leaves.items():
            own = _take_row(states[path], place)
            rate = _take_rate(self.rates[path], layer)
            w, own, more = self.move_leaf(
                path, leaf, own, sides.leaves[path], rate, t, layer
            )
            stacks[path] = put_row(stacks[path], layer, w)
            states[path] = put_row(states[path], place, own)
            square += more
        return stacks, states, square

    def move_kernel(self, path, stack, state, h, dy, layer, row, rate, t):
        """Row `layer` of a stacked kernel, by its input h [N, in] and dy [N, out].

        A rule that looks at a whole matrix gets it in one part: of all gradients, that
        one exists.
        """
        layout, axis, tiles = self.layout, 0, TILES
        if layout is not None:  # along `in` a mesh has divided it
            axis, tiles = 1, TILES if layout.cuts_columns(path) else 1
        tiles = 1 if isinstance(self.rule, Factored) else tiles
        parts = _find_divisor(stack.shape[1 + axis], tiles)

        def body(index, carry):
            stack, state, square = carry
            sides = [h, dy]
            sides[axis] = take_part(sides[axis], index, parts, axis=1)
            dw = einsum_wide("ni,no->io", *sides)
            dw = self.at_rest(path, dw)
            w, *own = (
                _take_part(a, place, index, parts, axis)
                for a, place in ((stack, layer), *((s, row) for s in state))
            )
            dw = hold(dw, w) if self.keep_zeros else dw
            moved, own = self.apply(path, layer, index, w, tuple(own), dw, rate, t)
            w = hold(moved, w) if self.keep_zeros else moved
            stack = _put_part(stack, w, layer, index, axis)
            state = tuple(
                _put_part(s, o, row, index, axis)
                for s, o in zip(state, own, strict=True)
            )
            return stack, state, square + sum_squares(dw)

        carry = stack, state, jnp.float32(0)
        return jax.lax.fori_loop(0, parts, body, carry)

    def join(self, p, layer):
        """One layer's parameters, of what is trained of it and what is not."""
        return join(nest(p, self.chosen), _take_row(self.rest, layer))


def _find_divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`."""
    return next(n for n in range(min(most, size), 0, -1) if size % n == 0)


def _take_row(stacked, index):
    """Row `index` of every leaf of a stacked tree."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False),
        stacked,
    )


def _take_rate(rate, layer):
    """A leaf's rate, or that of one layer of it."""
    return rate[layer].reshape(()) if rate.ndim else rate


def _take_part(leaf, row, index, parts, axis):
    """Part `index`, along `axis`, of row `row`: [rows / parts, ...] for axis 0."""
    sizes = list(leaf.shape[1:])
    sizes[axis] //= parts
    start = _find_start(leaf, row, index * sizes[axis], axis)
    return jax.lax.dynamic_slice(leaf, start, (1, *sizes))[0]


def _put_part(leaf, value, row, index, axis):
    start = _find_start(leaf, row, index * value.shape[axis], axis)
    return jax.lax.dynamic_update_slice(leaf, value[None], start)


def _find_start(leaf, row, at, axis):
    return (row, *(at if n == axis else 0 for n in range(leaf.ndim - 1)))


def find_states(states: Any, like: Any) -> dict:
    """The tuple of arrays that `states` has in the place of each leaf of `like`."""
    return dict(zip(by_key(like), jax.tree.structure(like).flatten_up_to(states)))
