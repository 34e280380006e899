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
         global norm) or adds several (accumulation): `slot_gradients` is for those.
Fence    XLA's scheduler may make all dW before it uses the first, whatever barriers
         say. A loop whose trip count only the data knows is the one thing that it keeps
         in order, and whose carried weights and moments it updates in place.
See      jmem/finetune/lisa.py, tests/finetune/test_fused.py
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmem.finetune.layerwise import put_row
from jmem.finetune.patterns import join, split
from jmem.nn.linear import dense
from jmem.nn.ops import Ops
from jmem.nn.stack import depth
from jmem.program import by_key
from jmem.train.loss import mean_weights, token_positions

Rule = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
"""`rule(w, state, dw, rate, t, salt) -> (w, state)`: one update of a part of a weight.

`state` holds arrays that have w's rows, `dw` is float32, `t` the number of this update
since the state began (1 is the first; `state` is zeros then). `salt` is a uint32 that
no other part and no other step has."""

TILES = 4
"""Parts that a block's weight is updated in."""
TABLE = 2**22
"""Elements of the embedding or the head that are updated at a time, at most about."""


class Moved(NamedTuple):
    """What a step leaves: parameters, optimizer states, and what it saw."""

    loss: Float[Array, ""]
    params: dict
    blocks: Any
    outside: Any
    square: Float[Array, ""]
    """Of the norm of all gradients, float32."""


def fused_step(
    model,
    params: dict,
    batch,
    rule: Rule,
    *,
    row_of: Int[Array, " L"],
    blocks: Any,
    block_counts: Int[Array, " S"],
    outside: Any,
    outside_count: Int[Array, ""],
    rates: dict,
    step: Int[Array, ""],
    train: tuple[str, ...] = (),
    ops: Ops | None = None,
) -> Moved:
    """One update of everything outside the blocks, and of the blocks that have a row.

    `row_of` says which row of `blocks` holds a block's state, -1 for a frozen block.
    `blocks` and `outside` are trees as the trained parameters, each leaf a tuple of
    arrays; those of the blocks are [S, ...]. Counts are the numbers of this update.
    `rates` is a tree as the trained parameters (`AdamW.leaf_rates`). `step` counts from
    0 and must be traced (see Fence). The loss is `jmem.train.loss.next_token_loss`.
    """
    ops = model.ops if ops is None else ops
    chosen, rest = split(params, train, "fused_step: train")
    positions = token_positions(batch.tokens)
    walk = _Walk(model, ops, rule, batch, positions, step)

    table = chosen["embed"].get("embedding")
    added = {k: v for k, v in chosen["embed"].items() if k != "embedding"}

    def embed(added):
        whole = params["embed"] | {k: v for k, v in added.items() if v is not None}
        return model.embed(params | {"embed": whole}, batch.tokens, positions)

    def forward(x, xs):
        layer, p = xs
        out, aux = walk.block(p, x, layer, ops)
        return out, (x, aux)

    x, embed_transpose = jax.vjp(embed, added)
    layers = jnp.arange(depth(params["blocks"]), dtype=jnp.int32)
    x, (inputs, aux) = jax.lax.scan(forward, x, (layers, params["blocks"]))

    head = walk.head(params, chosen, x, outside, outside_count, rates)
    dx, moved_blocks, blocks, square = walk.blocks(
        chosen["blocks"],
        rest["blocks"],
        *(row_of, inputs, head.dx),
        *(blocks, block_counts, rates["blocks"]),
        whole=bool(jax.tree.leaves(chosen["embed"])),
    )
    moved = dict(params)
    moved["blocks"] = join(moved_blocks, rest["blocks"])
    state = dict(head.state)
    for name, tree in head.params.items():
        moved[name] = join(tree, rest[name])

    d_added = embed_transpose(dx)[0]
    fresh, own_state = {}, {}
    for name, leaf in added.items():
        if leaf is not None:
            fresh[name], own_state[name], more = walk.whole(
                f"embed/{name}",
                leaf,
                outside["embed"][name],
                *(d_added[name], rates["embed"][name], outside_count),
            )
            square += more
    if table is not None:
        fresh["embedding"], own_state["embedding"], more = walk.embedding(
            table,
            outside["embed"]["embedding"],
            *(dx, head if model.config.tied else None),
            *(rates["embed"]["embedding"], outside_count),
        )
        square += more
    moved["embed"] = params["embed"] | fresh
    state["embed"] = outside["embed"] | own_state
    loss = head.loss + jnp.sum(aux)
    return Moved(loss, moved, blocks, state, square + head.square)


