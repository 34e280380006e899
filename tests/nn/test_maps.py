"""Linear maps are named by their whole path, so that a block may have two of a name."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY

from jmem.data.batch import Batch
from jmem.finetune.adamw import AdamW
from jmem.finetune.adapters import attach
from jmem.finetune.layerwise import make_slot_gradients
from jmem.finetune.lisa import Lisa
from jmem.finetune.lora import Lora, lora_linear
from jmem.finetune.mixlora import MixLora, Mixture
from jmem.models.decoder import Decoder
from jmem.nn import quantised
from jmem.nn.attention import Attention
from jmem.nn.linear import dense
from jmem.nn.maps import MAPS, choose_maps, find_maps
from jmem.nn.mlp import MLP
from jmem.nn.rope import Rope
from jmem.nn.stack import run_stack
from jmem.sharding import find_rule

SMALL = dataclasses.replace(TINY, layers=2, head_dim=4, intermediate=24)
PLACES = ("attention", "cross")


class CrossBlock(nn.Module):
    """Two attentions, one after the other, and an MLP: eleven maps, seven last words.

    The second attends the same sequence; to its maps it makes no difference.
    """

    @nn.compact
    def __call__(self, x, positions, layer, ops, carry):
        for name in PLACES:
            attention = Attention(4, 2, 4, Rope(head_dim=4), name=name)
            out, carry = attention(x, positions, layer, ops, carry)
            x = x + out
        out, aux = MLP(24, name="mlp")(x, ops)
        return x + out, carry, aux


class CrossDecoder(Decoder):
    @functools.cached_property
    def stacked_block(self):
        return CrossBlock(parent=None)


@pytest.fixture(scope="module")
def model():
    return CrossDecoder(SMALL)


@pytest.fixture(scope="module")
def params(model):
    """Larger than they begin, so that what q says is heard."""
    return jax.jit(lambda key: jax.tree.map(lambda leaf: 8 * leaf, model.init(key)))(
        jax.random.key(0)
    )


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(0, 48, (2, 9)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((2, 8), np.float32))


def outputs(model, blocks, ops):
    """Of the stack, for inputs that are always the same."""
    shape = (2, 5, SMALL.hidden)
    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    positions = np.broadcast_to(np.arange(5, dtype=np.int32), (2, 5))
    run = jax.jit(lambda b, x, at: run_stack(model.block, b, x, at, ops)[0])
    return np.asarray(run(blocks, x, positions))


@pytest.mark.parametrize("chunk", [None, 2], ids=["whole", "in chunks"])
def test_every_product_is_named_by_its_path(tiny, chunk):
    told = []

    def linear(name, leaf, x):
        told.append(name)
        return dense(name, leaf, x)

    config = dataclasses.replace(SMALL, layers=1)
    model = Decoder(config, linear=linear, chunk=chunk)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def logits(params, x):
        positions = jnp.zeros((1, 5), jnp.int32)
        x = run_stack(model.block, params["blocks"], x, positions, model.ops)[0]
        return model.head(params, x, model.ops)

    jax.eval_shape(logits, params, jnp.zeros((1, 5, config.hidden)))
    names = [f"attention/{n}" for n in "qkvo"] + ["mlp/gate", "mlp/up", "mlp/down"]
    assert set(told) == {*names, "head"}
    assert find_maps(params["blocks"]).keys() == set(names)


def test_a_module_applied_by_itself_is_named_by_who_applies_it(tiny):
    """As a vision tower is, whose blocks have a q of their own."""
    told = set()

    def linear(name, leaf, x):
        told.add(name)
        return dense(name, leaf, x)

    ops = tiny.ops._replace(linear=linear).prefix_names("vision")
    MLP(4).init(jax.random.key(0), jnp.ones((1, 2)), ops)
    assert told == {"vision/gate", "vision/up", "vision/down"}


class TestLora:
    def test_one_of_two_maps_of_a_name_is_adapted(self, model, params, batch):
        """Its product alone changes, as if merged into that kernel; steps train it."""
        lora = Lora(rank=2, maps=("cross/q",), adamw=AdamW(learning_rate=1e-2))
        state = lora.init(model, params, {}, jax.random.key(1))
        assert set(find_maps(params["blocks"])) > {"attention/q", "cross/q"}
        step = jax.jit(lora.step, static_argnums=0)
        losses = []
        for _ in range(6):
            state, metrics = step(model, state, batch)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0]
        assert jax.tree.map(jnp.ndim, state["lora"]) == {
            "cross": {"q": {"lora_a": 3, "lora_b": 3}}
        }

        merged = lora.merged(state)[0]["blocks"]
        before, after = (
            find_maps(jax.device_get(blocks)) for blocks in (params["blocks"], merged)
        )
        moved = {
            name
            for name, leaf in after.items()
            if (leaf["kernel"] != before[name]["kernel"]).any()
        }
        assert moved == {"cross/q"}
        ops = model.ops._replace(linear=lora_linear(lora.scale))
        adapted = outputs(model, attach(params["blocks"], state["lora"]), ops)
        np.testing.assert_allclose(adapted, outputs(model, merged, ops), atol=1e-5)
        assert (adapted != outputs(model, params["blocks"], ops)).any()

    def test_a_short_name_means_both_and_each_starts_on_its_own(self, params):
        """With what the decoder's own q always started with."""
        blocks, key = params["blocks"], jax.random.key(1)
        both = Lora(rank=2, maps=("q",)).adapters(blocks, key)
        a, b = (both[place]["q"]["lora_a"] for place in PLACES)
        assert (a != b).all()
        alone = {"attention": blocks["attention"]}
        chex.assert_trees_all_equal(
            Lora(rank=2, maps=("q", "k")).adapters(alone, key)["attention"]["q"],
            both["attention"]["q"],
        )
        bound = SMALL.hidden**-0.5
        drawn = jax.random.uniform(
            *(jax.random.fold_in(key, 0), a.shape), minval=-bound, maxval=bound
        )
        np.testing.assert_array_equal(a, drawn)

    def test_dora_and_dropout_know_both(self, model, params, batch):
        lora = Lora(rank=2, dora=True, dropout=0.5, maps=("q", "cross/*"))
        state = lora.init(model, params, {}, jax.random.key(1))
        names = {"attention/q", *(f"cross/{name}" for name in "qkvo")}
        assert find_maps(state["lora"]).keys() == set()  # they are no kernels
        found = {f"{place}/{n}" for place, own in state["lora"].items() for n in own}
        assert found == names
        _, metrics = jax.jit(lora.step, static_argnums=0)(model, state, batch)
        assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("leaf", ["kernel", "lora_a", "lora_b", "packed"])
