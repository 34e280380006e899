"""LoRA: the low-rank product's own gradients, the adapters, refusals."""

# pyright: reportPossiblyUnboundVariable=false, reportOptionalMemberAccess=false
# loops that run; plans of programs that compiled

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.finetune.adamw import AdamW
from jmem.finetune.adapters import attach
from jmem.finetune.lora import (
    MAPS,
    Lora,
    drop_out,
    dropout_keys,
    lora_linear,
    multiply_low_rank,
)
from jmem.finetune.program import step_program
from jmem.models.decoder import Decoder
from jmem.models.next_token import next_token_loss
from jmem.targets import resolve


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_low_rank_has_the_gradients_of_its_formula(scale):
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (jax.random.normal(k, (2, 7, n)) for k, n in zip(keys, (6, 5)))
    a = jax.random.normal(keys[2], (6, 3))
    b = jax.random.normal(keys[3], (3, 5))
    expected, transpose = jax.vjp(lambda x, a, b: scale * (x @ a @ b), x, a, b)
    found, ours = jax.vjp(lambda x, a, b: multiply_low_rank(x, a, b, scale), x, a, b)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(ours(dy), transpose(dy), rtol=1e-5, atol=1e-6)


def test_adapters_start_as_the_paper_says(tiny_params):
    lora = Lora(rank=4, alpha=8.0)
    adapters = lora.adapters(tiny_params["blocks"], jax.random.key(0))
    assert {*adapters["attention"], *adapters["mlp"]} == set(MAPS)
    down = adapters["mlp"]["down"]
    assert down["lora_a"].shape == (5, 64, 4)
    assert down["lora_b"].shape == (5, 4, 32)
    assert 0.9 * 64**-0.5 < np.abs(down["lora_a"]).max() <= 64**-0.5
    assert not down["lora_b"].any()
    assert lora.scale == 2.0


def test_other_maps_leave_a_map_s_adapter_as_it_was(tiny_params):
    blocks, key = tiny_params["blocks"], jax.random.key(3)
    alone = Lora(maps=("v",)).adapters(blocks, key)
    chex.assert_trees_all_equal(
        alone["attention"]["v"], Lora().adapters(blocks, key)["attention"]["v"]
    )


def test_attach_adds_leaves_and_copies_none(tiny_params):
    blocks = tiny_params["blocks"]
    leaf = {"lora_a": jnp.ones(1), "lora_b": jnp.ones(1)}
    both = attach(blocks, {"mlp": {"up": leaf}})
    assert both["mlp"]["up"]["kernel"] is blocks["mlp"]["up"]["kernel"]
    assert both["mlp"]["up"].keys() == {"kernel", "lora_a", "lora_b"}
    assert "lora_a" not in blocks["mlp"]["up"]


@pytest.mark.parametrize(
    ("rank", "alpha", "plain", "stabilised"), [(4, 8.0, 2.0, 4.0), (64, 16.0, 0.25, 2)]
)
def test_rslora_divides_by_the_root_of_the_rank(rank, alpha, plain, stabilised):
    """Kalajdzievski 2023; the scale is all that differs, merged weights included."""
    assert Lora(rank=rank, alpha=alpha).scale == plain
    assert Lora(rank=rank, alpha=alpha, rslora=True).scale == stabilised


