"""Which weights of a linear map are removed, and what becomes of the others.

Maps are W [out, in] here, y = x W', as the papers write them; a row holds the weights
of one output. A decoder's kernels are the transposes (`jmem.nn.linear`).

Magnitude   The smallest by |w|.
Wanda       Sun et al., A Simple and Effective Pruning Approach for Large Language
            Models, 2023, arXiv:2306.11695: by |w| * |x|, the norm of the input that the
            weight multiplies, in each row.
SparseGPT   Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately
            Pruned in One-Shot, 2023, arXiv:2301.00774: column by column, and what
            removing a weight does to its output is undone, as far as can be, by the
            weights of the row that are still to come.
N:M         `pattern=(2, 4)` keeps two of every four weights that follow each other in a
            row, whatever the criterion.

Every choice is exact in number, and of equal weights the first is removed.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from jmem.sparse.threshold import Read, count_below

Scope = Literal["row", "layer", "global"]
_EXACT = jax.lax.Precision.HIGHEST  # else a GPU multiplies float32 in 10 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criterion:
    """What removes weights of maps; the kinds of it are in `CRITERIA`."""

    pattern: tuple[int, int] | None = None
    """(N, M): of every M weights along a row N stay. None: only the share counts."""

    def __post_init__(self):
        if self.pattern is None:
            return
        kept, of = self.pattern
        if not 1 <= kept <= of:
            raise ValueError(
                f"{self.name}: pattern={self.pattern} keeps {kept} of every {of} "
                "weights; need (N, M) with 1 <= N <= M, as (2, 4)."
            )

    @property
    def name(self) -> str:
        """What error messages call it."""
        return type(self).__name__

    @property
    def is_calibrated(self) -> bool:
        """Whether it looks at what the maps read."""
        return False

    def count(
        self, sparsity: float, shapes: Mapping[str, tuple[int, int, int]], read: Read
    ) -> dict[str, np.ndarray]:
        """How many weights go, for each map's [layers, out, in]: int32 [layers, ...].

        Here so many of each row. `read(name, layer)` gives a map's weights.
        """
        del read
        return {
            name: np.full(layers, int(sparsity * inputs), np.int32)
            for name, (layers, _, inputs) in shapes.items()
        }

    def begin(self, inputs: int) -> Any:
        """The statistics of an input of that width, of no token yet."""
        del inputs
        return ()

    def look(self, seen: Any, x: Float[Array, "N in"]) -> Any:
        """The statistics with those of more tokens, float32; zeros do not count."""
        del x
        return seen

    def score(self, weights: Float[Array, "out in"], seen: Any) -> jax.Array:
        """What is lost with each weight, float32 and not negative."""
        del seen
        return jnp.abs(weights)

    def cut(
        self, weights: Float[Array, "out in"], seen: Any, count: jax.Array
    ) -> Float[Array, "out in"]:
        """The weights, float32, with `count` of each row (or by pattern) at zero."""
        scores = self.score(weights, seen)
        return jnp.where(self.choose(scores, count), 0, weights)

    def choose(self, scores: Float[Array, "out in"], count: jax.Array) -> jax.Array:
        """The weights that go: of each group, the lowest."""
        if self.pattern is None:
            return find_lowest(scores, count)
        kept, of = self.pattern
        groups = scores.reshape(scores.shape[0], -1, of)
        return find_lowest(groups, jnp.int32(of - kept)).reshape(scores.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(Criterion):
    """The smallest weights go; nothing is looked at but them."""

    scope: Scope = "row"
    """Among which weights the smallest are found: of a row, of a map of one layer, or
    of all maps of all layers."""

    def __post_init__(self):
        super().__post_init__()
        if self.scope not in ("row", "layer", "global"):
            raise ValueError(
                f"Magnitude: scope={self.scope!r} must be 'row', 'layer' or 'global'."
            )
        if self.pattern is not None and self.scope != "row":
            raise ValueError(
                f"Magnitude: pattern={self.pattern} says what goes of every row, so "
                f"scope={self.scope!r} cannot be kept. Leave one of the two out."
            )

    def count(self, sparsity, shapes, read):
        """Of each row, of each map, or so many that they are the smallest of all."""
        if self.scope == "row":
            return super().count(sparsity, shapes, read)
        if self.scope == "global":
            return count_below(sparsity, shapes, read)
        return {
            name: np.full(layers, int(sparsity * outputs * inputs), np.int32)
            for name, (layers, outputs, inputs) in shapes.items()
        }

    def choose(self, scores, count):
        """Of each row, or of all."""
        if self.scope == "row":
            return super().choose(scores, count)
        return find_lowest(scores.reshape(-1), count).reshape(scores.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda(Criterion):
    """Of each row go the weights whose share of the output is smallest.

    Keeps the sum of squares of every input, in float32.
    """

    @property
    def is_calibrated(self) -> bool:
        return True

    def begin(self, inputs):
        """Zeros [in]."""
        return jnp.zeros((inputs,), jnp.float32)

    def look(self, seen, x):
        """Sums of squares."""
        return seen + jnp.sum(jnp.square(x), axis=0)

    def score(self, weights, seen):
        """|w| * |x|."""
        return jnp.abs(weights) * jnp.sqrt(seen)[None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT(Criterion):
    """Columns go one after another, and the later ones make up for what is lost.

    Keeps the products X'X [in, in] of every input, in float32, and takes three arrays
    of a map's size and two of in * in beside it. Weights are chosen among all rows of
    a block of columns, the share in each; with a pattern, among M of a row.

    Differs  Official code zeroes all weights of an input that was always 0. Here they
             go first, and no more of them than the share; the mean that is damped with
             is that of the others.
    """

    damping: float = 0.01
    """Added to the diagonal of X'X, times its mean: what the calibration has not shown
    is taken to be as that."""
    block: int = 128
    """Columns among which weights are chosen, and after which the later ones move."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.damping < math.inf:
            raise ValueError(
                f"SparseGPT: damping={self.damping} must be finite and not negative."
            )
        if self.block < 1:
            raise ValueError(f"SparseGPT: block={self.block} must be at least 1.")
        if self.pattern is not None and self.block % self.pattern[1]:
            raise ValueError(
                f"SparseGPT: block={self.block} is no multiple of the {self.pattern[1]}"
                f" weights of pattern={self.pattern}. Choose one."
            )

    @property
    def is_calibrated(self) -> bool:
        return True

    def count(self, sparsity, shapes, read):
        """Of each block of columns, [layers, blocks]; together the share of all."""
        del read
        found = {}
        for name, (layers, outputs, inputs) in shapes.items():
            ends = np.minimum(np.arange(0, inputs + self.block, self.block), inputs)
            total = np.floor(sparsity * outputs * ends.astype(np.float64))
            each = np.diff(total).astype(np.int32)
            found[name] = np.broadcast_to(each, (layers, len(each)))
        return found

    def begin(self, inputs):
        """Zeros [in, in]."""
        return jnp.zeros((inputs, inputs), jnp.float32)

    def look(self, seen, x):
        """X'X."""
        return seen + jnp.matmul(x.T, x, precision=_EXACT)

    def cut(self, weights, seen, count):
        """Block by block; `count` [blocks] is of the weights of each."""
        inputs = weights.shape[1]
        block = min(self.block, inputs)
        padding = -inputs % block
        factor = jnp.pad(factorise(seen, self.damping), (0, padding))
        factor = factor + jnp.diag(jnp.arange(inputs + padding) >= inputs)
        # What removing w_j costs is w_j^2 / U_jj^2: nothing where an input was always
        # 0, and no column is chosen that is only padding.
        weight = jnp.where(jnp.diag(seen) > 0, jnp.diag(factor)[:inputs] ** -2, 0)
        weight = jnp.pad(weight, (0, padding), constant_values=jnp.inf)
        columns = jnp.arange(inputs + padding, dtype=jnp.int32)

        def step(index, w):
            start = index * block
            own, rows, price = (
                jax.lax.dynamic_slice_in_dim(a, start, block)
                for a in (w, factor, weight)
            )
            square = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
            own, errors = self._cut_block(own, square, price, count[index])
            later = jnp.where(columns[None] >= start + block, rows, 0)
            w = w - jnp.matmul(later.T, errors, precision=_EXACT)
            return jax.lax.dynamic_update_slice_in_dim(w, own, start, axis=0)

        # Columns of W are rows here, which lie together.
        w = jnp.pad(weights.T, ((0, padding), (0, 0)))
        w = jax.lax.fori_loop(0, (inputs + padding) // block, step, w)
        return w[:inputs].T

    def _cut_block(self, w, factor, price, count):
        """A block [block, out] after its own columns are done, and their errors.

        `factor` [block, block] is its part of U, and `price` [block] of 1 / U_jj^2.
        """
        size = w.shape[0] if self.pattern is None else self.pattern[1]

        def move(column, state):
            w, errors, gone, start = state
            own, lost = w[column], gone[column - start]
            error = jnp.where(lost, own, 0) / factor[column, column]
            w = w - factor[column][:, None] * error[None]
            w = w.at[column].set(jnp.where(lost, 0, own))
            return w, errors.at[column].set(error), gone, start

        def group(index, state):
            w, errors = state
            start = index * size
            own, prices = (
                jax.lax.dynamic_slice_in_dim(a, start, size) for a in (w, price)
            )
            scores = jnp.square(own) * prices[:, None]
            scores = jnp.where(jnp.isinf(prices)[:, None], jnp.inf, scores).T
            if self.pattern is None:
                gone = find_lowest(scores.reshape(-1), count).reshape(scores.shape)
            else:
                gone = find_lowest(scores, jnp.int32(size - self.pattern[0]))
            state = w, errors, gone.T, start
            return jax.lax.fori_loop(start, start + size, move, state)[:2]

        return jax.lax.fori_loop(0, w.shape[0] // size, group, (w, jnp.zeros_like(w)))


CRITERIA: Mapping[str, Criterion] = {
    "magnitude": Magnitude(),
    "magnitude-layer": Magnitude(scope="layer"),
    "magnitude-global": Magnitude(scope="global"),
    "magnitude-2:4": Magnitude(pattern=(2, 4)),
    "wanda": Wanda(),
    "wanda-2:4": Wanda(pattern=(2, 4)),
    "sparsegpt": SparseGPT(),
    "sparsegpt-2:4": SparseGPT(pattern=(2, 4)),
}
"""Every criterion by name, in the settings that tests and experiments compare."""


def factorise(products: Float[Array, "in in"], damping: float) -> Float[Array, "in in"]:
    """U, upper triangular: U'U is the inverse of X'X, damped, over its mean diagonal.

    Row j of U, over U_jj, is how later weights make up for the one at j when those
    before it stand. An input that was always 0 is one of its own, of the mean size.
    """
    diagonal = jnp.diag(products)
    alive = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive), 1).astype(jnp.float32)
    mean = jnp.where(mean > 0, mean, 1)
    scaled = products / mean + jnp.diag(jnp.where(alive, damping, 1.0))
    # With the order of columns turned round, the lower factor's inverse is the upper
    # one of the inverse: no inverse is made of products, whose condition is squared.
    lower = jnp.linalg.cholesky(scaled[::-1, ::-1])
    identity = jnp.eye(len(products), dtype=jnp.float32)
    inverse = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
    return jnp.triu(inverse[::-1, ::-1])


