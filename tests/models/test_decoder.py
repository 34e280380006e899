"""The decoder's contract: an independent formula, and both doors of `ops`."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# optax and chex type every tree as a union of all that a tree can be.

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import random_params

from jmem.finetune.adapters import attach
from jmem.finetune.lora import Lora, lora_linear
from jmem.generate.programs import decode_program
from jmem.kvcache.full import Full
from jmem.models import zoo
from jmem.models.decoder import PRECISIONS, Decoder
from jmem.models.next_token import token_positions
from jmem.nn.rope import LinearScaling, Llama3Scaling, YarnScaling
from jmem.nn.stack import depth, run_stack
from jmem.offload import fetch_row
from jmem.targets import resolve


def forward(model, params, tokens, ops=None, carry=None):
    """Logits [B, T, V] of a plain forward pass."""
    ops = ops or model.ops
    positions = token_positions(tokens)
    x = model.embed(params, tokens, positions)
    x, _, _ = run_stack(model.block, params["blocks"], x, positions, ops, carry)
    return model.head(params, x, ops)


def yarn(s, config):
    """(frequencies, amplitude) by the published loop over dimensions of one head."""
    dim, base = config.head_dim, config.rope_theta

    def dimension(rotations):  # that turns so often in the original context
        angle = s.original_max_positions / (rotations * 2 * np.pi)
        return dim * np.log(angle) / (2 * np.log(base))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    frequencies = []
    for i in range(dim // 2):
        ramp = min(max((i - low) / (high - low), 0), 1)
        plain = 1 / base ** (2 * i / dim)
        frequencies.append(plain / s.factor * ramp + plain * (1 - ramp))
    amplitude = s.attention_factor or 0.1 * np.log(s.factor) + 1
    return np.array(frequencies), amplitude


def reference_logits(config, params, tokens):
    """The same decoder from its equations: float64, one row, one head at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_eps) * scale

    half = config.head_dim // 2
    frequencies = config.rope_theta ** -(np.arange(half) / half)
    amplitude = 1.0
    s = config.rope_scaling
    if isinstance(s, LinearScaling):
        frequencies = frequencies / s.factor
    if isinstance(s, YarnScaling):
        frequencies, amplitude = yarn(s, config)
    if isinstance(s, Llama3Scaling):  # Hugging Face's published branches
        scaled = []
        for f in frequencies:
            wavelength = 2 * np.pi / f
            if wavelength < s.original_max_positions / s.high_freq_factor:
                scaled.append(f)
            elif wavelength > s.original_max_positions / s.low_freq_factor:
                scaled.append(f / s.factor)
            else:
                smooth = s.original_max_positions / wavelength - s.low_freq_factor
                smooth /= s.high_freq_factor - s.low_freq_factor
                scaled.append((1 - smooth) * f / s.factor + smooth * f)
        frequencies = np.array(scaled)

    def rotate(x):  # [T, D], complex numbers (x_i, x_{i + D/2})
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(
            1j * np.arange(len(x))[:, None] * frequencies
        )
        return np.concatenate([turned.real, turned.imag], axis=1) * amplitude

    logits = []
    for ids in np.asarray(tokens):
        x = p["embed"]["embedding"][ids]
        for layer in range(config.layers):
            b = jax.tree.map(lambda a: a[layer], p["blocks"])  # noqa: B023
            h = norm(x, b["attention_norm"]["scale"])
            a = b["attention"]
            q, k, v = (
                (h @ a[n]["kernel"] + a[n].get("bias", 0)).reshape(
                    len(ids), -1, config.head_dim
                )
                for n in "qkv"
            )
            heads = []
            for head in range(config.heads):
                group = head // (config.heads // config.kv_heads)
                scores = rotate(q[:, head]) @ rotate(k[:, group]).T
                scores /= np.sqrt(config.head_dim)
                scores[np.triu_indices(len(ids), 1)] = -np.inf
                if (window := config.sliding_window) is not None:
                    scores[np.tril_indices(len(ids), -window)] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                heads.append(weights @ v[:, group])
            x = x + np.concatenate(heads, axis=1) @ a["o"]["kernel"]
            h = norm(x, b["mlp_norm"]["scale"])
            gate, up = h @ b["mlp"]["gate"]["kernel"], h @ b["mlp"]["up"]["kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ b["mlp"]["down"]["kernel"]
        x = norm(x, p["final_norm"]["scale"])
        tied = p["embed"]["embedding"].T
        logits.append(x @ (tied if config.tied else p["head"]["kernel"]))
    return np.stack(logits)


VARIANTS = {
    "llama2": {},
    "multi-head": {"kv_heads": 4},
    "qwen2": {"qkv_bias": True, "tied": True, "rope_theta": 1e6, "rms_eps": 1e-6},
    "llama3.1": {
        "rope_scaling": Llama3Scaling(factor=4.0, original_max_positions=16),
        "max_positions": 64,
    },
    "wide heads": {"head_dim": 12},  # heads * head_dim differs from hidden
    "mistral": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "window beyond the text": {"sliding_window": 24},
    "linear": {"rope_scaling": LinearScaling(factor=3.0)},
    "yarn": {"rope_scaling": YarnScaling(factor=4.0, original_max_positions=32)},
    # The ramp ends beyond the last pair, and beyond the last channel.
    "yarn, long": {
        "rope_scaling": YarnScaling(factor=4.0, original_max_positions=2**17)
    },
    "yarn, none": {
        "rope_scaling": YarnScaling(factor=4.0, original_max_positions=2**30)
    },
    "yarn, whole": {
        "rope_scaling": YarnScaling(
            factor=8.0,
            original_max_positions=64,
            beta_fast=16.0,
            attention_factor=0.7,
            truncate=False,
        ),
        "head_dim": 16,
        "rope_theta": 500.0,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=list(VARIANTS))
def test_logits_match_the_equations(tiny_config, changes, strict_dtypes):
    config = dataclasses.replace(tiny_config, **changes)
    model = Decoder(config)
    params = jax.tree.map(jnp.asarray, random_params(config, scale=0.3))
    random = np.random.default_rng(1)
    tokens = random.integers(0, config.vocab_size, (2, 24), np.int32)
    expected = reference_logits(config, params, tokens)
    # float32 through five blocks: rounding grows with the logits' size.
    tolerance = 2e-5 * np.abs(expected).max()
    logits = jax.jit(lambda *given: forward(model, *given))(params, tokens)
    np.testing.assert_allclose(logits, expected, atol=tolerance)


def test_bfloat16_stays_bfloat16_without_implicit_promotion(tiny_config):
    model = Decoder(tiny_config, dtype=jnp.bfloat16)
    params = jax.tree.map(jnp.asarray, random_params(tiny_config, jnp.bfloat16))
    chex.assert_trees_all_equal_dtypes(params, model.abstract())

    def attend(q, k, v, rope, positions, layer, carry):  # jax.nn's own promotes inside
        return rope(q, positions) + jnp.tile(
            rope(k, positions) + v, (1, 1, 2, 1)
        ), carry

    ops = model.ops._replace(attend=attend)
    tokens = jnp.zeros((1, 4), jnp.int32)
    with jax.numpy_dtype_promotion("strict"):
        logits = jax.jit(lambda p: forward(model, p, tokens, ops))(params)
    assert logits.dtype == jnp.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_mixed_precision_casts_what_bfloat16_stores(tiny_config, tied):
    """float32 parameters, and what a bfloat16 decoder computes of their casts."""
    config = dataclasses.replace(tiny_config, tied=tied, qkv_bias=True)
    mixed, half = (Decoder(config, **PRECISIONS[p]) for p in ("mixed", "bfloat16"))
    params = random_params(config, scale=0.3)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, mixed.abstract())
    cast = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(lambda p: forward(mixed, p, tokens))(params)
    assert found.dtype == jnp.bfloat16
    expected = jax.jit(lambda p: forward(half, p, tokens))(cast)
    np.testing.assert_array_equal(found, expected)


def test_blocks_are_stacked_from_birth_and_differ(tiny_params):
    blocks = tiny_params["blocks"]
    assert depth(blocks) == 5
    kernel = blocks["attention"]["q"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])
    assert fetch_row(blocks, jnp.int32(3))["mlp"]["up"]["kernel"].shape == (32, 64)


