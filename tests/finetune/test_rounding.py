"""Moments of few bits: the mean of many roundings is the value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.finetune.adamw import AdamW
from jmem.finetune.lisa import Lisa
from jmem.finetune.rounding import BLOCK, draw_noise, pack, round_randomly, unpack


@pytest.mark.parametrize("mantissa", [7, 3])
def test_rounding_is_exact_on_average(mantissa):
    given = jnp.asarray([0.0, 1.0, 1.001, -3.3, 1e-4, -7e5], jnp.float32)
    salts = jnp.arange(20_000, dtype=jnp.uint32)
    many = np.asarray(
        jax.vmap(lambda salt: round_randomly(given, draw_noise((6,), salt), mantissa))(
            salts
        )
    )
    x = np.asarray(given)
    step = 2.0**-mantissa
    np.testing.assert_allclose(many.mean(axis=0), x, rtol=step / 20)
    assert (np.abs(many - x) <= step * np.abs(x)).all()
    np.testing.assert_array_equal(many[:, :2], np.broadcast_to(x[:2], (20_000, 2)))


def test_noise_differs_by_place_and_by_salt():
    first, second = (np.asarray(draw_noise((64, 64), jnp.uint32(n))) for n in (1, 2))
    assert len(np.unique(first)) == first.size
    assert (first != second).mean() > 0.999
    bits = ((first[..., None] >> np.arange(32)) & 1).mean(axis=(0, 1))
    np.testing.assert_allclose(bits, 0.5, atol=0.05)


@pytest.mark.parametrize("width", [5, BLOCK, BLOCK + 3])
def test_packed_values_come_back(width):
    x = jax.random.normal(jax.random.key(0), (3, width)) * jnp.asarray(
        [[1e-12], [1.0], [0.0]]
    )
    small, scale = pack(x, jnp.uint32(7))
    assert small.shape == x.shape
    assert small.dtype.itemsize == 1
    assert scale.shape == (3, -(-width // BLOCK))
    back = np.asarray(unpack(small, scale))
    largest = np.abs(x).max(axis=1, keepdims=True)
    error = np.abs(back - x)
    assert (error <= np.maximum(2**-3 * np.abs(x), largest * 2.0**-17)).all()
    assert (back[2] == 0).all()


def test_a_second_moment_follows_where_nearest_rounding_stands_still():
    """v <- 0.999 v + 0.001, from 2 towards 1, in 2,000 steps: 1.135."""
    v0 = jnp.full((1, BLOCK), 2.0)

    def step(state, salt):
        small, scale, stuck = state
        v = 0.999 * jnp.square(unpack(small, scale)) + 0.001
        stuck = (0.999 * stuck.astype(jnp.float32) + 0.001).astype(jnp.bfloat16)
        return (*pack(jnp.sqrt(v), salt), stuck), None

    start = (*pack(jnp.sqrt(v0), jnp.uint32(0)), v0.astype(jnp.bfloat16))
    (small, scale, stuck), _ = jax.lax.scan(
        step, start, jnp.arange(1, 2001, dtype=jnp.uint32)
    )
    found = float(jnp.square(unpack(small, scale)).mean())
    assert found == pytest.approx(1 + 0.999**2000, rel=0.03)
    assert float(stuck.astype(jnp.float32).mean()) == 2.0


def test_updates_that_bfloat16_loses_add_up_when_rounded_at_random():
    """A tenth of a weight's last bit, 200 times, is 20 of its last bits on average."""
    w = jnp.full((64, 64), 1.5, jnp.bfloat16)
    bit, found = 2.0**-7, {}
    for how in ("nearest", "random"):
        adamw = AdamW(weight_rounding=how, max_grad_norm=0)

        @jax.jit
        def step(t, carry, adamw=adamw):
            w, state = carry
            salt = t.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
            dw, rate = -jnp.ones(w.shape), jnp.float32(0.1 * bit)
            return adamw.rule(w, state, dw, rate, t + 1, salt)

        state = (jnp.zeros(w.shape), jnp.zeros(w.shape))
        found[how], _ = jax.lax.fori_loop(0, 200, step, (w, state))
    assert (found["nearest"] == w).all()
    mean = float(jnp.mean(found["random"].astype(jnp.float32)))
    # One deviates by sqrt(200 * 0.1 * 0.9) bits, the mean of 4,096 by 0.07.
    np.testing.assert_allclose(mean, 1.5 + 20 * bit, atol=5 * 0.07 * bit)


def test_weights_rounded_at_random_need_a_fused_step():
    with pytest.raises(ValueError, match="weight_rounding='random' needs a fused step"):
        Lisa(adamw=AdamW(weight_rounding="random"))
    with pytest.raises(ValueError, match="needs a fused step"):
        AdamW(weight_rounding="random").clip({"w": jnp.ones(3)})
