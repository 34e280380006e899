"""The experts' MLP: official arrays, its two identities, routing and balance."""

import dataclasses
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.finetune import mixture as module
from jmem.finetune.mixture import (
    Experts,
    choose,
    compute_imbalance,
    measure_traffic,
    mixture,
)
from jmem.finetune.mixture_ops import MixtureFeed
from jmem.nn.mlp import ACTIVATIONS

TOLERANCE = 2e-5  # of the golden file, float32
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
HIDDEN = ("gate", "up", "down")


def side_by_side(a, b):
    """Torch's A [E, r, in] and B [E, out, r] as ours, of one mixture."""
    experts, rank, inputs = a.shape
    lora_a = a.transpose(2, 0, 1).reshape(inputs, experts * rank)
    lora_b = b.transpose(0, 2, 1).reshape(experts * rank, -1)
    return {"lora_a": jnp.array(lora_a[None]), "lora_b": jnp.array(lora_b[None])}


@pytest.fixture(scope="module")
def found():
    g = np.load(GOLDEN / "mixlora__ffn_top2.npz")
    config = json.loads(str(g["config"]))
    leaves: dict = {
        name: {"kernel": jnp.array(g[f"w_{name}"].T)}
        | side_by_side(g[f"lora_a_{name}"], g[f"lora_b_{name}"])
        for name in HIDDEN
    }
    leaves["router"] = {"kernel": jnp.array(g["router"].T[None])}
    feed = MixtureFeed((2.0,), (8,), "top_k", (2,), (1.0,))
    real = jnp.array(g["attention_mask"]) > 0
    coefficient = 0.01

    def objective(leaves, x):
        y, aux = feed(leaves, x, ACTIVATIONS["silu"], real)
        aux = {name: value[None] for name, value in aux.items()}
        balance = coefficient * compute_imbalance(**aux, experts=(8,), over="global")[0]
        return jnp.sum(y * g["gy"]) + balance, (y, balance, aux)

    out, gradients = jax.jit(
        jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    )(leaves, jnp.array(g["x"]))
    return g, config, leaves, feed, out[1], gradients


@pytest.mark.compat
class TestOfficialArrays:
    def test_output(self, found):
        g, *_, (y, _, _), _ = found
        np.testing.assert_allclose(y, g["y"], atol=TOLERANCE)

    def test_choices(self, found):
        g, _, leaves, feed, *_ = found
        x = jnp.array(g["x"]).reshape(1, 24, 32)
        logits = feed.compute_logits(leaves["router"]["kernel"], x, None)
        np.testing.assert_allclose(logits[0], g["router_logits"], atol=TOLERANCE)
        chosen, weights, _ = choose(logits, router="top_k", top_k=(2,), top_p=(1.0,))
        np.testing.assert_array_equal(chosen[0], g["topk_idx"])
        np.testing.assert_allclose(weights[0], g["topk_weight"], atol=TOLERANCE)

    def test_balance(self, found):
        g, *_, (_, balance, _), _ = found
        np.testing.assert_allclose(balance, g["aux_loss"], rtol=TOLERANCE)

    def test_balance_without_a_mask_and_over_two_layers(self, found):
        g = found[0]
        mask = jnp.array(g["attention_mask"]).reshape(1, 24) > 0
        rows = jnp.array(g["router_logits"])[None]

        def of(logits, real):
            routed = choose(logits, router="top_k", top_k=(2,), top_p=(1.0,))
            return measure_traffic(*routed, real)

        everything = of(rows, jnp.ones_like(mask))
        two = jax.tree.map(
            lambda *own: jnp.stack(own), of(rows, mask), of(rows[:, ::-1], mask)
        )
        one = jax.tree.map(lambda leaf: leaf[None], everything)
        for aux, key in ((one, "aux_loss_nomask"), (two, "aux_loss_2layers")):
            balance = 0.01 * compute_imbalance(**aux, experts=(8,), over="global")[0]
            np.testing.assert_allclose(balance, g[key], rtol=TOLERANCE)

    def test_every_gradient(self, found):
        g, *_, (d_leaves, dx) = found
        np.testing.assert_allclose(dx, g["dx"], atol=TOLERANCE)
        d_router = d_leaves["router"]["kernel"][0].T
        np.testing.assert_allclose(d_router, g["d_router"], atol=TOLERANCE)
        for name in HIDDEN:
            wanted = side_by_side(g[f"d_lora_a_{name}"], g[f"d_lora_b_{name}"])
            for half in ("lora_a", "lora_b"):
                np.testing.assert_allclose(
                    d_leaves[name][half], wanted[half], atol=TOLERANCE, err_msg=name
                )


