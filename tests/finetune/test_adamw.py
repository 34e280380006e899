"""AdamW: schedules, clipping, and arithmetic that storage does not touch."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# optax and chex type every tree as a union of all that a tree can be.

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmem.finetune.adamw import AdamW, descend
from jmem.finetune.lomo import Lomo
from jmem.finetune.lora import Lora


def test_direction_is_optax_adamw():
    params = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4)}
    ours, state = AdamW(weight_decay=0.1, b2=0.95).direction(), None
    reference = optax.adamw(1.0, b2=0.95, weight_decay=0.1)
    state, expected = ours.init(params), reference.init(params)
    for step in range(3):
        grads = jax.tree.map(lambda p, s=step: jnp.sin(p * (s + 1)), params)
        found, state = ours.update(grads, state, params)
        updates, expected = reference.update(grads, expected, params)
        chex.assert_trees_all_close(
            found, jax.tree.map(jnp.negative, updates), rtol=1e-6
        )


def test_small_gradients_survive_in_bfloat16_weights_float32_moments():
    """g² of a bf16 gradient of 1e-3, times 1 - b2, is lost if added in bf16."""
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    direction = AdamW().direction()
    state = direction.init(params)
    for _ in range(50):
        grads = {"w": jnp.full(4, 1e-3, jnp.bfloat16)}
        _, state = direction.update(grads, state, params)
    g = float(jnp.bfloat16(1e-3))
    np.testing.assert_allclose(state.nu["w"], g**2 * (1 - 0.999**50), rtol=1e-3)
    assert state.nu["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "total_steps": 4}, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"schedule": "cosine", "total_steps": 4}, [1.0, 0.853553, 0.5, 0.146447, 0.0]),
        (
            {"schedule": "linear", "warmup_steps": 2, "total_steps": 4},
            [0.5, 1.0, 1.0, 0.5, 0.0],
        ),
    ],
)
def test_rates(options, expected):
    adamw = AdamW(learning_rate=1.0, **options)
    rates = [float(adamw.rate(jnp.int32(step))) for step in range(5)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_clipping_scales_to_the_norm_and_reports_the_norm_before():
    grads = {"a": jnp.full(4, 3.0), "b": jnp.full(4, 4.0, jnp.bfloat16)}
    clipped, norm = AdamW(max_grad_norm=2.0).clip(grads)
    np.testing.assert_allclose(norm, 10.0)
    np.testing.assert_allclose(clipped["a"], 0.6, rtol=1e-6)
    assert clipped["b"].dtype == jnp.bfloat16
    untouched, _ = AdamW(max_grad_norm=0).clip(grads)
    chex.assert_trees_all_equal(untouched, grads)
    inside, _ = AdamW(max_grad_norm=20.0).clip(grads)
    chex.assert_trees_all_equal(inside, grads)


def test_descent_adds_in_float32():
    params = {"w": jnp.ones(1, jnp.bfloat16)}
    moved = descend(params, {"w": jnp.full(1, 2**-7)}, {"w": jnp.float32(0.75)})
    assert moved["w"][0] == jnp.bfloat16(1 - 0.75 * 2**-7)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AdamW(learning_rate=-1.0), "learning_rate=-1.0"),
        (lambda: AdamW(learning_rate=float("nan")), "learning_rate=nan"),
        (lambda: AdamW(learning_rate=float("inf")), "learning_rate=inf must be finite"),
        (
            lambda: AdamW(learning_rate=1e39),
            r"learning_rate=1e\+39 must be finite",
        ),
        (lambda: AdamW(weight_decay=float("inf")), "weight_decay=inf"),
        (
            lambda: AdamW(learning_rate=1e30, rates=(("*", 1e9),)),
            r"learning_rate \* 1\S* of rates=1\S* must",
        ),
        (lambda: AdamW(eps=1e-50), "eps=1e-50"),
        (lambda: Lomo(learning_rate=float("inf")), "Lomo: learning_rate=inf"),
        (lambda: AdamW(b2=1.0), "b2=1.0"),
        (lambda: AdamW(eps=0.0), "eps=0.0"),
        (lambda: AdamW(schedule="cosine"), "total_steps=0"),
        (lambda: Lora(rank=0), "rank=0"),
        (lambda: Lora(maps=("query",)), "'query'"),
        (lambda: Lora(maps=("gat",)), "Did you mean 'gate'"),
        (lambda: Lora(maps=()), "at least one map"),
        (lambda: Lora(maps=("q", "q")), "each once"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
