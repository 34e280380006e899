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
from flax import traverse_util

from jmem.finetune.adamw import AdamW, correct_bias, descend, gradient_step
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


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.95, 0.999, 0.9999])
def test_bias_correction_is_exact(decay):
    count = np.array([1, 2, 3, 10, 100, 1_000, 30_000, 1_000_000], np.int32)
    with np.errstate(divide="ignore"):
        expected = -np.expm1(count * np.log(np.float64(decay)))
    found = jax.jit(correct_bias, static_argnums=0)(decay, jnp.asarray(count))
    # Roundings of t, log b, their product and expm1: half a unit each, expm1 some.
    np.testing.assert_allclose(found, expected, rtol=4e-7)


def test_the_first_updates_have_the_size_of_the_rate():
    """In both forms; 1 - b**t in float32 made them 6.4e-6 smaller."""
    adamw, w = AdamW(eps=1e-30), jnp.zeros(3)
    grads = jnp.asarray([1e-3, -2.0, 3e2])
    state, moments = adamw.direction().init(w), (w, w)
    for number in range(1, 4):
        found, state = adamw.direction().update(grads, state, w)
        moved, moments = adamw.rule(
            w, moments, grads, jnp.float32(1), jnp.int32(number), jnp.uint32(0)
        )
        for update in (found, -moved):
            np.testing.assert_allclose(update, jnp.sign(grads), rtol=1e-6)


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


TRANSFORMERS = {"convention": "transformers"}


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
        # get_linear_schedule_with_warmup, get_cosine_..., get_constant_... of
        # transformers 5.24: step / warmup_steps, from 0
        (
            {"schedule": "linear", "warmup_steps": 2, "total_steps": 4} | TRANSFORMERS,
            [0.0, 0.5, 1.0, 0.5, 0.0],
        ),
        (
            {"schedule": "cosine", "warmup_steps": 1, "total_steps": 4} | TRANSFORMERS,
            [0.0, 1.0, 0.75, 0.25, 0.0],
        ),
        ({"warmup_steps": 4} | TRANSFORMERS, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (
            {"schedule": "linear", "total_steps": 4} | TRANSFORMERS,
            [1.0, 0.75, 0.5, 0.25, 0.0],
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


DECAYED = {
    "embed/embedding": True,
    "blocks/attention_norm/scale": False,
    "blocks/attention/q/kernel": True,
    "blocks/attention/q/bias": False,
    "blocks/attention/q/lora_a": True,
    "blocks/attention/q/magnitude": True,
    "blocks/attention/k_norm/scale": False,
    "final_norm/scale": False,
    "final_norm/bias": False,
    "head/kernel": True,
}


@pytest.mark.parametrize("convention", ["plain", "transformers"])
def test_what_is_decayed(convention):
    """Without a gradient nothing else moves: what `Full` and `Lora` do."""
    adamw = AdamW(weight_decay=0.5, learning_rate=0.1, convention=convention)
    params = traverse_util.unflatten_dict(dict.fromkeys(DECAYED, jnp.ones(2)), sep="/")
    grads = jax.tree.map(jnp.zeros_like, params)
    moved, *_ = gradient_step(
        *(adamw, jnp.float32(0), grads, params, adamw.direction().init(params)),
        *(jnp.int32(0), 1),
    )
    moved = traverse_util.flatten_dict(moved, sep="/")
    for path, decayed in DECAYED.items():
        expected = 0.95 if decayed or convention == "plain" else 1.0
        np.testing.assert_allclose(moved[path], expected, rtol=1e-6, err_msg=path)
        alone, w = adamw.direction(path), jnp.ones(2)  # as moments on the host have it
        update, _ = alone.update(jnp.zeros(2), alone.init(w), w)
        np.testing.assert_allclose(1 - 0.1 * update, expected, rtol=1e-6, err_msg=path)


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
        (lambda: AdamW(schedule="cosine", total_steps=0), "total_steps=0"),
        (lambda: AdamW(schedule="linear").rate(jnp.int32(0)), "at total_steps=None"),
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
