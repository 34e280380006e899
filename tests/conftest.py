"""Settings every test shares: one CPU process, strict shapes, no stray threads."""

import os

# Before JAX starts: tests compile for described GPUs and compute on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes():
    """Implicit dtype promotion raises: for tests of our own forward code."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def tiny_config():
    """A decoder of every feature but biases and scaling: GQA, untied, five layers."""
    from jmem.models.decoder import DecoderConfig

    return DecoderConfig(
        vocab_size=48,
        layers=5,
        hidden=16,
        heads=4,
        kv_heads=2,
        head_dim=4,
        intermediate=24,
        max_positions=64,
    )


@pytest.fixture
def tiny(tiny_config):
    """The decoder of `tiny_config`, float32."""
    from jmem.models.decoder import Decoder

    return Decoder(tiny_config)


@pytest.fixture
def tiny_params(tiny):
    """Random parameters of `tiny`; compiled as one program, which is far quicker."""
    return jax.jit(tiny.init)(jax.random.key(0))


@pytest.fixture
def random_batch():
    """`random_batch(model, seed, batch_size, seq_len)`: some targets carry weight 0."""
    import jax.numpy as jnp
    import numpy as np

    from jmem.data.batch import Batch

    def make(model, seed=0, batch_size=2, seq_len=10):
        random = np.random.default_rng(seed)
        shape = (batch_size, seq_len + 1)
        tokens = random.integers(0, model.config.vocab_size, shape).astype(np.int32)
        weights = (random.random((batch_size, seq_len)) < 0.8).astype(np.float32)
        return Batch(*map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], weights)))

    return make
