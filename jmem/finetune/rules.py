"""Update rules with less state than AdamW's: none, or sums over rows and columns.

Sgd        LOMO (Lv et al., 2023, arXiv:2306.09782): w -= rate * dw, no state at all.
Factored   Adafactor's second moment (Shazeer and Stern, 2018, arXiv:1804.04235): a
           matrix [R, C] keeps decayed means over its rows and its columns, R + C
           floats, and their outer product over its mean stands for the squares. With
           `relative`, AdaLomo's grouped normalisation (Lv et al., 2023,
           arXiv:2310.10195): an update has the size of the matrix it moves.

A rule that `walks` looks at a whole matrix before any of it moves: at its rows' and
columns' means, then at the size of its update. A matrix that is updated in parts is
therefore walked three times, and its gradient is made three times. Statistics of the
step before would need one walk, but are not what the papers compute: the first step has
none, and a batch whose gradient is ten times the last one's would move ten times as
far, which is what the normalisation is there to prevent.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

State = tuple[jax.Array, ...]


def _clip(dw, limit: float):
    return jnp.clip(dw, -limit, limit) if limit else dw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd:
    """Gradient descent; `jmem.finetune.walk.Rule`."""

    weight_decay: float = 0.0
    clip_value: float = 0.0
    """Gradients are cut to this size, each value for itself; 0 leaves them alone."""

    def init(self, leaf) -> State:
        """The state of a parameter: none."""
        del leaf
        return ()

    def __call__(self, w, state, dw, rate, t, salt, weight_decay: float | None = None):
        del t, salt
        wide = w.astype(jnp.float32)
        decay = self.weight_decay if weight_decay is None else weight_decay
        wide -= rate * (_clip(dw, self.clip_value) + decay * wide)
        return wide.astype(w.dtype), state


class Seen(NamedTuple):
    """Sums over a matrix, or over the parts of it that were seen so far."""

    rows: jax.Array
    """Mean of dw² of each row [R]; of a vector, dw² itself."""
    columns: jax.Array
    """Sum of dw² of each column [C]; of a vector, nothing [0]."""
    weights: jax.Array
    """Sum of w²."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factored:
    """Second moments of rows and columns, no first one; `jmem.finetune.walk.Rule`."""

    weight_decay: float = 0.0
    clip_value: float = 0.0
    """As `Sgd.clip_value`."""
    decay: float = 0.8
    """The moments' decay is 1 - t^-decay at update t: the first one replaces them."""
    threshold: float = 1.0
    """Root mean square that a matrix's update is scaled down to."""
    relative: bool = False
    """Whether the rate is multiplied by the matrix's root mean square, or by `floor`
    where that is less."""
    floor: float = 1e-3
    tiny: float = 1e-30
    """Added to dw²."""

    def init(self, leaf) -> State:
        """Zeros [R] and [C] of a matrix (..., R, C); of a vector, of its shape."""
        *above, rows, columns = (0, *leaf.shape) if leaf.ndim == 1 else leaf.shape
        if leaf.ndim == 1:
            return (jnp.zeros(leaf.shape, jnp.float32),)
        shapes = (*above, rows), (*above, columns)
        return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)

    # A matrix in parts, which are some of its rows ------------------------------------

    def begin(self, shape: tuple[int, ...]) -> Seen:
        """Of a matrix or vector of this shape, before any part was seen."""
        columns = jnp.zeros(shape[1:], jnp.float32) if len(shape) > 1 else jnp.zeros(0)
        zero = jnp.float32(0)
        return Seen(jnp.zeros(shape[:1], jnp.float32), columns, zero)

    def look(self, seen: Seen, start, w, dw) -> Seen:
        """With the rows from `start` on, [size, C] of weight and gradient."""
        squares = jnp.square(_clip(dw, self.clip_value)) + self.tiny
        rows = squares.mean(axis=-1) if dw.ndim > 1 else squares
        rows = jax.lax.dynamic_update_slice(seen.rows, rows, (start,))
        columns = seen.columns + squares.sum(axis=0) if dw.ndim > 1 else seen.columns
        weights = seen.weights + jnp.sum(jnp.square(w.astype(jnp.float32)))
        return Seen(rows, columns, weights)

    def settle(self, state: State, seen: Seen, t) -> State:
        """The moments after update `t`."""
        share = t.astype(jnp.float32) ** -self.decay  # of this update
        found = (seen.rows, seen.columns / seen.rows.shape[0])[: len(state)]
        return tuple(s + share * (new - s) for s, new in zip(state, found))

    def direction(self, state: State, mean, dw):
        """A gradient over the root of its moments: of rows whose moments `state` has.

        `mean` is that of the moments of all rows.
        """
        dw = _clip(dw, self.clip_value)
        rows, *columns = state
        if not columns:
            return dw * jax.lax.rsqrt(rows)
        dw = dw * jax.lax.rsqrt(rows / mean)[:, None]
        return dw * jax.lax.rsqrt(columns[0])[None]

    def factors(
        self, rate, seen: Seen, square, size: int, weight_decay: float | None = None
    ) -> tuple:
        """What the weight and its direction are multiplied by: (kept, moved).

        `square` is the sum of the direction's squares over all `size` values.
        """
        if self.relative:
            own = jnp.sqrt(seen.weights / size)
            rate = rate * jnp.maximum(own, jnp.float32(self.floor))
        over = jnp.maximum(jnp.sqrt(square / size) / self.threshold, 1.0)
        decay = self.weight_decay if weight_decay is None else weight_decay
        return 1 - rate * decay, rate / over

    def move(self, w, direction, factors):
        """Some rows of the weight, updated."""
        kept, moved = factors
        wide = w.astype(jnp.float32) * kept - moved * direction
        return wide.astype(w.dtype)

    # A matrix at once -----------------------------------------------------------------

    def __call__(self, w, state, dw, rate, t, salt, weight_decay: float | None = None):
        del salt
        start = jnp.int32(0)
        seen = self.look(self.begin(w.shape), start, w, dw)
        state = self.settle(state, seen, t)
        direction = self.direction(state, jnp.mean(state[0]), dw)
        square = jnp.sum(jnp.square(direction))
        factors = self.factors(rate, seen, square, w.size, weight_decay)
        return self.move(w, direction, factors), state
