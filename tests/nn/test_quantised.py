"""Packed maps: the package's values bit for bit, one layer's kernels in memory."""

import dataclasses

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem
from jmem.finetune.adamw import AdamW
from jmem.finetune.lora import Lora
from jmem.generate.programs import decode_program
from jmem.kvcache.full import Full
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.nn import quantised
from jmem.nn.linear import dense
from jmem.nn.quantised import GGUF, KINDS, Q4_K_M

SCALES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00)
"""Float16: zeros, least and greatest subnormal, greatest, infinite, not a number."""


def random_rows(kind, rows, blocks, scales=None, seed=0) -> np.ndarray:
    """Packed rows of random bytes; every scale one of `scales`, if they are given."""
    nbytes = KINDS[kind].nbytes
    random = np.random.default_rng(seed)
    packed = random.integers(0, 256, (rows, blocks, nbytes)).astype(np.uint8)
    if scales is not None:
        drawn = random.choice(np.array(scales, "<u2"), (rows, blocks, 2))
        drawn = drawn.view(np.uint8)
        if kind == "Q6_K":  # its one scale is the last
            packed[..., -2:] = drawn[..., :2]
        else:
            count = 4 if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else 2
            packed[..., :count] = drawn[..., :count]
    return packed.reshape(rows, -1)


def tame_rows(kind, rows, width, seed=0) -> np.ndarray:
    """Packed rows whose values are of the order of one."""
    small = [0x1800, 0x1C00, 0x9A00]  # 0.002, 0.004 and -0.003
    return random_rows(kind, rows, width // KINDS[kind].values, small, seed)


def by_package(kind, rows) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", GGUF)
def test_values_are_the_packages_bit_for_bit(kind, strict_dtypes):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (
        KINDS[kind].values,
        KINDS[kind].nbytes,
    )
    packed = [random_rows(kind, 500, 3), random_rows(kind, 500, 3, SCALES)]
    packed = np.concatenate(packed)
    found = np.asarray(jax.jit(quantised.dequantise, static_argnums=0)(kind, packed))
    expected = by_package(kind, packed)
    nan = np.isnan(expected)
    assert 0.02 < nan.mean() < 0.5
    # Zeros keep their sign; of a NaN, which bits are set says nothing.
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(
        found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan]
    )


def mixed_leaf(width=512, outputs=6) -> tuple[dict, np.ndarray]:
    """A stacked leaf of two types with a bias, and its kernels [L, in, out]."""
    kinds = ["Q6_K", "Q4_K", "Q4_K"]
    rows = [tame_rows(kind, outputs, width, i) for i, kind in enumerate(kinds)]
    kernels = [by_package(kind, row).T for kind, row in zip(kinds, rows, strict=True)]
    longest = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, longest - row.shape[1]))) for row in rows]
    leaf = {
        "packed": jnp.array(np.stack(padded)),
        "kind": {k: jnp.array([k == kind for kind in kinds]) for k in set(kinds)},
        "bias": jnp.arange(3.0 * outputs).reshape(3, outputs),
    }
    return leaf, np.stack(kernels)


@pytest.mark.parametrize("shape", [(2, 3), (1, 1)], ids=["product", "one row"])
def test_a_map_whose_layers_differ_in_type_is_dense_s(shape, strict_dtypes):
    """In the scan, forward and in the gradient of x."""
    leaf, kernels = mixed_leaf()
    # Small, so that sines of the products are smooth.
    x = 1e-3 * jax.random.normal(jax.random.key(0), (*shape, kernels.shape[1]))

    def run(linear, leaf, x):
        def step(total, row):
            y = linear("down", row, x)
            return total + jnp.sum(jnp.sin(y)), y

        return jax.lax.scan(step, jnp.float32(0), leaf)

    def with_gradient(linear, leaf):
        loss = jax.value_and_grad(run, argnums=2, has_aux=True)
        return jax.jit(loss, static_argnums=0)(linear, leaf, x)

    (_, found), d_found = with_gradient(quantised.linear, leaf)
    wide = {"kernel": jnp.array(kernels), "bias": leaf["bias"]}
    (_, expected), d_expected = with_gradient(dense, wide)
    # Sums of 512 products, in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_found, d_expected, rtol=1e-5, atol=1e-4)

    opened = quantised.unpack({"mlp": {"down": leaf}}, jnp.float32)["mlp"]["down"]
    assert opened.keys() == {"kernel", "bias"}
    np.testing.assert_array_equal(opened["kernel"], kernels)


def test_an_input_of_another_width_is_refused():
    row = jax.tree.map(lambda x: x[0], mixed_leaf()[0])
    message = "map 'down' is 256 wide, but its rows of 420 bytes hold 512 values of Q4"
    with pytest.raises(ValueError, match=message):
        quantised.linear("down", row, jnp.ones((1, 256)))