class TestTrainedBefore:
    def test_init_goes_on_with_given_adapters_in_the_kernels_dtype(self, tiny_params):
        lora = Lora(rank=2, maps=("q", "up"))
        given = lora.adapters(tiny_params["blocks"], jax.random.key(7))
        half = jax.tree.map(lambda x: np.asarray(x, np.float16), given)
        state = lora.init(None, tiny_params, {}, jax.random.key(0), half)
        expected = jax.tree.map(lambda x: x.astype(np.float32), half)
        chex.assert_trees_all_equal_shapes_and_dtypes(state["lora"], given)
        chex.assert_trees_all_equal(state["lora"], expected)
        assert not any(leaf.any() for leaf in jax.tree.leaves(state["optimizer"]))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 3}, r"q/lora_a with shape \(5, 32, 3\), .* need \(5, 32, 2\)\."),
            ({"maps": ("q", "k")}, r"k/lora_a with shape \(5, 32, 2\), .* need None"),
            ({"maps": ("k",)}, r"k/lora_a with shape \(5, 32, 2\), .* need None"),
        ],
    )
    def test_adapters_that_do_not_fit_are_refused(self, tiny_params, settings, message):
        other = Lora(**{"rank": 2, "maps": ("q",)} | settings)
        given = other.adapters(tiny_params["blocks"], jax.random.key(0))
        lora = Lora(rank=2, maps=("q",))
        with pytest.raises(ValueError, match=message):
            lora.init(None, tiny_params, {}, jax.random.key(0), given)


class TestDropout:
    def test_keeps_the_mean_and_drops_the_share(self):
        x = jnp.full((100, 1000), 3.0)
        out = drop_out(x, 0.25, jax.random.key(0))
        # Five standard deviations of a share of 100,000 draws.
        assert abs(float((out == 0).mean()) - 0.25) < 5 * (0.25 * 0.75 / 1e5) ** 0.5
        np.testing.assert_allclose(np.unique(out), [0, 4])

    def test_only_the_products_input_is_dropped(self):
        x, kernel, a, b = (
            jax.random.normal(key, shape)
            for key, shape in zip(
                jax.random.split(jax.random.key(1), 4),
                [(2, 7, 6), (6, 5), (6, 3), (3, 5)],
            )
        )
        leaf = {"kernel": kernel, "lora_a": a, "lora_b": b}
        leaf["lora_key"] = jax.random.key(5)
        found = lora_linear(2.0, 0.5)("q", leaf, x)
        kept = np.asarray(jax.random.bernoulli(jax.random.key(5), 0.5, x.shape))
        expected = x @ kernel + 2.0 * ((np.asarray(x) * kept / 0.5) @ a @ b)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    def test_every_layer_and_map_has_a_key_of_its_own(self, tiny_params):
        adapters = Lora().adapters(tiny_params["blocks"], jax.random.key(0))
        keys = jax.tree.leaves(dropout_keys(adapters, jax.random.key(0)))
        words = np.concatenate([jax.random.key_data(key) for key in keys])
        assert len(np.unique(words, axis=0)) == len(MAPS) * 5

    def test_a_step_draws_anew_and_repeats_itself(
        self, tiny, tiny_params, random_batch
    ):
        """The loss of the adapters as they are, under each step's draw."""
        lora = Lora(rank=2, dropout=0.5, adamw=AdamW(learning_rate=0.0))
        adapters = jax.tree.map(
            lambda x: jnp.full_like(x, 0.1),
            lora.adapters(tiny_params["blocks"], jax.random.key(0)),
        )
        batch = random_batch(tiny)
        step = jax.jit(lambda state: lora.step(tiny, state, batch))

        def losses(seed):
            key = jax.random.key(seed)
            state, found = lora.init(tiny, tiny_params, {}, key, adapters), []
            for _ in range(3):
                state, metrics = step(state)
                found.append(float(metrics["loss"]))
            return found

        assert losses(0) == losses(0)
        assert len({*losses(0), *losses(1)}) == 6
        plain = next_token_loss(
            tiny,
            tiny_params | {"blocks": attach(tiny_params["blocks"], adapters)},
            batch,
            tiny.ops._replace(linear=lora_linear(lora.scale)),
        )
        assert float(plain) not in losses(0)

    def test_without_dropout_the_state_has_no_key(self, tiny_params):
        assert "key" not in Lora().init(None, tiny_params, {}, jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"alpha": 0.0}, r"alpha=0.0 must be positive"),
        ({"alpha": float("nan")}, r"alpha=nan must be positive"),
        ({"dropout": 1.0}, r"dropout=1.0 must be at least 0 and below 1"),
        ({"dropout": -0.1}, r"dropout=-0.1 must be"),
        ({"maps": ("q", "gates")}, "names 'gates'.*Did you mean 'gate'"),
        ({"maps": ()}, r"maps=\(\) must name at least one"),
        ({"maps": ("q", "q")}, "each once"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)


