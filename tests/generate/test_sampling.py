"""Tokens are drawn among those, and as often as, the options say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.generate.sampling import Sampling

CHANCES = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
LOGITS = jnp.log(jnp.asarray(CHANCES, jnp.float32))[None]
DRAWS = 4000


def drawn(sampling: Sampling, logits=LOGITS) -> np.ndarray:
    """How often each token comes, of 4,000 draws."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    tokens = jax.jit(jax.vmap(lambda key: sampling(logits, key)[0]))(keys)
    return np.bincount(tokens, minlength=logits.shape[-1]) / DRAWS


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.41}, [1, 2]),
        ({"top_p": 0.84}, [1, 2, 3]),
        ({"top_k": 4, "top_p": 0.6}, [1, 2]),
    ],
)
def test_the_kept_tokens_come_in_proportion(options, kept):
    found = drawn(Sampling(temperature=1.0, **options))
    expected = np.where(np.isin(range(5), kept), CHANCES, 0)
    expected /= expected.sum()
    # Four standard deviations of a binomial share.
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / DRAWS**0.5)
    assert (found[expected == 0] == 0).all()


def keep_as_transformers(logits: np.ndarray, top_p: float) -> np.ndarray:
    """Which tokens its TopPLogitsWarper (5.24) leaves, float32 throughout."""
    order = np.argsort(logits, kind="stable")
    chances = np.exp(logits[order] - logits.max())
    mass = np.cumsum(chances / chances.sum(), dtype=np.float32)
    stays = mass > np.float32(1 - top_p)
    stays[-1] = True
    return np.sort(order[stays])


@pytest.mark.parametrize("top_p", [0.125, 0.25, 0.5, 0.75, 0.875, 1e-6])
@pytest.mark.parametrize(
    "chances",
    [
        [1 / 8] * 8,  # equal ones: as many as reach the sum, and no more
        [1 / 2, 1 / 4, 1 / 8, 1 / 8, 0, 0, 0, 0],  # the sum is reached exactly
        [1 / 8, 1 / 4, 1 / 8, 1 / 2, 0, 0, 0, 0],
        [1 / 4, 1 / 8, 1 / 4, 1 / 8, 1 / 4, 0, 0, 0],
    ],
)
def test_a_sum_that_is_reached_exactly_keeps_what_transformers_keeps(chances, top_p):
    logits = np.log2(np.maximum(chances, 2.0**-40)).astype(np.float32) * np.log(2)
    logits = logits.astype(np.float32)
    found = drawn(Sampling(temperature=1.0, top_p=top_p), jnp.asarray(logits)[None])
    expected = keep_as_transformers(logits, top_p)
    assert np.flatnonzero(found).tolist() == expected.tolist()


def test_temperature_sharpens():
    squared = CHANCES**2 / (CHANCES**2).sum()
    found = drawn(Sampling(temperature=0.5))
    np.testing.assert_allclose(found, squared, atol=4 * 0.5 / DRAWS**0.5)


def test_zero_is_the_likeliest_of_each_row():
    logits = jnp.asarray([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert Sampling()(logits, jax.random.key(0)).tolist() == [1, 0]


def test_rows_have_their_own_nucleus():
    flat, steep = jnp.zeros(5), jnp.asarray([9.0, 0, 0, 0, 0])
    draw = Sampling(temperature=1.0, top_p=0.9)
    keys = jax.random.split(jax.random.key(1), 200)
    tokens = jax.jit(jax.vmap(lambda k: draw(jnp.stack([flat, steep]), k)))(keys)
    assert set(np.asarray(tokens[:, 1])) == {0}
    assert len(set(np.asarray(tokens[:, 0]))) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 5}, "do nothing at temperature=0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