def test_a_70b_model_is_described_without_memory():
    leaves = jax.tree.leaves(
        Decoder(zoo.get("llama2-70b"), dtype=jnp.bfloat16).abstract()
    )
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == 137_953_296_384


class TestLinearDoor:
    """Another `linear` over leaves that the modules know nothing of."""

    def test_new_adapters_change_nothing_and_receive_gradients(self, tiny, tiny_params):
        params = tiny_params
        tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
        lora = Lora(rank=3, maps=("q", "down"))
        adapters = lora.adapters(params["blocks"], jax.random.key(1))
        ops = tiny.ops._replace(linear=lora_linear(lora.scale))

        def logits(adapters):
            blocks = attach(params["blocks"], adapters)
            return forward(tiny, params | {"blocks": blocks}, tokens, ops)

        plain = jax.jit(lambda p: forward(tiny, p, tokens))(params)
        np.testing.assert_array_equal(jax.jit(logits)(adapters), plain)
        grads = jax.jit(jax.grad(lambda a: logits(a).sum()))(adapters)
        b_gradient = np.asarray(grads["attention"]["q"]["lora_b"])
        assert b_gradient.shape == (5, 3, 32)
        assert (np.abs(b_gradient).max(axis=(1, 2)) > 0).all()  # every layer's

    def test_a_leaf_may_lose_its_kernel(self, tiny, tiny_params):
        """Packed weights: `linear` alone knows what a leaf holds."""
        params = tiny_params
        tokens = jnp.arange(6, dtype=jnp.int32)[None]
        halves = jax.tree.map(lambda k: k / 2, params["blocks"]["mlp"]["up"]["kernel"])
        mlp = params["blocks"]["mlp"] | {"up": {"half": halves}}
        packed = params | {"blocks": params["blocks"] | {"mlp": mlp}}
        dense = tiny.ops.linear

        def linear(name, leaf, x):
            kernel = leaf["half"] * 2 if "half" in leaf else leaf["kernel"]
            return dense(name, {"kernel": kernel}, x)

        ops = tiny.ops._replace(linear=linear)
        found = jax.jit(lambda p: forward(tiny, p, tokens, ops))(packed)
        expected = jax.jit(lambda p: forward(tiny, p, tokens))(params)
        np.testing.assert_allclose(found, expected, atol=1e-6)


class TestAttendDoor:
    """A key-value cache carried through the layer scan, for an H200."""

    @pytest.mark.compat
    @pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b"])
    def test_the_cache_is_updated_in_place(self, name):
        config = dataclasses.replace(zoo.get(name), layers=8, vocab_size=1024)
        model = Decoder(config, dtype=jnp.bfloat16)
        batch_size, slots = 4, 8192
        sizes = Full().plan(model, prompt=slots, new_tokens=0, batch_size=batch_size)
        program = decode_program(model, sizes)
        plan = program.compile(resolve("h200")).memory_analysis()
        cache = sizes.bytes()
        blocks = jax.tree.leaves(model.abstract()["blocks"])
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in blocks)
        assert plan.alias_size_in_bytes >= cache
        # One layer's weights and cache may be sliced out; a second copy of the cache
        # would be all eight layers.
        one_layer = (weights + cache) / config.layers
        assert plan.temp_size_in_bytes < 1.2 * one_layer < cache
