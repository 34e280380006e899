"""Sparse maps in a decoder: generated with, trained over, streamed, saved, measured."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.finetune.lora import Lora
from jmem.generate.decode import generate
from jmem.generate.programs import decode_program
from jmem.kvcache.full import Full as FullCache
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.nn import pruned, quantised
from jmem.nn.joined import join_maps
from jmem.nn.linear import dense
from jmem.nn.pruned import FORMATS
from jmem.nn.stack import choose_options
from jmem.offload import on_host
from jmem.sparse import flash_llm
from jmem.sparse.magnitude import zero_smallest
from jmem.train.checkpoint import Checkpoints

WIDE = dataclasses.replace(TINY, hidden=96, heads=4, head_dim=24, intermediate=130)
"""No map of it is whole tiles, and every one is smaller packed at 80 %."""


def prune(params, sparsity=0.8):
    """The kernels of all maps with zeros."""
    blocks = jax.tree.map(
        lambda k: (
            np.stack([zero_smallest(w.T, sparsity).T for w in k]) if k.ndim == 3 else k
        ),
        params["blocks"],
    )
    return params | {"blocks": blocks}


@pytest.fixture(scope="module")
def model():
    return Decoder(WIDE)


@pytest.fixture(scope="module")
def zeroed():
    return jax.tree.map(jnp.asarray, prune(random_params(WIDE, scale=0.3)))


@pytest.fixture(scope="module")
def sparse(zeroed):
    params = flash_llm.pack(zeroed)
    kinds = {
        type(leaf["sparse"]).__name__
        for part in ("attention", "mlp")
        for leaf in params["blocks"][part].values()
    }
    assert kinds == {"FragBitmap"}
    return params


@pytest.mark.parametrize("kind", [*FORMATS, "int4"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1)], ids=["product", "one row"])
def test_a_stacked_map_is_dense_s(kind, shape, strict_dtypes):
    """In the scan, forward and in the gradient of x; with a bias."""
    random = np.random.default_rng(0)
    kernels = random.standard_normal((3, 70, 130)).astype(np.float16)
    kernels = np.stack([zero_smallest(w.T, 0.6).T for w in kernels])
    if kind == "int4":
        matrix = pruned.stack([pruned.frag_bitmap.pack(w.T, "int4") for w in kernels])
        layers = [pruned.take_layer(matrix, layer) for layer in range(3)]
        wide = np.stack([pruned.frag_bitmap.unpack(one).T for one in layers])
    else:
        matrix = pruned.stack([FORMATS[kind].pack(w.T) for w in kernels])
        wide = kernels
    bias = jnp.asarray(random.standard_normal((3, 130)), jnp.float32)
    leaf = {"sparse": jax.tree.map(jnp.asarray, matrix), "bias": bias}
    plain = {"kernel": jnp.asarray(wide, jnp.float32), "bias": bias}
    assert quantised.find_kernel_shape(leaf) == kernels.shape
    x = 0.1 * jax.random.normal(jax.random.key(0), (*shape, 70))

    def run(linear, leaf, x):
        def step(total, row):
            y = linear("up", row, x)
            return total + jnp.sum(jnp.sin(y)), y

        return jax.lax.scan(step, jnp.float32(0), leaf)

    def with_gradient(linear, leaf):
        loss = jax.value_and_grad(run, argnums=2, has_aux=True)
        return jax.jit(loss, static_argnums=0)(linear, leaf, x)

    (_, found), d_found = with_gradient(quantised.linear, leaf)
    (_, expected), d_expected = with_gradient(dense, plain)
    # Sums of 70 and of 390 products of the order of 1, in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_found, d_expected, rtol=1e-5, atol=1e-4)

    opened = quantised.unpack({"mlp": {"up": leaf}}, jnp.float32)["mlp"]["up"]
    assert opened.keys() == {"kernel", "bias"}
    np.testing.assert_array_equal(opened["kernel"], plain["kernel"])
    squares = quantised.sum_squares(leaf)
    np.testing.assert_allclose(squares, np.square(plain["kernel"]).sum(1), rtol=1e-5)


def test_an_input_of_another_width_is_refused(sparse):
    leaf = jax.tree.map(lambda x: x[0], sparse["blocks"]["mlp"]["down"])
    with pytest.raises(ValueError, match=r"map 'down' is 96 wide, .* has 130 inputs"):
        quantised.linear("down", leaf, jnp.ones((1, 96)))


def test_a_sparse_model_generates_what_its_zeros_do(model, zeroed, sparse):
    """From blocks in host memory, whose rows are fetched as they are used."""
    prompts = [[3, 1, 4, 1, 5]]
    expected = generate(model, zeroed, prompts, max_new_tokens=4)
    hosted = sparse | {"blocks": on_host(sparse["blocks"])}
    assert generate(model, hosted, prompts, max_new_tokens=4) == expected


class TestTraining:
    def test_lora_learns_over_a_sparse_base(self, model, zeroed, sparse, random_batch):
        """Which stays; what is merged are its kernels and the products."""
        lora = Lora(rank=2, maps=("q", "down"), adamw=AdamW(learning_rate=1e-2))
        state = lora.init(model, sparse, {}, jax.random.key(1))
        step, losses = jax.jit(lora.step, static_argnums=0), []
        for _ in range(10):
            state, metrics = step(model, state, random_batch(model))
            losses.append(metrics["loss"])
        assert losses[-1] < losses[0] - 0.1
        chex.assert_trees_all_equal(state["params"], sparse)
        merged = lora.merged(state)[0]["blocks"]
        assert merged["mlp"]["up"].keys() == {"kernel"}
        pair = state["lora"]["mlp"]["down"]
        kernel = zeroed["blocks"]["mlp"]["down"]["kernel"]
        kernel = kernel + lora.scale * pair["lora_a"] @ pair["lora_b"]
        np.testing.assert_allclose(merged["mlp"]["down"]["kernel"], kernel, atol=1e-5)

    def test_a_state_over_a_sparse_base_is_saved_and_restored(
        self, model, sparse, tmp_path
    ):
        state = Lora(rank=2).init(model, sparse, {}, jax.random.key(1))
        with Checkpoints(tmp_path) as kept:
            kept.save(3, state, data="any")
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        with Checkpoints(tmp_path) as kept:
            step, found = kept.restore(like, data="any")
        assert step == 3
        chex.assert_trees_all_equal(found, state)

    def test_what_trains_the_weights_themselves_refuses(self, model, sparse):
        message = (
            r"Full: blocks/attention/k/sparse/values holds a sparse matrix's .*Lora"
        )
        with pytest.raises(ValueError, match=message):
            Full().init(model, sparse, {}, jax.random.key(0))

    def test_options_that_read_kernels_in_place_are_left_out(self, sparse):
        assert choose_options(sparse) == {}


def test_sparse_maps_are_not_joined(sparse):
    assert join_maps(sparse["blocks"]).keys() == sparse["blocks"].keys()


def test_one_map_at_a_time_is_expanded():
    """XLA neither hoists those of all layers out of the scan nor makes a block's early,
    nor gate and up at once, which read the same x. Without the kernel.
    """
    config = dataclasses.replace(zoo.get("llama3-8b"), layers=2)
    model = Decoder(config, dtype=jnp.bfloat16)
    params = flash_llm.abstract(model.abstract(), 0.6, values="int4")
    plan = FullCache().plan(model, prompt=64, new_tokens=0, batch_size=8)
    program = decode_program(model, plan, params=params)
    report = jmem.measure(program, target="h200", bounds=False)
    given = sum(leaf.size * leaf.dtype.itemsize for *_, leaf in program.list_leaves())
    largest = config.hidden * config.intermediate * 2
    assert report.device_bytes - given < 1.9 * largest
    assert report.by_label["weights"] == pruned.count_bytes(params)