def test_a_mesh_divides_both_alike(leaf):
    one, other = (find_rule(f"blocks/{place}/q/{leaf}") for place in PLACES)
    assert one is other is not None


def test_packed_maps_are_those_of_both_places(params):
    packed = quantised.abstract(params, {"cross/q": "Q8_0"} | {"up": "Q4_0"})
    kept = quantised.abstract(params, {})
    assert find_maps(kept["blocks"]).keys() == find_maps(params["blocks"]).keys()
    quantised_maps = {
        name for name, leaf in find_maps(packed["blocks"]).items() if "packed" in leaf
    }
    assert quantised_maps == {"cross/q", "mlp/up"}


def test_mixtures_adapt_both_attentions_and_mix_the_mlp(params):
    mixture = Mixture(rank=2, experts=3, maps=("cross/q", "q", "mlp/up"))
    adapters = MixLora(mixtures=(mixture,)).adapters(
        params["blocks"], jax.random.key(0)
    )
    ranks = {
        f"{part}/{name}": leaf["lora_a"].shape[-1]
        for part, leaves in adapters.items()
        for name, leaf in leaves.items()
        if name != "router"
    }
    assert ranks == {"attention/q": 2, "cross/q": 2, "mlp/up": 6}
    with pytest.raises(ValueError, match="names no map of these blocks' MLPs"):
        MixLora(mixtures=(dataclasses.replace(mixture, maps=("cross/*",)),)).adapters(
            params["blocks"], jax.random.key(0)
        )


def test_a_fused_step_tells_both_apart(model, params, batch):
    """Weights and loss after two steps are those of the step that is not fused."""
    adamw = AdamW(learning_rate=1e-2, max_grad_norm=0, eps=1e-2)
    found = []
    for update in ("separate", "fused"):
        lisa = Lisa(update=update, adamw=adamw, active_layers=1)
        state = lisa.init(model, params, {}, jax.random.key(1))
        step = jax.jit(lisa.step, static_argnums=0)
        state, _ = step(model, state, batch)
        state, metrics = step(model, state, batch)
        found.append((lisa.merged(state)[0], metrics["loss"]))
    chex.assert_trees_all_close(*found, atol=1e-6, rtol=2e-5)
    both = [
        (found[1][0]["blocks"][place]["q"]["kernel"], params["blocks"][place]["q"])
        for place in PLACES
    ]
    assert all((new != old["kernel"]).any() for new, old in both)


