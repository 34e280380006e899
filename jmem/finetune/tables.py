"""The fused step's two tables, embedding and head: walked by parts of the vocabulary.

Idea     Neither the logits of all tokens over the whole vocabulary nor the gradient of
         a table exist: a part of the vocabulary is multiplied, differentiated and moved
         before the next one.
Memory   A part's logits, its gradient and its moments; about `TABLE` elements each.
Moments  May be in host memory, in pieces: a part then fetches and stores its
         own, and nothing else moves. With a rule that looks at a whole
         matrix first (`jmem.finetune.rules.Factored`) the vocabulary is walked twice
         more.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmem.finetune.patterns import join
from jmem.finetune.rules import Factored
from jmem.finetune.walk import (
    Walk,
    einsum_wide,
    flatten,
    put_part,
    sum_squares,
    take_part,
)
from jmem.models.next_token import mean_weights
from jmem.nn.ops import Ops
from jmem.offload import fetch_row, is_on_host, store_row
from jmem.program import format_path

TABLE = 2**22
"""Elements of the embedding or the head that are updated at a time, at most about."""


class Head(NamedTuple):
    """The head after its update, and what a tied embedding's update needs of it."""

    loss: jax.Array
    dx: jax.Array
    params: dict
    state: dict
    square: jax.Array
    hidden: jax.Array
    """Normalised [N, M]."""
    logsumexp: jax.Array
    weights: jax.Array