class Small:
    """A random mixture: J models, N tokens, and everything that `mixture` takes."""

    def __init__(self, experts=4, rank=3, models=2, tokens=7, slots=2, seed=0):
        random = np.random.default_rng(seed)

        def draw(*shape):
            return jnp.array(random.standard_normal(shape), jnp.float32) * 0.5

        sizes = {"gate": (8, 12), "up": (8, 12), "down": (12, 8)}
        self.base = {name: {"kernel": draw(*size)} for name, size in sizes.items()}
        self.adapters = {
            name: (draw(models, a, experts * rank), draw(models, experts * rank, b))
            for name, (a, b) in sizes.items()
        }
        self.x, logits = draw(models, tokens, 8), draw(models, tokens, experts)
        self.static = Experts(experts, (0.5, 2.0)[:models], jax.nn.silu, True)
        self.chosen, self.weights, _ = choose(
            logits, router="top_k", top_k=(slots,) * models, top_p=(1.0,) * models
        )
        self.rank = rank

    @property
    def given(self):
        return self.x, self.chosen, self.weights, self.adapters, self.base, None

    def by_token(self, x, weights, adapters, static=None):
        """Every token and slot alone, one expert's matrices at a time."""
        static = static or self.static
        y = jnp.zeros_like(x)
        for model, scale in enumerate(static.scales):

            def product(name, expert, x, model=model, scale=scale):
                part = slice(expert * self.rank, (expert + 1) * self.rank)
                a, b = adapters[name][0][model], adapters[name][1][model]
                low = (x @ a[:, part]) @ b[part]
                return x @ self.base[name]["kernel"] + scale * low

            for token in range(x.shape[1]):
                for slot in range(self.chosen.shape[-1]):
                    expert = int(self.chosen[model, token, slot])
                    own = x[model, token]
                    inner = static.activate(product("gate", expert, own))
                    inner *= product("up", expert, own)
                    out = product("down", expert, inner)
                    y = y.at[model, token].add(weights[model, token, slot] * out)
        return y


def gradients(function, *args):
    cotangent = jnp.sin(jnp.arange(2 * 7 * 8, dtype=jnp.float32)).reshape(2, 7, 8)
    y, pull = jax.vjp(function, *args)
    return y, pull(cotangent)


class TestIdentities:
    @pytest.mark.parametrize("dense", [256, 0], ids=["masked", "sorted"])
    @pytest.mark.parametrize("rows", [2048, 6])  # at once, and by parts with padding
    def test_is_every_token_through_its_experts_one_by_one(
        self, monkeypatch, rows, dense
    ):
        monkeypatch.setattr(module, "ROWS", rows)
        monkeypatch.setattr(module, "DENSE", dense)
        monkeypatch.setattr(module, "BLOCK", 2)
        small = Small()

        def ours(x, weights, adapters):
            return mixture(
                small.static, x, small.chosen, weights, adapters, small.base, None
            )

        given = small.x, small.weights, small.adapters
        wanted = gradients(small.by_token, *given)
        chex.assert_trees_all_close(gradients(ours, *given), wanted, atol=1e-5)

    def test_slots_as_many_as_data_says_is_all_slots(self):
        small = Small(slots=3)
        weights = small.weights.at[..., 2].set(0.0)  # a slot that no token uses
        ends = []
        for every in (True, False):
            static = dataclasses.replace(small.static, every_slot=every)

            def ours(x, weights, adapters, static=static):
                return mixture(
                    static, x, small.chosen, weights, adapters, small.base, None
                )

            ends.append(gradients(ours, small.x, weights, small.adapters))
        (y, (dx, dw, da)), (y2, (dx2, dw2, da2)) = ends
        chex.assert_trees_all_close((y, dx, da), (y2, dx2, da2), atol=1e-6)
        np.testing.assert_allclose(dw[..., :2], dw2[..., :2], atol=1e-6)

    def test_order_of_experts_and_of_tokens_does_not_matter(self):
        small = Small()
        y = mixture(small.static, *small.given)
        order = np.array([2, 0, 3, 1])  # new place of each expert
        columns = np.argsort(order).repeat(3) * 3 + np.tile(np.arange(3), 4)
        moved = {
            name: (a[..., columns], b[:, columns])
            for name, (a, b) in small.adapters.items()
        }
        chosen = jnp.array(order)[small.chosen]
        again = mixture(
            small.static, small.x, chosen, small.weights, moved, small.base, None
        )
        np.testing.assert_allclose(again, y, atol=1e-5)
        tokens = np.array([3, 1, 6, 0, 2, 5, 4])
        parts = (a[:, tokens] for a in (small.x, small.chosen, small.weights))
        again = mixture(small.static, *parts, small.adapters, small.base, None)
        np.testing.assert_allclose(again, y[:, tokens], atol=1e-5)

    def test_experts_that_no_token_chose_have_no_gradient(self):
        small = Small(experts=6, tokens=2, slots=1)

        def total(adapters):
            out = mixture(small.static, *small.given[:3], adapters, small.base, None)
            return jnp.sum(jnp.sin(out))

        found = jax.grad(total)(small.adapters)
        for model in range(2):
            used = set(np.asarray(small.chosen[model]).ravel().tolist())
            for a, b in found.values():
                for expert in range(6):
                    part = slice(3 * expert, 3 * expert + 3)
                    alive = (a[model][:, part] != 0).any(), (b[model][part] != 0).any()
                    assert all(alive) if expert in used else not any(alive)

    def test_bfloat16_is_close(self):
        small = Small()
        x = small.x.astype(jnp.bfloat16)
        y = mixture(small.static, x, *small.given[1:])
        assert y.dtype == jnp.bfloat16
        exact = mixture(small.static, *small.given)
        np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.08, rtol=0.02)


