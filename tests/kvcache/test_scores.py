"""Column sums of attention against float64, and what is made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.kvcache.scores import column_mass, pool, reduce_heads
from jmem.kvcache.select import select

LENGTH, WIDTH, HEADS, GROUPS, DIM = 37, 5, 6, 3, 8


@pytest.fixture
def queries_and_keys():
    random = np.random.default_rng(0)
    queries = random.standard_normal((2, WIDTH, HEADS, DIM), np.float32)
    keys = random.standard_normal((2, LENGTH, GROUPS, DIM), np.float32)
    at = np.stack([np.arange(WIDTH) + LENGTH - WIDTH, np.arange(WIDTH) + 20 - WIDTH])
    return jnp.asarray(queries), jnp.asarray(at, jnp.int32), jnp.asarray(keys)


def dense(queries, at, keys):
    """softmax in float64, summed over the queries that are there."""
    queries, at, keys = (np.asarray(x) for x in (queries, at, keys))
    keys = np.repeat(keys.astype(np.float64), HEADS // GROUPS, axis=2)
    raw = np.einsum("bwhd,bshd->bhws", queries, keys) / np.sqrt(DIM)
    seen = np.arange(LENGTH) <= at[:, None, :, None]
    weights = np.where(seen, np.exp(raw - raw.max()), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    return (weights / np.where(total > 0, total, 1)).sum(axis=2)


@pytest.mark.parametrize("block", [64, 37, 10, 7], ids="block{}".format)
def test_column_mass(queries_and_keys, block):
    queries, at, keys = queries_and_keys
    found = column_mass(queries, at, keys, block)
    np.testing.assert_allclose(found, dense(queries, at, keys), atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=-1), WIDTH, rtol=1e-5)


def test_a_row_shorter_than_the_window_has_fewer_votes(queries_and_keys):
    queries, at, keys = queries_and_keys
    at = at.at[1].set(jnp.arange(WIDTH) - 2)  # a prompt of three tokens
    found = column_mass(queries, at, keys, 16)
    np.testing.assert_allclose(found, dense(queries, at, keys), atol=1e-5)
    np.testing.assert_allclose(found[1].sum(axis=-1), 3, rtol=1e-5)


@pytest.mark.usefixtures("compiled_anew")
def test_nothing_as_large_as_all_scores_is_made():
    """131,072 keys: XLA's plan for the CPU holds the scores of one block."""
    shapes = (1, 32, 32, 128), (1, 32), (1, 131_072, 8, 128)
    types = jnp.bfloat16, jnp.int32, jnp.bfloat16
    args = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, types, strict=True)]
    plan = jax.jit(column_mass).lower(*args).compile().memory_analysis()
    assert plan is not None
    assert plan.temp_size_in_bytes < 32 * 32 * 131_072 * 4 / 2


def test_over_heads():
    mass = jnp.arange(12.0).reshape(1, 4, 3)
    np.testing.assert_array_equal(
        reduce_heads(mass, 2, "mean")[0], [[1.5, 2.5, 3.5], [7.5, 8.5, 9.5]]
    )
    np.testing.assert_array_equal(reduce_heads(mass, 1, "max")[0], [[9, 10, 11]])
    np.testing.assert_array_equal(reduce_heads(mass, 4, "sum"), mass)


def test_pooling_has_zeros_or_nothing_beyond_the_ends():
    scores = jnp.array([[[3.0, 0.0, -6.0, 9.0]]])
    np.testing.assert_allclose(pool(scores, 3, "average")[0, 0], [1, -1, 1, 1])
    np.testing.assert_allclose(pool(scores, 3, "max")[0, 0], [3, 3, 9, 9])
    np.testing.assert_allclose(pool(-scores - 20, 3, "max")[0, 0].max(), -14)
    np.testing.assert_array_equal(pool(scores, 1, "average"), scores)


class TestSelect:
    scores = jnp.array([[[1.0, 5.0, 5.0, -jnp.inf, jnp.inf, 2.0]]])

    @pytest.mark.parametrize(
        "count, expected",
        [(0, []), (1, [4]), (2, [1, 4]), (3, [1, 2, 4]), (9, [0, 1, 2, 4, 5])],
    )
    def test_the_best_ascending(self, count, expected):
        found = select(self.scores, jnp.int32(count), 5)[0, 0]
        assert list(found) == expected + [-1] * (5 - len(expected))

    def test_more_slots_than_scores(self):
        found = select(self.scores, jnp.int32(8), 8)[0, 0]
        assert list(found) == [0, 1, 2, 4, 5, -1, -1, -1]

    def test_each_row_and_unit_has_its_count(self):
        scores = jnp.arange(12.0).reshape(2, 2, 3)
        count = jnp.array([[1, 2], [0, 3]])
        found = select(scores, count, 3)
        expected = [[[2, -1, -1], [1, 2, -1]], [[-1, -1, -1], [0, 1, 2]]]
        np.testing.assert_array_equal(found, expected)