class Tables(Walk):
    """The walk over head, final norm and embedding."""

    # The head -------------------------------------------------------------------------

    def compute_logits(self, head, hidden, index, parts, tied):
        """(logits [N, V / parts] in float32, kernel) of one part of the vocabulary."""
        leaf = {"kernel": take_part(head["kernel"], index, parts, 0 if tied else 1)}
        if tied:
            leaf["kernel"] = leaf["kernel"].T
        if "bias" in head:
            leaf["bias"] = take_part(head["bias"], index, parts, 0)
        if self.layout is not None:  # a part, once over the wire, for all tokens
            leaf = jax.tree.map(self.layout.replicate, leaf)
        with jax.named_scope("head_loss"):
            found = self.ops.linear("head", leaf, hidden)
        return found.astype(jnp.float32), leaf["kernel"]

    def compute_d_logits(self, logits, logsumexp, weights, index, dtype):
        """(softmax - one-hot) * weight of one part, in the activations' dtype."""
        size = logits.shape[1]
        at = self.batch.targets.reshape(-1) - index * size
        hot = at[:, None] == jnp.arange(size, dtype=jnp.int32)[None]
        d = jnp.exp(logits - logsumexp[:, None]) - hot
        return (d * weights[:, None]).astype(dtype)

    def divide_tokens(self, x):
        """`x` [N, ...] with its tokens divided over the mesh, if there is one."""
        return x if self.layout is None else self.layout.divide_tokens(x)

    def head(self, params, chosen, x, outside, t, rates) -> Head:
        """Loss, gradient of x, and the update of head and final norm.

        The vocabulary is walked twice, a part at a time: for the normaliser of the
        softmax, then for gradients and update. A tied table is only read: it moves in
        the end.
        """
        model, tied = self.model, self.model.config.tied
        weights = self.divide_tokens(mean_weights(self.batch))
        targets = self.divide_tokens(self.batch.targets.reshape(-1))

        def normal(norm, x):
            held = model.head_params(params) | {"final_norm": norm}
            only = Ops(self.ops.attend, lambda name, leaf, x: x)
            return model.head(held, x, only)

        norm = join(chosen["final_norm"], params["final_norm"])
        hidden, transpose = jax.vjp(normal, norm, self.divide_tokens(flatten(x)))
        head = {"kernel": params["embed"]["embedding"]} if tied else params["head"]
        vocab = head["kernel"].shape[0 if tied else 1]
        parts = count_parts(vocab, hidden.shape[1])
        size = vocab // parts

        def normaliser(carry, index):
            running, picked = carry
            logits, _ = self.compute_logits(head, hidden, index, parts, tied)
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

        def cotangent(moving, index):
            """Of a part's logits, and the part of the kernel."""
            logits, kernel = self.compute_logits(
                still | moving, hidden, index, parts, tied
            )
            return self.compute_d_logits(
                logits, total, weights, index, hidden.dtype
            ), kernel

        def gradient(name, d):
            if name == "kernel":
                return self.at_rest("head/kernel", einsum_wide("nm,nv->mv", hidden, d))
            return self.at_rest(f"head/{name}", d.astype(jnp.float32).sum(axis=0))

        def gradients(index):
            d, _ = cotangent(moving, index)
            return {name: gradient(name, d) for name in moving}

        held, found = self.survey(
            moving, held, rates.get("head", {}), gradients, parts, t
        )

        def body(index, carry):
            moving, held, dh, square = carry
            d, kernel = cotangent(moving, index)
            dh += einsum_wide("nv,mv->nm", d, kernel.astype(d.dtype))
            fresh, states = {}, {}
            for name, leaf in moving.items():
                axis = leaf.ndim - 1
                dw = gradient(name, d)
                fresh[name], states[name] = self.move_part(
                    *(f"head/{name}", leaf, held[name], dw, index, parts, axis),
                    *(rates["head"][name], t, found.get(name)),
                )
                square += sum_squares(dw)
            return fresh, states, dh, square

        carry = moving, held, jnp.zeros(hidden.shape, jnp.float32), jnp.float32(0)
        moving, held, dh, square = jax.lax.fori_loop(
            0, self.count_trips(parts), body, carry
        )
        d_norm, dx = transpose(dh.astype(hidden.dtype))
        new, state = {}, {}
        new["final_norm"], state["final_norm"], square = self.move_small(
            *("final_norm", chosen["final_norm"], d_norm, outside, rates, t, square)
        )
        if not tied:
            nothing = dict.fromkeys(chosen["head"])
            new["head"], state["head"] = nothing | moving, nothing | held
        dx = dx.reshape(x.shape)
        return Head(loss, dx, new, state, square, hidden, total, weights)

    def move_small(self, above, chosen, gradients, outside, rates, t, square):
        """The small trained leaves below `above`, each at once, with their states.

        (leaves, states, `square` and that of their gradients); None stays.
        """
        new, states = dict(chosen), dict.fromkeys(chosen)
        for name, leaf in chosen.items():
            if leaf is not None:
                new[name], states[name], more = self.move_leaf(
                    *(f"{above}/{name}", leaf, outside[above][name]),
                    *(gradients[name], rates[above][name], t),
                )
                square += more
        return new, states, square

    def move_part(self, path, leaf, state, dw, index, parts, axis, rate, t, found=None):
        """Part `index` of `leaf` along `axis`, moved: (leaf, state).

        `found`: what `survey` knows of the whole leaf.
        """
        # Blocks of scales lie along the axis that is not cut, the rule's last one.
        turned = leaf.ndim == 2 and axis == 1
        if found is not None:  # the state is that of the whole leaf
            assert isinstance(self.rule, Factored)
            factors, direction = found
            own = take_part(leaf, index, parts, axis), dw
            w, dw = jax.tree.map(jnp.transpose, own) if turned else own
            w = self.rule.move(w, direction(dw, index), factors)
            return put_part(leaf, w.T if turned else w, index, axis), state
        on_host = any(map(is_on_host, state))
        w = take_part(leaf, index, parts, axis)
        if on_host:
            held = fetch_row(state, index)
        else:
            held = tuple(take_part(s, index, parts, axis) for s in state)
        own = w, held, dw
        w, held, dw = jax.tree.map(jnp.transpose, own) if turned else own
        moved = self.apply(path, 0, index, w, held, dw, rate, t)
        w, held = jax.tree.map(jnp.transpose, moved) if turned else moved
        leaf = put_part(leaf, w, index, axis)
        if on_host:
            return leaf, store_row(state, index, held)
        pairs = zip(state, held, strict=True)
        return leaf, tuple(put_part(s, part, index, axis) for s, part in pairs)

    def survey(self, leaves, states, rates, gradients, parts, t):
        """States and findings of whole leaves, by name, before any part moves.

        Nothing, unless the rule is one that looks at whole matrices. `gradients(index)`
        are those of a part of every leaf: `kernel` is cut along its last axis, all
        others along their first.
        """
        if not isinstance(self.rule, Factored) or not leaves:
            return states, {}
        rule = self.rule

        def rows(name, leaf):
            return leaf.T if name == "kernel" else leaf

        def turned(name, state):  # a head's rows are its last axis
            return state[::-1] if name == "kernel" else state

        def part(name, leaf, index):
            axis = 1 if name == "kernel" else 0
            return rows(name, take_part(leaf, index, parts, axis))

        def look(index, seen):
            return {
                name: rule.look(
                    *(seen[name], index * (seen[name].rows.shape[0] // parts)),
                    *(part(name, leaves[name], index), rows(name, dw)),
                )
                for name, dw in gradients(index).items()
            }

        def measure(index, squares):
            return {
                name: squares[name]
                + sum_squares(direction(name, rows(name, dw), index))
                for name, dw in gradients(index).items()
            }

        def direction(name, dw, index):
            """Of some rows of a leaf, whose gradient is dw."""
            first, *others = moments[name]
            own = take_part(first, index, parts, 0)
            return rule.direction((own, *others), jnp.mean(first), dw)

        trips = self.count_trips(parts)
        shapes = {"kernel": leaves["kernel"].shape[::-1]} if "kernel" in leaves else {}
        shapes = {name: leaf.shape for name, leaf in leaves.items()} | shapes
        nothing = {name: rule.begin(shape) for name, shape in shapes.items()}
        seen = jax.lax.fori_loop(0, trips, look, nothing)
        moments = {
            name: rule.settle(turned(name, states[name]), seen[name], t)
            for name in leaves
        }
        zeros = dict.fromkeys(leaves, jnp.float32(0))
        squares = jax.lax.fori_loop(0, trips, measure, zeros)
        found = {
            name: rule.factors(
                *(rates[name], seen[name], squares[name], leaf.size),
                **self.override_decay(name),
            )
            for name, leaf in leaves.items()
        }
        states = {name: turned(name, state) for name, state in moments.items()}
        return states, {
            name: (found[name], functools.partial(direction, name)) for name in leaves
        }

    # The embedding --------------------------------------------------------------------

    def move_embedding(self, table, state, dx, head: Head | None, rate, t):
        """Every row moves, as the rule says, though few have a gradient.

        `head`, of a tied table: what its other reading adds to the gradient.
        """
        parts = count_parts(*table.shape)
        size = table.shape[0] // parts
        tokens, rows = self.batch.tokens.reshape(-1), flatten(dx)
        if self.layout is not None:
            tokens = self.layout.replicate(tokens)
        rows = self.at_rest("embed/embedding", rows).astype(jnp.float32)

        def gradient(table, index):
            at = tokens - index * size
            at = jnp.where((at >= 0) & (at < size), at, size)  # dropped
            dw = jnp.zeros((size, table.shape[1]), jnp.float32)
            dw = dw.at[at].add(rows, mode="drop")
            if head is not None:
                own = {"kernel": table}
                logits, _ = self.compute_logits(
                    own, head.hidden, index, parts, tied=True
                )
                d = self.compute_d_logits(
                    *(logits, head.logsumexp, head.weights, index, head.hidden.dtype)
                )
                dw += einsum_wide("nv,nm->vm", d, head.hidden)
            return self.at_rest("embed/embedding", dw)

        name = "embedding"
        states, found = self.survey(
            *({name: table}, {name: state}, {name: rate}),
            *(lambda index: {name: gradient(table, index)}, parts, t),
        )

        def body(index, carry):
            table, state, square = carry
            dw = gradient(table, index)
            table, state = self.move_part(
                *("embed/embedding", table, state, dw, index, parts, 0),
                *(rate, t, found.get(name)),
            )
            return table, state, square + sum_squares(dw)

        carry = table, states[name], jnp.float32(0)
        return jax.lax.fori_loop(0, self.count_trips(parts), body, carry)


def describe_pieces(outside: Any) -> Any:
    """Descriptions of parameters, the tables as pieces: [parts, ...], a part in each.

    `outside` holds parameters or None. Moments of that shape may be in host memory. A
    piece lies as its part does in the table: turned, it made XLA (0.12.0.1) turn, and
    so copy, the whole table (1 GiB at LLaMA-3-8B).
    """

    def leaf(path, value):
        shape = value.shape
        if format_path(path) == "embed/embedding":
            parts = count_parts(*shape)
            shape = (parts, shape[0] // parts, shape[1])
        elif format_path(path) == "head/kernel":
            parts = count_parts(*shape[::-1])
            shape = (parts, shape[0], shape[1] // parts)
        return jax.ShapeDtypeStruct(shape, value.dtype)

    return jax.tree.map_with_path(leaf, outside)


def count_parts(rows: int, width: int) -> int:
    """Equal parts of `rows`, of about `TABLE` elements or fewer.

    A number of rows without such a divisor (32,001 is 3 times a prime) is cut in fewer.
    """
    least = max(-(-rows * width // TABLE), 1)
    divisors = [n for n in range(1, 4 * least + 1) if rows % n == 0]
    return min((n for n in divisors if n >= least), default=divisors[-1])