class TestChoices:
    LOGITS = jnp.log(jnp.array([[[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]]]))

    def test_all_experts_is_a_softmax_mixture(self):
        _, weights, p = choose(self.LOGITS, router="top_k", top_k=(4,), top_p=(1.0,))
        np.testing.assert_allclose(weights, p, atol=1e-6)

    def test_top_p_takes_the_one_that_passes_and_does_not_renormalise(self):
        chosen, weights, _ = choose(
            self.LOGITS, router="top_p", top_k=(1,), top_p=(0.7,)
        )
        np.testing.assert_allclose(weights[0, 0], [0.5, 0.3, 0, 0], atol=1e-6)
        np.testing.assert_allclose(weights[0, 1], [0.25, 0.25, 0.25, 0], atol=1e-6)
        assert chosen[0, 0].tolist() == [0, 1, 2, 3]

    def test_each_mixture_has_a_k_of_its_own(self):
        both = jnp.concatenate([self.LOGITS, self.LOGITS])
        _, weights, _ = choose(both, router="top_k", top_k=(1, 2), top_p=(1.0, 1.0))
        np.testing.assert_allclose(weights[0, 0], [1, 0], atol=1e-6)
        np.testing.assert_allclose(weights[1, 0], [0.625, 0.375], atol=1e-6)


class TestBalance:
    def of(self, logits, real=None):
        real = jnp.ones(logits.shape[:2], bool) if real is None else real
        own = choose(logits, router="top_k", top_k=(2,), top_p=(1.0,))
        aux = {k: v[None] for k, v in measure_traffic(*own, real).items()}
        return compute_imbalance(**aux, experts=(logits.shape[-1],), over="global")[0]

    def test_is_k_when_even_and_grows_with_imbalance(self):
        random = jnp.array(
            np.random.default_rng(0).standard_normal((1, 400, 4)), jnp.float32
        )
        values = [float(self.of(0.01 * random))]
        for push in (0.5, 1.0, 3.0):
            values.append(float(self.of(random.at[..., 0].add(push))))
        np.testing.assert_allclose(values[0], 2.0, rtol=0.01)
        assert values == sorted(values)
        assert float(self.of(jnp.zeros((1, 8, 4)))) == 2.0

    def test_an_expert_counts_though_its_probability_underflows(self):
        """exp(-200) is 0 in float32; the official code counts whom it chose."""
        logits = jnp.array([[[0.0, -200.0, -300.0, -400.0], [0.0, 1.0, 2.0, 3.0]]])
        own = choose(logits, router="top_k", top_k=(2,), top_p=(1.0,))
        load = measure_traffic(*own, jnp.ones((1, 2), bool))["load"]
        np.testing.assert_array_equal(load, [[0.5, 0.5, 0.5, 0.5]])
        np.testing.assert_allclose(own[1][0, 0], [1, 0], atol=1e-30)

    def test_what_padding_holds_does_not_matter(self):
        logits = jnp.array(
            np.random.default_rng(1).standard_normal((1, 6, 4)), jnp.float32
        )
        real = jnp.array([[True, True, True, True, False, False]])
        other = logits.at[:, 4:].set(9.0)
        assert float(self.of(logits, real)) == float(self.of(other, real))

    def test_layers_that_cancel_are_seen_one_by_one(self):
        """One layer prefers expert 0, the other expert 1: even in the mean only."""
        load = jnp.array([[[2.0, 0.0]], [[0.0, 2.0]]])
        importance = jnp.array([[[0.9, 0.1]], [[0.1, 0.9]]])
        together = compute_imbalance(load, importance, (2,), "global")
        each = compute_imbalance(load, importance, (2,), "per_layer")
        np.testing.assert_allclose([together[0], each[0]], [2.0, 3.6], rtol=1e-6)

    def test_no_gradient_flows_through_the_load(self):
        logits = jnp.array([[[1.0, 0.5, -1.0], [0.2, 0.1, 0.0]]])
        found = jax.grad(lambda own: self.of(own))(logits)
        load = jnp.array([[[1.0, 1.0, 0.0]]])

        def through_importance(own):
            p = jnp.mean(jax.nn.softmax(own), axis=1)[None]
            return compute_imbalance(load, p, (3,), "global")[0]

        np.testing.assert_allclose(
            found, jax.grad(through_importance)(logits), atol=1e-6
        )
