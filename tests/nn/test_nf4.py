"""NF4: the published levels, the nearest of them, its error, a layer at a time."""

import dataclasses
from statistics import NormalDist

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem
from jmem.finetune.lora import Lora
from jmem.finetune.program import step_program
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.nn import nf4, quantised
from jmem.nn.quantised import KINDS, PACKERS

WIDE = dataclasses.replace(TINY, hidden=64, head_dim=16)
"""`TINY` with rows that are whole blocks."""
encode, decode = jax.jit(nf4.encode), jax.jit(nf4.decode)
pack_rows = jax.jit(quantised.pack_rows, static_argnums=0)
dequantise = jax.jit(quantised.dequantise, static_argnums=0)
unpack = jax.jit(quantised.unpack, static_argnums=1)


def test_levels_are_quantiles_of_the_normal_distribution():
    """Eight of its upper half, zero, seven of its lower one, over the greatest.

    The paper's section 3, with the offset of bitsandbytes' create_normal_map, whose
    table was made in float32: so its values are known to 2e-7.
    """
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    upper = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    lower = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.sort([*upper, 0.0, *lower]) / max(upper)
    np.testing.assert_allclose(nf4.LEVELS, expected, atol=2e-7)
    assert [float(np.float32(level)) for level in nf4.LEVELS] == list(nf4.LEVELS)