@pytest.mark.parametrize("batch_size, kernels", [(1, 0.6), (4, 2.3)])
def test_one_layer_s_maps_are_dequantised_at_a_time(batch_size, kernels):
    """XLA neither hoists those of all layers out of the scan nor makes a block's early.

    A single row needs no kernel at all: its product is fused with what it reads. More
    rows need two, those of gate and up, which read the same x.
    """
    config = dataclasses.replace(zoo.get("llama3-8b"), layers=8)
    model = Decoder(config, dtype=jnp.bfloat16)
    params = quantised.abstract(model.abstract(), Q4_K_M)
    plan = Full().plan(model, prompt=64, new_tokens=0, batch_size=batch_size)
    program = decode_program(model, plan, params=params)
    report = jmem.measure(program, target="h200", bounds=False)
    given = sum(leaf.size * leaf.dtype.itemsize for *_, leaf in program.list_leaves())
    largest = config.hidden * config.intermediate * 2  # of 3.7 a layer, in bfloat16
    assert report.device_bytes - given < kernels * largest


class TestAbstract:
    def test_bytes_of_a_published_size(self):
        """Q4_K stores 256 values in 144 bytes; nothing but the maps changes."""
        model = Decoder(zoo.get("llama3-8b"), dtype=jnp.bfloat16)
        params = model.abstract()
        packed = quantised.abstract(params, "Q4_K")
        values = sum(
            leaf["kernel"].size
            for part in ("attention", "mlp")
            for leaf in params["blocks"][part].values()
        )
        stored = sum(
            leaf["packed"].size
            for part in ("attention", "mlp")
            for leaf in packed["blocks"][part].values()
        )
        assert stored == values // 256 * 144
        assert packed["head"] == params["head"]
        assert packed["embed"] == params["embed"]
        assert packed["blocks"]["mlp_norm"] == params["blocks"]["mlp_norm"]

    @pytest.mark.parametrize(
        "kind, message",
        [
            ({"q": "Q3_K"}, "map 'attention/q' is of type 'Q3_K', .* among Q4_0, Q4_1"),
            ({"q": "Q4_K"}, "'attention/q' has rows of 32 values, .* of 256.*Q8_0"),
            ({"wq": "Q8_0"}, r"names \['wq'\], which .* choose among attention/k, "),
        ],
        ids=["type", "block", "map"],
    )
    def test_refuses(self, kind, message):
        with pytest.raises(ValueError, match=message):
            quantised.abstract(random_params(TINY), kind)


@pytest.fixture(scope="module")
def packed_params():
    """`TINY` with every map in Q8_0 rows, whose values are those of no kernel."""
    params = random_params(TINY, scale=0.5)
    described = quantised.abstract(params, "Q8_0")

    def fill(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("/packed"):
            return jnp.ones(leaf.shape, bool)
        layers, outputs, nbytes = leaf.shape
        rows = tame_rows("Q8_0", layers * outputs, nbytes // 34 * 32, len(name))
        return jnp.array(rows.reshape(leaf.shape))

    blocks = {
        part: jax.tree_util.tree_map_with_path(fill, described["blocks"][part])
        for part in ("attention", "mlp")
    }
    return jax.tree.map(jnp.asarray, params | {"blocks": params["blocks"] | blocks})


class TestTraining:
    def test_lora_learns_over_a_packed_base(self, packed_params, tiny, random_batch):
        lora = Lora(rank=2, maps=("q", "down"), adamw=AdamW(learning_rate=1e-2))
        state = lora.init(tiny, packed_params, {}, jax.random.key(1))
        step = jax.jit(lora.step, static_argnums=0)
        losses, batch = [], random_batch(tiny)
        for _ in range(10):
            state, metrics = step(tiny, state, batch)
            losses.append(metrics["loss"])
        assert losses[-1] < losses[0] - 0.1
        chex.assert_trees_all_equal(state["params"], packed_params)

        merged = lora.merged(state)[0]["blocks"]
        for part, name in (("attention", "q"), ("mlp", "down"), ("mlp", "up")):
            leaf = packed_params["blocks"][part][name]
            rows = np.asarray(leaf["packed"])
            kernel = by_package("Q8_0", rows).swapaxes(1, 2)
            if name in lora.maps:
                pair = state["lora"][part][name]
                kernel = kernel + lora.scale * pair["lora_a"] @ pair["lora_b"]
            assert merged[part][name].keys() == {"kernel"}
            np.testing.assert_allclose(merged[part][name]["kernel"], kernel, atol=1e-5)

    def test_parameters_that_are_bytes_are_not_trained(self, packed_params):
        quantised.refuse_packed("Full", random_params(TINY))
        message = r"Full: blocks/attention/k/packed holds quantised bytes, .*Lora"
        with pytest.raises(ValueError, match=message):
            quantised.refuse_packed("Full", packed_params)
