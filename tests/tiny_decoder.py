"""The one small decoder of the tests, and weights for it that compile nothing."""

import jax
import numpy as np
from jax.typing import DTypeLike

from jmem.models.decoder import Decoder, DecoderConfig

TINY = DecoderConfig(
    vocab_size=48,
    layers=5,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate=64,
    max_positions=128,
)
"""Grouped queries, an untied head, more blocks than LISA trains; GGUF can pack it."""


def random_params(
    config: DecoderConfig, dtype: DTypeLike = np.float32, *, seed=0, scale=1.0
) -> dict:
    """The decoder's tree as NumPy arrays: normal, no two values alike, no norm at 1."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (scale * random.standard_normal(leaf.shape)).astype(
            np.dtype(dtype)
        ),
        Decoder(config).abstract(),
    )
