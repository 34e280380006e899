"""The one noun between data and training: `Batch`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32, Int32


class Batch(NamedTuple):
    """What one training or evaluation step sees: static shapes, targets shifted.

    Loaders fill it with NumPy arrays; a jitted step moves them to its device. Being
    a NamedTuple it is a pytree, so it may also hold `jax.ShapeDtypeStruct`s. It is a
    `jmem.models.contract.Batch`, of tokens.
    """

    tokens: Int32[Array | np.ndarray, "B T"]
    """Token ids the model reads."""
    targets: Int32[Array | np.ndarray, "B T"]
    """`targets[b, t]` is the token that follows `tokens[b, t]`: already shifted."""
    weights: Float32[Array | np.ndarray, "B T"]
    """Weight of each target in the loss; 0 leaves it out."""
    segments: Int32[Array | np.ndarray, "B T"] | None = None
    """Where a row holds several documents: the number of each token's, 0 in padding. A
    document is a run of one number. Attention stays within it, and positions begin with
    it; a target that is another document's needs weight 0. None: a row is one document.
    """

    @property
    def unit(self) -> str:
        """What `count` counts."""
        return "tokens"

    def count(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Tokens that the model reads."""
        return self.tokens.size

    def weight(self) -> Array:
        """Sum of the targets' weights, float32."""
        return jnp.sum(self.weights.astype(jnp.float32))

    def split(self, parts: int) -> "Batch":
        """Leaves [parts, B / parts, T].

        Raises:
          ValueError: `parts` does not divide B.
        """
        return split_rows(self, parts, "sequences")


def split_rows[Rows](batch: Rows, parts: int, rows: str) -> Rows:
    """Leaves [B, ...] as [parts, B / parts, ...]; `rows` is the word for what B counts.

    Raises:
      ValueError: `parts` does not divide B.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    if count % parts:
        raise ValueError(
            f"accumulate={parts} does not divide a batch of {count} {rows}; "
            "choose a divisor of it."
        )

    def cut(leaf: Any) -> Any:
        return leaf.reshape(parts, -1, *leaf.shape[1:])

    return jax.tree.map(cut, batch)
