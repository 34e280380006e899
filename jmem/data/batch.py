"""The one noun between data and training: `Batch`."""

from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float32, Int32


class Batch(NamedTuple):
    """What one training or evaluation step sees: static shapes, targets shifted.

    Loaders fill it with NumPy arrays; a jitted step moves them to its device. Being
    a NamedTuple it is a pytree, so it may also hold `jax.ShapeDtypeStruct`s.
    """

    tokens: Int32[Array | np.ndarray, "B T"]
    """Token ids the model reads."""
    targets: Int32[Array | np.ndarray, "B T"]
    """`targets[b, t]` is the token that follows `tokens[b, t]`: already shifted."""
    weights: Float32[Array | np.ndarray, "B T"]
    """Weight of each target in the loss; 0 leaves it out."""
