"""DoRA: its formula, its norm without a gradient, and what it never makes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.finetune.adamw import AdamW
from jmem.finetune.adapters import attach
from jmem.finetune.lora import Lora, compute_squares, lora_linear, norms, scale_columns
from jmem.nn import quantised

S = 1.5


@pytest.fixture
def leaf():
    """One layer's leaf, whose product is as large as its kernel."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {
        "kernel": (8, 5),
        "lora_a": (8, 3),
        "lora_b": (3, 5),
        "magnitude": (5,),
        "bias": (5,),
    }
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items())
    }


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(9), (2, 7, 8))


def formula(leaf, x):
    """Equation 5 of the paper in NumPy's float64, for kernels [in, out]."""
    w, a, b, m, bias = (
        np.array(leaf[name], float)
        for name in ("kernel", "lora_a", "lora_b", "magnitude", "bias")
    )
    adapted = w + S * a @ b
    return np.array(x, float) @ (m * adapted / np.linalg.norm(adapted, axis=0)) + bias


def test_the_product_is_the_papers(leaf, x, strict_dtypes):
    found = lora_linear(S)("q", leaf, x)
    np.testing.assert_allclose(found, formula(leaf, x), rtol=1e-5, atol=1e-5)


def test_the_norm_has_no_gradient(leaf, x):
    """Section 4.3: as the formula's gradient with the norm held fixed."""
    trained = {name: leaf[name] for name in ("lora_a", "lora_b", "magnitude")}

    def plain(trained, x, fixed):
        adapted = leaf["kernel"] + S * trained["lora_a"] @ trained["lora_b"]
        norm = jnp.linalg.norm(adapted, axis=0, keepdims=True)
        norm = jax.lax.stop_gradient(norm) if fixed else norm
        scale = trained["magnitude"][None]
        return jnp.sin(x @ (scale * adapted / norm) + leaf["bias"][None, None]).sum()

    def ours(trained, x):
        return jnp.sin(lora_linear(S)("q", leaf | trained, x)).sum()

    found = jax.grad(ours, (0, 1))(trained, x)
    expected = jax.grad(plain, (0, 1))(trained, x, True)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    through = jax.grad(plain)(trained, x, False)["lora_a"]
    assert np.abs(through - found[0]["lora_a"]).max() > 0.1