def test_a_base_whose_rows_are_no_whole_blocks_is_refused(tiny_params):
    message = r"'attention/k' has rows of 32 values, .* NF4 blocks of 64.*in 16 bits"
    with pytest.raises(ValueError, match=message):
        Lora(base="nf4").init(None, tiny_params, {}, jax.random.key(0))


class TestPlainMLP:
    """A block whose MLP is not gated, as GPT-2's."""

    def blocks(self, tiny_params):
        mlp = {n: leaf for n, leaf in tiny_params["blocks"]["mlp"].items()}
        del mlp["gate"]
        return tiny_params["blocks"] | {"mlp": mlp}

    def test_the_default_adapts_the_maps_there_are(self, tiny_params):
        adapters = Lora().adapters(self.blocks(tiny_params), jax.random.key(0))
        assert adapters["mlp"].keys() == {"up", "down"}

    def test_a_map_that_is_not_there_is_refused(self, tiny_params):
        with pytest.raises(ValueError, match=r"\['gate'\], which these blocks don't"):
            Lora(maps=("q", "gate")).adapters(
                self.blocks(tiny_params), jax.random.key(0)
            )


class TestFused:
    """Adapters that move inside the backward pass."""

    ADAMW = AdamW(
        learning_rate=3e-3,
        eps=1e-3,  # Adam does not blow up what rounding makes of vanishing gradients
        max_grad_norm=0.0,
        layer_decay=0.8,
        rates=(("*/lora_b", 4.0),),
    )

    def test_equals_separate(self, tiny, tiny_params, random_batch):
        ends = []
        for update in ("fused", "separate"):
            lora = Lora(rank=2, dropout=0.2, dora=True, adamw=self.ADAMW, update=update)
            params = jax.tree.map(jnp.copy, tiny_params)
            state = lora.init(tiny, params, {}, jax.random.key(1))
            step = jax.jit(functools.partial(lora.step, tiny), donate_argnums=0)
            for seed in range(3):
                state, metrics = step(state, random_batch(tiny, seed))
            ends.append((state["lora"], state["optimizer"], metrics))
        chex.assert_trees_all_close(*ends, rtol=1e-4, atol=1e-6)

    def test_auto_fuses_where_nothing_waits_for_all_gradients(self, tiny):
        unclipped = Lora(adamw=self.ADAMW)
        assert unclipped.fuses(tiny)
        assert not unclipped.fuses(dataclasses.replace(tiny, remat="none"))
        assert not Lora(adamw=AdamW()).fuses(tiny)
        assert not dataclasses.replace(unclipped, accumulate=2).fuses(tiny)

    @pytest.mark.parametrize("given", [{"adamw": AdamW()}, {"accumulate": 2}], ids=str)
    def test_refuses_what_waits_for_all_gradients(self, given):
        given = {"adamw": self.ADAMW} | given
        with pytest.raises(ValueError, match="update='fused' moves adapters before"):
            Lora(update="fused", **given)

    def test_holds_gradients_of_one_layer(self, tiny_config):
        """Compiled for an H200: temporaries fall by the other layers' adapters."""
        config = dataclasses.replace(tiny_config, layers=40, hidden=256, head_dim=64)
        model = Decoder(config, dtype=jnp.bfloat16)

        def temporaries(update):
            lora = Lora(rank=64, adamw=self.ADAMW, update=update)
            program = step_program(lora, model, batch_size=1, seq_len=64)
            return program.compile(resolve("h200")).memory_analysis().temp_size_in_bytes

        blocks = model.abstract()["blocks"]
        lora = jax.eval_shape(Lora(rank=64).adapters, blocks, jax.random.key(0))
        gradients = sum(2 * leaf.size for leaf in jax.tree.leaves(lora))
        saved = temporaries("separate") - temporaries("fused")
        assert saved > 0.9 * gradients