class _Head(NamedTuple):
    """What the head's pass found, and what a tied table needs of it in the end."""

    loss: jax.Array
    dx: jax.Array
    params: dict
    state: dict
    square: jax.Array
    hidden: jax.Array
    """Normalised [N, M]."""
    logsumexp: jax.Array
    weights: jax.Array


class _Walk(NamedTuple):
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

    # Parts of a weight ----------------------------------------------------------------

    def trips(self, parts: int) -> jax.Array:
        """`parts`, as only the data knows."""
        return jnp.where(self.number >= 0, jnp.int32(parts), 0)

    def apply(self, path, layer, index, w, state, dw, rate, t):
        """The rule on a part; a state begins as zeros at its first update."""
        state = tuple(jnp.where(t == 1, jnp.zeros_like(s), s) for s in state)
        salt = jnp.uint32(zlib.crc32(path.encode()))
        for number in (self.number, layer, index):
            salt = salt * jnp.uint32(0x9E3779B1) + jnp.asarray(number, jnp.uint32)
        return self.rule(w, state, dw.astype(jnp.float32), rate, t, salt)

    def whole(self, path, w, state, dw, rate, t, layer=0):
        """A small leaf at once: (w, state, square of the gradient's norm)."""
        w, state = self.apply(path, layer, 0, w, state, dw, rate, t)
        return w, state, _square(dw)

    def kernel(self, path, stack, state, h, dy, layer, row, rate, t):
        """Row `layer` of a stacked kernel, by its input h [N, in] and dy [N, out]."""
        parts = _divisor(stack.shape[1], TILES)
        size = stack.shape[1] // parts

        def body(index, carry):
            stack, state, square = carry
            at = index * size
            part = jax.lax.dynamic_slice_in_dim(h, at, size, axis=1)
            dw = jnp.einsum("ni,no->io", part, dy, preferred_element_type=jnp.float32)
            w, *own = (
                _get(a, place, index, parts)
                for a, place in ((stack, layer), *((s, row) for s in state))
            )
            w, own = self.apply(path, layer, index, w, tuple(own), dw, rate, t)
            stack = _set(stack, w, layer, index, parts)
            state = tuple(
                _set(s, o, row, index, parts) for s, o in zip(state, own, strict=True)
            )
            return stack, state, square + _square(dw)

        carry = stack, state, jnp.float32(0)
        return jax.lax.fori_loop(0, self.trips(parts), body, carry)

    # Blocks ---------------------------------------------------------------------------

    def blocks(self, chosen, rest, row_of, inputs, dx, states, counts, rates, whole):
        """From the last block to the first: (dx, blocks, states, square).

        Unless `whole`, nothing below the lowest block with a row asks for dx, and the
        blocks there compute nothing.
        """
        stacks, states, rates = by_key(chosen), _tuples(states, chosen), by_key(rates)
        kernels = {
            path.split("/")[-2]: path for path in stacks if path.endswith("/kernel")
        }
        if len(kernels) < sum(path.endswith("/kernel") for path in stacks):
            raise ValueError(
                "fused_step: two linear maps of a block have the same name among "
                f"{sorted(stacks)}, so their gradients cannot be told apart. Use the "
                "step that is not fused."
            )
        small = [path for path in stacks if path not in kernels.values()]
        one = jnp.float32(1)

        def layer_params(p, layer):
            """Of one layer, by what is trained of it and by what is not."""
            return join(nested(p, chosen), _row(rest, layer))

        def frozen(layer, x, dx, stacks):
            p = layer_params(_row(stacks, layer), layer)
            _, transpose = jax.vjp(lambda x: self.block(p, x, layer, self.ops), x)
            return transpose((dx, one))[0]

        def trained(layer, place, x, dx, stacks, states):
            p = _row(stacks, layer)

            def tapped(taps, leaves, x):
                read = {}

                def linear(name, leaf, h):
                    if name not in kernels:
                        return self.ops.linear(name, leaf, h)
                    read[name] = h
                    return dense(name, leaf, h) + taps[name]

                both = layer_params(p | leaves, layer)
                return self.block(both, x, layer, Ops(self.ops.attend, linear)), read

            taps = {
                name: jnp.zeros((*x.shape[:-1], p[path].shape[-1]), x.dtype)
                for name, path in kernels.items()
            }
            leaves = {path: p[path] for path in small}
            _, transpose, read = jax.vjp(tapped, taps, leaves, x, has_aux=True)
            d_taps, d_leaves, dx = transpose((dx, one))
            t, square = counts[place], jnp.float32(0)
            stacks, states = dict(stacks), dict(states)
            for name, path in kernels.items():
                stacks[path], states[path], more = self.kernel(
                    *(path, stacks[path], states[path]),
                    *(_flat(read[name]), _flat(d_taps[name]), layer, place),
                    *(_at(rates[path], layer), t),
                )
                square += more
            for path in small:
                own = _row(states[path], place)
                rate = _at(rates[path], layer)
                w, own, more = self.whole(
                    path, p[path], own, d_leaves[path], rate, t, layer
                )
                stacks[path] = put_row(stacks[path], layer, w)
                states[path] = put_row(states[path], place, own)
                square += more
            return dx, stacks, states, square

        def step(carry, xs):
            layer, place, x = xs
            dx, stacks, states, square = carry
            if not counts.shape[0]:
                dx = frozen(layer, x, dx, stacks) if whole else dx
                return (dx, stacks, states, square), None

            def still():
                def onward():
                    return frozen(layer, x, dx, stacks)

                below = (
                    onward()
                    if whole
                    else jax.lax.cond(layer > lowest, onward, lambda: dx)
                )
                return below, stacks, states, jnp.float32(0)

            dx, stacks, states, more = jax.lax.cond(
                place >= 0,
                lambda: trained(layer, place, x, dx, stacks, states),
                still,
            )
            return (dx, stacks, states, square + more), None

        layers = jnp.arange(len(row_of), dtype=jnp.int32)
        lowest = 0 if whole else jnp.min(jnp.where(row_of >= 0, layers, len(row_of)))
        (dx, stacks, states, square), _ = jax.lax.scan(
            step,
            (dx, stacks, states, jnp.float32(0)),
            (layers, row_of, inputs),
            reverse=True,
        )
        return dx, nested(stacks, chosen), nested(states, chosen), square

    # The head -------------------------------------------------------------------------

    def logits(self, head, hidden, index, parts, tied):
        """Of one part of the vocabulary, float32 [N, V / parts]."""
        axis = 0 if tied else 1
        size = head["kernel"].shape[axis] // parts
        leaf = {
            "kernel": jax.lax.dynamic_slice_in_dim(
                head["kernel"], index * size, size, axis
            )
        }
        if tied:
            leaf["kernel"] = leaf["kernel"].T
        if "bias" in head:
            leaf["bias"] = jax.lax.dynamic_slice_in_dim(
                head["bias"], index * size, size, 0
            )
        with jax.named_scope("head_loss"):
            found = self.ops.linear("head", leaf, hidden)
        return found.astype(jnp.float32), leaf["kernel"]

    def d_logits(self, logits, logsumexp, weights, index, dtype):
        """(softmax - one-hot) * weight of one part, in the activations' dtype."""
        size = logits.shape[1]
        at = self.batch.targets.reshape(-1) - index * size
        hot = at[:, None] == jnp.arange(size, dtype=jnp.int32)[None]
        d = jnp.exp(logits - logsumexp[:, None]) - hot
        return (d * weights[:, None]).astype(dtype)

    def head(self, params, chosen, x, outside, t, rates) -> _Head:
        """Loss, gradient of x, and the update of head and final norm.

        The vocabulary is walked twice, a part at a time: for the normaliser of the
        softmax, then for gradients and update. A tied table is only read: it moves in
        the end.
        """
        model, tied = self.model, self.model.config.tied
        weights = mean_weights(self.batch)
        targets = self.batch.targets.reshape(-1)

        def normal(norm, x):
            held = model.head_params(params) | {"final_norm": norm}
            only = Ops(self.ops.attend, lambda name, leaf, x: x)
            return model.head(held, x, only)

        norm = join(chosen["final_norm"], params["final_norm"])
        hidden, transpose = jax.vjp(normal, norm, _flat(x))
        head = {"kernel": params["embed"]["embedding"]} if tied else params["head"]
        vocab = head["kernel"].shape[0 if tied else 1]
        parts = _parts(vocab, hidden.shape[1])
        size = vocab // parts

        def normaliser(carry, index):
            running, picked = carry
            logits, _ = self.logits(head, hidden, index, parts, tied)
            running = jnp.logaddexp(running, jax.nn.logsumexp(logits, axis=-1))
            at = targets - index * size
            inside = (at >= 0) & (at < size)
            own = jnp.take_along_axis(logits, jnp.clip(at, 0, size - 1)[:, None], 1)
            return (running, jnp.where(inside, own[:, 0], picked)), None

        nothing = jnp.full(targets.shape, -jnp.inf, jnp.float32)
        (total, picked), _ = jax.lax.scan(
            normaliser, (nothing, nothing), jnp.arange(parts, dtype=jnp.int32)
        )
        loss = jnp.sum(weights * (total - picked))

        moving = {} if tied else {k: v for k, v in chosen["head"].items()}
        moving = {k: v for k, v in moving.items() if v is not None}
        still = {k: v for k, v in head.items() if k not in moving}
        held = {} if tied else {k: outside["head"][k] for k in moving}

        def body(index, carry):
            moving, held, dh, square = carry
            logits, kernel = self.logits(still | moving, hidden, index, parts, tied)
            d = self.d_logits(logits, total, weights, index, hidden.dtype)
            dh += jnp.einsum(
                "nv,mv->nm",
                *(d, kernel.astype(d.dtype)),
                preferred_element_type=jnp.float32,
            )
            fresh, states = {}, {}
            for name, leaf in moving.items():
                axis = leaf.ndim - 1
                dw = (
                    jnp.einsum(
                        "nm,nv->mv", hidden, d, preferred_element_type=jnp.float32
                    )
                    if name == "kernel"
                    else d.astype(jnp.float32).sum(axis=0)
                )
                fresh[name], states[name] = self.part(
                    *(f"head/{name}", leaf, held[name], dw, index, parts, axis),
                    *(rates["head"][name], t),
                )
                square += _square(dw)
            return fresh, states, dh, square

        carry = moving, held, jnp.zeros(hidden.shape, jnp.float32), jnp.float32(0)
        moving, held, dh, square = jax.lax.fori_loop(0, self.trips(parts), body, carry)
        d_norm, dx = transpose(dh.astype(hidden.dtype))
        new = {"final_norm": {}}
        state = {"final_norm": {}}
        for name, leaf in chosen["final_norm"].items():
            new["final_norm"][name], state["final_norm"][name] = leaf, None
            if leaf is not None:
                new["final_norm"][name], state["final_norm"][name], more = self.whole(
                    *(f"final_norm/{name}", leaf, outside["final_norm"][name]),
                    *(d_norm[name],),
                    *(rates["final_norm"][name], t),
                )
                square += more
        if not tied:
            nothing = dict.fromkeys(chosen["head"])
            new["head"], state["head"] = nothing | moving, nothing | held
        dx = dx.reshape(x.shape)
        return _Head(loss, dx, new, state, square, hidden, total, weights)

    def part(self, path, leaf, state, dw, index, parts, axis, rate, t):
        """Part `index` of `leaf` along `axis`, moved: (leaf, state)."""

        def get(a):
            size = a.shape[axis] // parts
            return jax.lax.dynamic_slice_in_dim(a, index * size, size, axis)

        def put(a, value):
            size = a.shape[axis] // parts
            return jax.lax.dynamic_update_slice_in_dim(a, value, index * size, axis)

        own = get(leaf), tuple(map(get, state)), dw
        # Blocks of scales lie along the axis that is not cut, the rule's last one.
        turned = leaf.ndim == 2 and axis == 1
        w, state_, dw = jax.tree.map(jnp.transpose, own) if turned else own
        moved = self.apply(path, 0, index, w, state_, dw, rate, t)
        w, state_ = jax.tree.map(jnp.transpose, moved) if turned else moved
        return put(leaf, w), tuple(map(put, state, state_))

    # The embedding --------------------------------------------------------------------

    def embedding(self, table, state, dx, head: _Head | None, rate, t):
        """Every row moves, as the rule says, though few have a gradient.

        `head`, of a tied table: what its other reading adds to the gradient.
        """
        parts = _parts(*table.shape)
        size = table.shape[0] // parts
        tokens, rows = self.batch.tokens.reshape(-1), _flat(dx).astype(jnp.float32)

        def body(index, carry):
            table, state, square = carry
            at = tokens - index * size
            at = jnp.where((at >= 0) & (at < size), at, size)  # dropped
            dw = jnp.zeros((size, table.shape[1]), jnp.float32)
            dw = dw.at[at].add(rows, mode="drop")
            if head is not None:
                own = {"kernel": table}
                logits, _ = self.logits(own, head.hidden, index, parts, tied=True)
                d = self.d_logits(
                    *(logits, head.logsumexp, head.weights, index, head.hidden.dtype)
                )
                dw += jnp.einsum(
                    "nv,nm->vm", d, head.hidden, preferred_element_type=jnp.float32
                )
            table, state = self.part(
                *("embed/embedding", table, state, dw, index, parts, 0, rate, t)
            )
            return table, state, square + _square(dw)

        carry = table, state, jnp.float32(0)
        return jax.lax.fori_loop(0, self.trips(parts), body, carry)