class TwiceBlock(CrossBlock):
    """One map is read twice."""

    @nn.compact
    def __call__(self, x, positions, layer, ops, carry):
        attention = Attention(4, 2, 4, Rope(head_dim=4), name="attention")
        for _ in range(2):
            out, carry = attention(x, positions, layer, ops, carry)
            x = x + out
        return x, carry, {}


class TwiceDecoder(Decoder):
    @functools.cached_property
    def stacked_block(self):
        return TwiceBlock(parent=None)


def test_gradients_of_a_map_that_is_read_twice_are_those_of_both_readings(batch):
    model = TwiceDecoder(SMALL)
    params = jax.jit(model.init)(jax.random.key(0))
    active = jnp.array([1])

    @jax.jit
    def compute(params, batch):
        whole = jax.grad(lambda p: model.loss(p, {}, batch)[0])(params)
        return make_slot_gradients(model, params, batch, active)[2], whole["blocks"]

    found, whole = compute(params, batch)
    wanted = jax.tree.map(lambda leaf: leaf[[1]], jax.device_get(whole))
    chex.assert_trees_all_close(found, wanted, atol=1e-6, rtol=2e-5)


def test_a_fused_step_refuses_a_map_that_is_read_twice(batch):
    """It would keep the second reading's gradient only."""
    model = TwiceDecoder(SMALL)
    lisa = Lisa(update="fused", adamw=AdamW(max_grad_norm=0), active_layers=1)
    state = jax.eval_shape(
        lambda key: lisa.init(model, model.init(key), {}, key), jax.random.key(0)
    )
    with pytest.raises(ValueError, match=r"reads the linear map 'attention/.' 2 times"):
        jax.eval_shape(functools.partial(lisa.step, model), state, batch)


NAMES = (
    *(f"attention/{name}" for name in "qkvo"),
    *(f"cross/{name}" for name in "qkvo"),
    *("mlp/gate", "mlp/up", "mlp/down"),
)
CHOICES = {
    ("q",): {"attention/q", "cross/q"},
    ("cross/q",): {"cross/q"},
    ("blocks/cross/q",): {"cross/q"},
    ("cross", "up"): {"cross/q", "cross/k", "cross/v", "cross/o", "mlp/up"},
    ("*/[qv]",): {"attention/q", "attention/v", "cross/q", "cross/v"},
    MAPS: set(NAMES),
}


@pytest.mark.parametrize("patterns", CHOICES, ids=str)
def test_patterns_choose(patterns):
    chosen = choose_maps(patterns, NAMES, "maps")
    assert set(chosen) == CHOICES[patterns]
    assert list(chosen) == [name for name in NAMES if name in chosen]  # each once


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("cros/q",), r"maps names \['cros/q'\], .* choose among .* mean 'cross/q'"),
        (("q", "cross/qq"), r"maps names \['cross/qq'\]"),
        (("att/*",), r"\['att/\*'\], which these blocks don't have"),
        (("blocks/crosss",), r"did you mean 'cross'"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused_with_the_nearest(patterns, message):
    with pytest.raises(ValueError, match=message):
        choose_maps(patterns, NAMES, "maps")


def test_the_default_asks_for_no_map_that_is_not_there():
    plain = [name for name in NAMES if name != "mlp/gate"]
    assert choose_maps(MAPS, plain, "maps") == tuple(plain)
    with pytest.raises(ValueError, match="these blocks don't have"):
        choose_maps(MAPS, ["attention/qkv"], "maps")


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (("query",), "named by their path, like 'cross/q'"),
        (("gat",), "Did you mean 'gate'"),
        ((), "at least one map"),
        (("cross/q", "cross/q"), "each once"),
    ],
)
def test_refuses_before_blocks_are_there(maps, message):
    for make in (Lora, Mixture):
        with pytest.raises(ValueError, match=f"{make.__name__}: .*{message}"):
            make(maps=maps)
