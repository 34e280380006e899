"""Settings every test shares: one CPU process, strict shapes, no stray threads."""

import gc
import os
import pathlib
import sys

import balance
import kept

# Before JAX starts: tests compile for described GPUs and compute on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# LLVM's costly passes off: tests compile hundreds of programs and run each briefly.
# The plan of a program's memory is made before LLVM sees it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

os.environ.update(kept.settings())
if kept_bytecode := os.environ.get("PYTHONPYCACHEPREFIX"):
    sys.pycache_prefix, sys.dont_write_bytecode = kept_bytecode, False

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Of every eight seconds of tracing one went into looking for cycles among what stays.
gc.freeze()
gc.set_threshold(10_000, 20, 50)


MOST_MAPPINGS = 40_000
"""Of the 65,530 mappings of memory that Linux allows a process. Every program that JAX
keeps takes some, and XLA (0.12) crashes where it gets none for the next one."""


def pytest_configure(config):
    config.pluginmanager.register(balance.Balance(), "balance")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Between files compiled programs are let go of, if there are many."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def strict_dtypes():
    """Implicit dtype promotion raises: for tests of our own forward code."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def compiled_anew():
    """JAX's kept programs are left alone: one that comes from there has no plan."""
    with kept.apart():
        yield


@pytest.fixture
def tiny_config():
    """`tests.tiny.TINY`, for tests that change it."""
    from tiny_decoder import TINY

    return TINY


@pytest.fixture
def tiny(tiny_config):
    """The decoder of `tiny_config`, float32."""
    from jmem.models.decoder import Decoder

    return Decoder(tiny_config)


@pytest.fixture(scope="session")
def initial_params():
    """Random parameters of `tiny`, compiled once: that takes seconds."""
    from tiny_decoder import TINY

    from jmem.models.decoder import Decoder

    return jax.jit(Decoder(TINY).init)(jax.random.key(0))


@pytest.fixture
def tiny_params(initial_params):
    """A copy of the initial parameters of `tiny`, to be donated if a test likes."""
    return jax.tree.map(jax.numpy.copy, initial_params)


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