def find_lowest(scores: Float[Array, "*N M"], count: jax.Array) -> Bool[Array, "*N M"]:
    """The `count` lowest along the last axis, int32; of equal ones the first.

    Scores are float32, not negative, and no NaN. Nothing is sorted: passes that compare
    and add find the threshold bit by bit.
    """
    keys = jax.lax.bitcast_convert_type(scores, jnp.uint32)  # in the same order
    threshold = _find_key(keys, count)
    equal = keys == threshold
    left = count - jnp.sum(keys < threshold, -1, dtype=jnp.int32, keepdims=True)
    places = jnp.arange(scores.shape[-1], dtype=jnp.uint32)
    places = jnp.where(equal, places, jnp.uint32(2**32 - 1))
    return (keys < threshold) | (
        equal & (left > 0) & (places <= _find_key(places, left))
    )


def _find_key(keys: UInt32[Array, "*N M"], count: jax.Array) -> UInt32[Array, "*N 1"]:
    """The key that is number `count` (from 1) in ascending order; 0 for none."""

    def step(index, found):
        trial = found | (jnp.uint32(1) << (jnp.uint32(31) - index.astype(jnp.uint32)))
        below = jnp.sum(keys < trial, axis=-1, dtype=jnp.int32, keepdims=True)
        return jnp.where(below < count, trial, found)

    nothing = jnp.zeros((*keys.shape[:-1], 1), jnp.uint32)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(32), step, nothing)