def nearest(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Every value's nearest level times its block's scale, by trying all sixteen."""
    blocks = values.reshape(*values.shape[:-1], -1, 64).astype(np.float64)
    candidates = np.array(nf4.LEVELS) * scale[..., None, None]
    which = np.abs(blocks[..., None] - candidates).argmin(-1)
    return (np.array(nf4.LEVELS)[which] * scale[..., None]).reshape(values.shape)


def normal(rows=64, width=4096) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


def absmax(values: np.ndarray) -> np.ndarray:
    return np.abs(values.reshape(len(values), -1, 64)).max(-1)


class TestRows:
    @pytest.mark.parametrize("kind", PACKERS)
    def test_bytes_and_shape(self, kind, strict_dtypes):
        values = normal(3, 192)
        rows = pack_rows(kind, values)
        assert rows.shape == (3, KINDS[kind].row_bytes(192))
        assert rows.dtype == jnp.uint8
        assert KINDS[kind].row_bytes(192) == {"NF4": 108, "NF4_DOUBLE": 107}[kind]
        assert KINDS[kind].row_values(rows.shape[1]) == 192
        assert dequantise(kind, rows).shape == (3, 192)

    def test_each_value_becomes_its_nearest_level(self):
        values = normal(8, 512)
        found = decode(encode(values))
        # Nearest in float32: an exact tie may go either way.
        np.testing.assert_allclose(found, nearest(values, absmax(values)), rtol=1e-6)

    def test_error_on_normal_data(self):
        """In standard deviations, over 262,144 values, beside NumPy's own.

        0.0728 in the mean is what bitsandbytes gives for blocks of 64.
        """
        values = normal()
        error = np.abs(decode(encode(values)) - values)
        other = np.abs(nearest(values, absmax(values)) - values)
        for power in (1, 2):
            means = [
                (e.astype(float) ** power).mean() ** (1 / power) for e in (error, other)
            ]
            np.testing.assert_allclose(*means, rtol=1e-6)
            # Deviation of a mean of so many errors: 0.06 / 512 = 1e-4.
            np.testing.assert_allclose(
                means[0], {1: 0.0728, 2: 0.0920}[power], atol=6e-4
            )

    def test_double_s_scales_are_off_by_half_a_step_at_most(self):
        values = normal(16, 4096)
        exact = absmax(values)
        rows = jax.jit(nf4.encode_double)(values)
        found = np.asarray(jax.jit(nf4.decode_double)(rows)).reshape(16, -1, 64)
        # Zero and both ends are levels, so the greatest magnitude is the scale.
        scale = np.abs(found).max(-1)
        step = (exact.max(-1) - exact.min(-1)) / 255
        assert (np.abs(scale - exact) <= 0.5001 * step[:, None]).all()
        np.testing.assert_allclose(
            found.reshape(values.shape), nearest(values, scale), rtol=1e-5
        )
        error = np.sqrt(((found.reshape(values.shape) - values) ** 2).mean())
        assert error < 0.0930  # 0.0920 with exact scales

    @pytest.mark.parametrize("kind", PACKERS)
    def test_zeros_ends_and_equal_scales(self, kind):
        """A block of zeros, a row of them, and rows whose scales are all the same."""
        values = np.zeros((3, 128), np.float32)
        values[0, 5], values[2, 7], values[2, 70] = -3.0, 2.0, -2.0
        rows = pack_rows(kind, values)
        np.testing.assert_allclose(dequantise(kind, rows), values, rtol=1e-6)


class TestPack:
    @pytest.mark.parametrize("kind", PACKERS)
    def test_maps_alone_are_packed_and_a_description_agrees(self, kind):
        params = random_params(dataclasses.replace(WIDE, qkv_bias=True))
        packed = quantised.pack(params, kind)
        described = quantised.abstract(params, kind)
        chex.assert_trees_all_equal_shapes_and_dtypes(packed, described)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            jax.eval_shape(lambda p: quantised.pack(p, kind), params), described
        )
        assert packed["head"] is params["head"]
        q = packed["blocks"]["attention"]["q"]
        assert q["bias"] is params["blocks"]["attention"]["q"]["bias"]
        opened = unpack(packed["blocks"], jnp.float32)
        kernel = params["blocks"]["mlp"]["down"]["kernel"]
        rows = np.asarray(dequantise(kind, pack_rows(kind, kernel[3].T)))
        opened = np.asarray(opened["mlp"]["down"]["kernel"])
        np.testing.assert_array_equal(opened[3], rows.T)
        again = quantised.pack(packed, kind)
        assert again["blocks"]["attention"]["q"]["packed"] is q["packed"]

    @pytest.mark.parametrize("kind", PACKERS)
    def test_squares_are_those_of_the_values(self, kind):
        params = random_params(WIDE)
        leaf = quantised.pack(params, kind)["blocks"]["mlp"]["up"]
        kernel = unpack({"up": leaf}, jnp.float32)["up"]["kernel"]
        expected = (np.asarray(kernel) ** 2).sum(1)
        for given in (leaf, {"kernel": kernel}):
            found = jax.jit(quantised.sum_squares)(given)
            np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"kind='Q4_K' .* among NF4, NF4_DOUBLE"):
            quantised.pack(random_params(WIDE), "Q4_K")
        message = "pack: map 'attention/k' has rows of 32 values, .* NF4 blocks of 64"
        with pytest.raises(ValueError, match=message):
            quantised.pack(random_params(TINY), "NF4")
        with pytest.raises(ValueError, match=r"abstract: .* NF4 blocks of 64"):
            quantised.abstract(random_params(TINY), "NF4")


def test_a_training_step_holds_two_maps_of_one_layer_at_full_width():
    """Compiled for an H200: however many layers, and packed bytes alone are saved.

    The recomputed block and its backward pass each hold one map, here of 16 MiB.
    """
    config = dataclasses.replace(
        zoo.get("tinyllama-1.1b"), vocab_size=512, layers=12, intermediate=4096
    )
    model = Decoder(config, dtype=jnp.bfloat16)
    lora = Lora(rank=2, base="nf4", maps=("q", "down"))
    program = step_program(lora, model, batch_size=1, seq_len=64)
    report = jmem.measure(program, target="h200", bounds=False)
    largest = config.hidden * config.intermediate * 2
    kernels = sum(
        leaf["kernel"].size * 2
        for part in ("attention", "mlp")
        for leaf in model.abstract()["blocks"][part].values()
    )
    # Scratch of products cut along their sums is the card's choice.
    temporaries = report.temp_bytes - report.by_kind["workspace"]
    assert 2 * largest < temporaries < 2.5 * largest < kernels / 16