def test_dropout_is_before_a_alone(leaf, x):
    dropped = leaf | {"lora_key": jax.random.key(5)}
    found = lora_linear(S, 0.5)("q", dropped, x)
    kept = np.asarray(jax.random.bernoulli(jax.random.key(5), 0.5, x.shape)) / 0.5
    w, a, b = (np.array(leaf[name], float) for name in ("kernel", "lora_a", "lora_b"))
    x = np.array(x, float)
    norm = np.linalg.norm(w + S * a @ b, axis=0)
    expected = (
        (x @ w + S * (x * kept) @ a @ b) * np.array(leaf["magnitude"], float) / norm
    )
    expected += np.array(leaf["bias"], float)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_magnitude_s_small_step_is_seen_in_bfloat16():
    """A factor of 1.003 would be 1 in bfloat16; its gradient is a float32 sum."""
    y = jnp.full((4, 3), 3.984375, jnp.bfloat16)
    assert (scale_columns(y, jnp.full(3, 1.003)) > y).all()
    d_y, d_factor = jax.grad(
        lambda *p: scale_columns(*p).sum().astype(jnp.float32), (0, 1)
    )(y, jnp.ones(3))
    assert (d_y.dtype, d_factor.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(d_factor, 4 * 3.984375)


DORA = Lora(rank=2, alpha=3.0, dora=True, adamw=AdamW(learning_rate=1e-2))


def trained(lora, model, params, batch, steps=3):
    state = lora.init(model, jax.tree.map(jnp.copy, params), {}, jax.random.key(1))
    step = jax.jit(lora.step, static_argnums=0)
    for _ in range(steps):
        state, _ = step(model, state, batch)
    return state


class TestState:
    def test_magnitudes_start_as_the_norms_of_columns(self, tiny_params):
        adapters = DORA.adapters(tiny_params["blocks"], jax.random.key(0))
        for name, leaf in adapters["mlp"].items():
            kernel = tiny_params["blocks"]["mlp"][name]["kernel"]
            np.testing.assert_allclose(
                leaf["magnitude"], np.linalg.norm(kernel, axis=1), rtol=1e-6
            )
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params["blocks"])
        leaf = DORA.adapters(half, jax.random.key(0))["mlp"]["up"]
        assert {k: str(v.dtype) for k, v in leaf.items()} == {
            "lora_a": "bfloat16",
            "lora_b": "bfloat16",
            "magnitude": "float32",
        }

    def test_merged_has_the_trained_lengths_and_directions(
        self, tiny, tiny_params, random_batch
    ):
        state = trained(DORA, tiny, tiny_params, random_batch(tiny))
        leaf, kernel = state["lora"]["mlp"]["up"], tiny_params["blocks"]["mlp"]["up"]
        a, b = (np.array(leaf[name], float) for name in ("lora_a", "lora_b"))
        w = np.array(kernel["kernel"], float)
        adapted = w + 1.5 * a @ b
        norm = np.linalg.norm(adapted, axis=1, keepdims=True)
        expected = adapted / norm * leaf["magnitude"][:, None]
        merged = DORA.merged(state)[0]["blocks"]["mlp"]["up"]["kernel"]
        np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-6)
        start = np.linalg.norm(w, axis=1)
        assert np.abs(leaf["magnitude"] - start).min(axis=1).max() > 0
        assert np.abs(leaf["magnitude"] - start).max() > 0.01  # three steps of 0.01

    def test_norms_of_a_whole_stack_are_those_of_each_layer(
        self, tiny_config, random_batch
    ):
        """Over a kernel and over its packed form, as a step computes them."""
        from tiny_decoder import random_params

        config = dataclasses.replace(tiny_config, hidden=64, head_dim=16)
        params = jax.tree.map(jnp.asarray, random_params(config))
        packed = quantised.pack(params)["blocks"]
        adapters = DORA.adapters(packed, jax.random.key(0))
        adapters = jax.tree.map(lambda x: x + 0.1, adapters)
        for blocks in (packed, quantised.unpack(packed, jnp.float32)):
            found = norms(blocks, adapters, compute_squares(blocks, adapters), S)
            kernels = quantised.unpack(packed, jnp.float32)
            for part in adapters:
                for name, leaf in adapters[part].items():
                    delta = S * leaf["lora_a"] @ leaf["lora_b"]
                    whole = kernels[part][name]["kernel"] + delta
                    np.testing.assert_allclose(
                        found[part][name]["lora_norm"],
                        np.linalg.norm(whole, axis=1),
                        rtol=1e-5,
                    )

    def test_a_column_of_zeros_stays_zero(self, tiny, tiny_params, random_batch):
        kernel = tiny_params["blocks"]["mlp"]["up"]["kernel"]
        tiny_params["blocks"]["mlp"]["up"]["kernel"] = kernel.at[..., 3].set(0)
        state = trained(DORA, tiny, tiny_params, random_batch(tiny), steps=2)
        assert all(map(jnp.all, map(jnp.isfinite, jax.tree.leaves(state["lora"]))))

    def test_adapters_of_the_other_kind_are_refused(self, tiny_params):
        plain = Lora(rank=2).adapters(tiny_params["blocks"], jax.random.key(0))
        message = r"k/magnitude with shape None, .*dora=True and .* need \(5, 16\)"
        with pytest.raises(ValueError, match=message):
            DORA.init(None, tiny_params, {}, jax.random.key(0), plain)

    def test_one_layer_is_at_work_and_no_float32_copy_of_it(self):
        """The norms alone, compiled for an H200: a kernel of 8 MiB, eight layers."""
        import jmem

        shapes = {"kernel": (8, 1024, 4096), "square": (8, 4096)}
        given = {
            name: jax.ShapeDtypeStruct(
                shape, jnp.float32 if name == "square" else jnp.bfloat16
            )
            for name, shape in (
                *shapes.items(),
                ("lora_a", (8, 1024, 4)),
                ("lora_b", (8, 4, 4096)),
            )
        }

        def fn(given):
            leaf = {name: given[name] for name in ("lora_a", "lora_b")}
            square = {"square": given["square"]}
            return norms({"kernel": given["kernel"]}, leaf, square, S)

        report = jmem.measure(fn, given, target="h200", bounds=False)
        assert report.temp_bytes < 1.2 * 8 * 2**20


def test_an_adapted_leaf_without_the_step_s_norm_computes_it(leaf, x):
    """What `lora_linear` is given outside a step, as for adapters that are loaded."""
    adapters = {name: leaf[name][None] for name in ("lora_a", "lora_b", "magnitude")}
    kernel = {"kernel": leaf["kernel"][None]}
    found = norms(kernel, adapters, compute_squares(kernel, adapters), S)
    given = attach(leaf, {"lora_norm": found["lora_norm"][0]})
    np.testing.assert_allclose(
        lora_linear(S)("q", given, x), lora_linear(S)("q", leaf, x), rtol=1e-5
    )
