"""What whoever trains a model knows of it, and of a batch: no tokens, no images.

A batch is any pytree of static shapes that can be cut, weighed and counted; a model is
parameters, statistics and a pure loss. Gradients over a batch in parts, evaluation, the
training loop and measured steps are written once for all that give these.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax


@runtime_checkable
class Batch(Protocol):
    """What one training or evaluation step sees."""

    @property
    def unit(self) -> str:
        """The word for what `count` counts, in the plural: "tokens", "images"."""
        ...

    def count(self) -> int:
        """How much there is to compute, from static shapes: what a rate counts."""
        ...

    def weight(self) -> jax.Array:
        """What the loss is a mean over, a float32 scalar.

        A mean is divided by it, or by 1 where it is less, so that a batch of nothing
        but padding has loss 0.
        """
        ...

    def split(self, parts: int) -> "Batch":
        """The batch with a leading axis of `parts`, each of which is a batch.

        Raises:
          ValueError: it cannot be divided into so many (`jmem.data.batch.split_rows`).
        """
        ...


class Aux(NamedTuple):
    """What a loss leaves besides its value."""

    stats: Any
    """Statistics after the batch, of the shapes and dtypes given; {} if there are none.
    In evaluation, those that were given."""
    metrics: Mapping[str, jax.Array]
    """Scalars to log beside the loss, float32, each a mean over the batch."""


@runtime_checkable
class Model[Params, Stats](Protocol):
    """What is trained: hashable, and parameters are always an argument."""

    @property
    def needs_key(self) -> bool:
        """Whether training computes other than evaluation does: with noise, or by the
        batch's own statistics. Only then is `loss` given a key.
        """
        ...

    def init(self, key: jax.Array) -> Params:
        """Random parameters."""
        ...

    def stats(self) -> Stats:
        """Statistics before the first batch (running means); {} if there are none."""
        ...

    def loss(
        self,
        params: Params,
        stats: Stats,
        batch: Any,
        key: jax.Array | None,
        ops: Any = None,
    ) -> tuple[jax.Array, Aux]:
        """The mean over the batch, a float32 scalar, and what else is left. Pure.

        Without a key it evaluates: with the statistics given, and without noise. `ops`,
        where a model has them (`jmem.nn.ops`), replace its own.
        """
        ...