def _square(dw):
    return jnp.sum(jnp.square(dw.astype(jnp.float32)))


def _flat(x):
    """[..., M] as [N, M]."""
    return x.reshape(-1, x.shape[-1])


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`."""
    return next(n for n in range(min(most, size), 0, -1) if size % n == 0)


def _parts(rows: int, width: int) -> int:
    """Equal parts of `rows`, of about `TABLE` elements or fewer.

    A number of rows without such a divisor (32,001 is 3 times a prime) is cut in fewer.
    """
    least = max(-(-rows * width // TABLE), 1)
    divisors = [n for n in range(1, 4 * least + 1) if rows % n == 0]
    return min((n for n in divisors if n >= least), default=divisors[-1])


def _row(stacked, index):
    """Row `index` of every leaf of a stacked tree."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False),
        stacked,
    )


def _at(rate, layer):
    """A leaf's rate, or that of one layer of it."""
    return rate[layer].reshape(()) if rate.ndim else rate


def _get(leaf, row, index, parts):
    """Part `index` of row `row`: [rows / parts, ...]."""
    size = leaf.shape[1] // parts
    start = (row, index * size) + (0,) * (leaf.ndim - 2)
    return jax.lax.dynamic_slice(leaf, start, (1, size, *leaf.shape[2:]))[0]


def _set(leaf, value, row, index, parts):
    start = (row, index * (leaf.shape[1] // parts)) + (0,) * (leaf.ndim - 2)
    return jax.lax.dynamic_update_slice(leaf, value[None], start)


def nested(flat: dict, like: Any) -> Any:
    """`flat`, by path, as the dicts of `like`, whose None it keeps."""

    def walk(tree, above):
        return {
            name: walk(value, f"{above}{name}/")
            if isinstance(value, dict)
            else (None if value is None else flat[f"{above}{name}"])
            for name, value in tree.items()
        }

    return walk(like, "")


def _tuples(states: Any, like: Any) -> dict:
    """The tuple of arrays of each leaf of `like`, by path."""

    def at(path):
        tree = states
        for name in path.split("/"):
            tree = tree[name]
        return tree

    return {path: at(path) for path in by_key(like)}
