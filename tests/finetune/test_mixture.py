"""The experts' MLP: official arrays, its two identities, routing and balance."""

import dataclasses
import functools
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
route = jax.jit(choose, static_argnames=("router", "top_k", "top_p"))
judge = jax.jit(compute_imbalance, static_argnames=("experts", "over"))


def side_by_side(a, b):
    """Torch's A [E, r, in] and B [E, out, r] as ours, of one mixture."""
    experts, rank, inputs = a.shape
    lora_a = a.transpose(2, 0, 1).reshape(inputs, experts * rank)
    lora_b = b.transpose(0, 2, 1).reshape(experts * rank, -1)
    return {"lora_a": lora_a[None], "lora_b": lora_b[None]}


@pytest.fixture(scope="module")
def found():
    g = np.load(GOLDEN / "mixlora__ffn_top2.npz")
    config = json.loads(str(g["config"]))
    leaves: dict = {
        name: {"kernel": g[f"w_{name}"].T}
        | side_by_side(g[f"lora_a_{name}"], g[f"lora_b_{name}"])
        for name in HIDDEN
    }
    leaves["router"] = {"kernel": g["router"].T[None]}
    feed = MixtureFeed((2.0,), (8,), "top_k", (2,), (1.0,))
    real = jnp.asarray(g["attention_mask"] > 0)
    coefficient = 0.01

    def objective(leaves, x):
        y, aux = feed(leaves, x, ACTIVATIONS["silu"], real)
        aux = {name: value[None] for name, value in aux.items()}
        balance = coefficient * compute_imbalance(**aux, experts=(8,), over="global")[0]
        return jnp.sum(y * g["gy"]) + balance, (y, balance, aux)

    out, gradients = jax.jit(
        jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    )(leaves, g["x"])
    return g, config, leaves, feed, *jax.device_get((out[1], gradients))


@pytest.mark.compat
class TestOfficialArrays:
    def test_output(self, found):
        g, *_, (y, _, _), _ = found
        np.testing.assert_allclose(y, g["y"], atol=TOLERANCE)

    def test_choices(self, found):
        g, _, leaves, feed, *_ = found
        x = g["x"].reshape(1, 24, 32)
        logits = jax.jit(feed.compute_logits)(leaves["router"]["kernel"], x, None)
        np.testing.assert_allclose(logits, g["router_logits"][None], atol=TOLERANCE)
        chosen, weights, _ = route(logits, router="top_k", top_k=(2,), top_p=(1.0,))
        np.testing.assert_array_equal(chosen, g["topk_idx"][None])
        np.testing.assert_allclose(weights, g["topk_weight"][None], atol=TOLERANCE)

    def test_balance(self, found):
        g, *_, (_, balance, _), _ = found
        np.testing.assert_allclose(balance, g["aux_loss"], rtol=TOLERANCE)

    def test_balance_without_a_mask_and_over_two_layers(self, found):
        g = found[0]
        mask = g["attention_mask"].reshape(1, 24) > 0
        rows = g["router_logits"][None]

        @jax.jit
        def of(logits, real):
            routed = choose(logits, router="top_k", top_k=(2,), top_p=(1.0,))
            return measure_traffic(*routed, real)

        everything = of(rows, np.ones_like(mask))
        two = jax.tree.map(
            lambda *own: np.stack(own), of(rows, mask), of(rows[:, ::-1], mask)
        )
        one = jax.tree.map(lambda leaf: np.asarray(leaf)[None], everything)
        for aux, key in ((one, "aux_loss_nomask"), (two, "aux_loss_2layers")):
            (balance,) = np.asarray(judge(**aux, experts=(8,), over="global"))
            np.testing.assert_allclose(0.01 * balance, g[key], rtol=TOLERANCE)

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
            return jnp.asarray(0.5 * random.standard_normal(shape).astype(np.float32))

        sizes = {"gate": (8, 12), "up": (8, 12), "down": (12, 8)}
        self.base = {name: {"kernel": draw(*size)} for name, size in sizes.items()}
        self.adapters = {
            name: (draw(models, a, experts * rank), draw(models, experts * rank, b))
            for name, (a, b) in sizes.items()
        }
        self.x, logits = draw(models, tokens, 8), draw(models, tokens, experts)
        self.static = Experts(experts, (0.5, 2.0)[:models], jax.nn.silu, True)
        routed = route(
            logits, router="top_k", top_k=(slots,) * models, top_p=(1.0,) * models
        )
        self.chosen, self.weights, _ = routed
        self.rank = rank

    @property
    def given(self):
        return self.x, self.chosen, self.weights, self.adapters, self.base, None

    def by_token(self, x, weights, adapters):
        """Every token and slot alone, one expert's matrices at a time."""
        static, chosen = self.static, np.asarray(self.chosen)
        y = jnp.zeros_like(x)
        for model, scale in enumerate(static.scales):

            def product(name, expert, x, model=model, scale=scale):
                part = slice(expert * self.rank, (expert + 1) * self.rank)
                a, b = adapters[name][0][model], adapters[name][1][model]
                low = (x @ a[:, part]) @ b[part]
                return x @ self.base[name]["kernel"] + scale * low

            for token in range(x.shape[1]):
                for slot in range(chosen.shape[-1]):
                    expert = chosen[model, token, slot]
                    own = x[model, token]
                    inner = static.activate(product("gate", expert, own))
                    inner *= product("up", expert, own)
                    out = product("down", expert, inner)
                    y = y.at[model, token].add(weights[model, token, slot] * out)
        return y


def gradients(function, *args):
    cotangent = np.sin(np.arange(2 * 7 * 8, dtype=np.float32)).reshape(2, 7, 8)

    @jax.jit
    def both(*args):
        y, pull = jax.vjp(function, *args)
        return y, pull(cotangent)

    return jax.device_get(both(*args))


@pytest.fixture(scope="module")
def one_by_one():
    """A mixture, and what `by_token` and its gradients are."""
    small = Small()
    return small, gradients(small.by_token, small.x, small.weights, small.adapters)


mixed = jax.jit(mixture, static_argnums=0)


class TestIdentities:
    @pytest.mark.parametrize("dense", [256, 0], ids=["masked", "sorted"])
    @pytest.mark.parametrize("rows", [2048, 6])  # at once, and by parts with padding
    def test_is_every_token_through_its_experts_one_by_one(
        self, monkeypatch, one_by_one, rows, dense
    ):
        monkeypatch.setattr(module, "ROWS", rows)
        monkeypatch.setattr(module, "DENSE", dense)
        monkeypatch.setattr(module, "BLOCK", 2)
        small, wanted = one_by_one

        def ours(x, weights, adapters):
            return mixture(
                small.static, x, small.chosen, weights, adapters, small.base, None
            )

        found = gradients(ours, small.x, small.weights, small.adapters)
        chex.assert_trees_all_close(found, wanted, atol=1e-5)

    def test_slots_as_many_as_data_says_is_all_slots(self):
        small = Small(slots=3)
        weights = small.weights * np.array([[[1.0, 1.0, 0.0]]])  # one is never used
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
        run = functools.partial(mixed, small.static)
        y = np.asarray(run(*small.given))
        order = np.array([2, 0, 3, 1])  # new place of each expert
        columns = np.argsort(order).repeat(3) * 3 + np.tile(np.arange(3), 4)
        moved = {
            name: (a[..., columns], b[:, columns])
            for name, (a, b) in jax.device_get(small.adapters).items()
        }
        chosen = order[np.asarray(small.chosen)]
        again = run(small.x, chosen, small.weights, moved, small.base, None)
        np.testing.assert_allclose(again, y, atol=1e-5)
        tokens = np.array([3, 1, 6, 0, 2, 5, 4])
        parts = (a[:, tokens] for a in jax.device_get(small.given[:3]))
        again = run(*parts, small.adapters, small.base, None)
        np.testing.assert_allclose(again, y[:, tokens], atol=1e-5)

    def test_experts_that_no_token_chose_have_no_gradient(self):
        small = Small(experts=6, tokens=2, slots=1)

        def total(adapters):
            out = mixture(small.static, *small.given[:3], adapters, small.base, None)
            return jnp.sum(jnp.sin(out))

        found = jax.device_get(jax.jit(jax.grad(total))(small.adapters))
        for model in range(2):
            used = set(np.asarray(small.chosen)[model].ravel().tolist())
            for a, b in found.values():
                for expert in range(6):
                    part = slice(3 * expert, 3 * expert + 3)
                    alive = (a[model][:, part] != 0).any(), (b[model][part] != 0).any()
                    assert all(alive) if expert in used else not any(alive)

    def test_bfloat16_is_close(self):
        small = Small()
        y = mixed(small.static, small.x.astype(jnp.bfloat16), *small.given[1:])
        assert y.dtype == jnp.bfloat16
        exact, y = mixed(small.static, *small.given), np.asarray(y, np.float32)
        np.testing.assert_allclose(y, exact, atol=0.08, rtol=0.02)


class TestChoices:
    LOGITS = np.log([[[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]]])

    def test_all_experts_is_a_softmax_mixture(self):
        _, weights, p = route(self.LOGITS, router="top_k", top_k=(4,), top_p=(1.0,))
        np.testing.assert_allclose(weights, p, atol=1e-6)

    def test_top_p_takes_the_one_that_passes_and_does_not_renormalise(self):
        chosen, weights, _ = route(
            self.LOGITS, router="top_p", top_k=(1,), top_p=(0.7,)
        )
        wanted = [[0.5, 0.3, 0, 0], [0.25, 0.25, 0.25, 0]]
        np.testing.assert_allclose(weights, [wanted], atol=1e-6)
        assert chosen.tolist()[0][0] == [0, 1, 2, 3]

    def test_each_mixture_has_a_k_of_its_own(self):
        both = np.concatenate([self.LOGITS, self.LOGITS])
        _, weights, _ = route(both, router="top_k", top_k=(1, 2), top_p=(1.0, 1.0))
        first = np.asarray(weights)[:, 0]
        np.testing.assert_allclose(first, [[1, 0], [0.625, 0.375]], atol=1e-6)


class TestBalance:
    @staticmethod
    @jax.jit
    def of(logits, real=None):
        real = jnp.ones(logits.shape[:2], bool) if real is None else real
        own = choose(logits, router="top_k", top_k=(2,), top_p=(1.0,))
        aux = {k: v[None] for k, v in measure_traffic(*own, real).items()}
        return compute_imbalance(**aux, experts=(logits.shape[-1],), over="global")[0]

    def test_is_k_when_even_and_grows_with_imbalance(self):
        random = np.random.default_rng(0).standard_normal((1, 400, 4))
        values = [float(self.of(0.01 * random))]
        for push in (0.5, 1.0, 3.0):
            values.append(float(self.of(random + np.array([push, 0, 0, 0]))))
        np.testing.assert_allclose(values[0], 2.0, rtol=0.01)
        assert values == sorted(values)
        assert float(self.of(np.zeros((1, 8, 4)))) == 2.0

    def test_an_expert_counts_though_its_probability_underflows(self):
        """exp(-200) is 0 in float32; the official code counts whom it chose."""
        logits = np.array([[[0.0, -200.0, -300.0, -400.0], [0.0, 1.0, 2.0, 3.0]]])
        own = route(logits, router="top_k", top_k=(2,), top_p=(1.0,))
        load = jax.jit(measure_traffic)(*own, np.ones((1, 2), bool))["load"]
        np.testing.assert_array_equal(load, [[0.5, 0.5, 0.5, 0.5]])
        np.testing.assert_allclose(np.asarray(own[1])[0, 0], [1, 0], atol=1e-30)

    def test_what_padding_holds_does_not_matter(self):
        logits = np.random.default_rng(1).standard_normal((1, 6, 4))
        real = np.array([[True, True, True, True, False, False]])
        other = np.where(real[..., None], logits, 9.0)
        assert float(self.of(logits, real)) == float(self.of(other, real))

    def test_layers_that_cancel_are_seen_one_by_one(self):
        """One layer prefers expert 0, the other expert 1: even in the mean only."""
        load = np.array([[[2.0, 0.0]], [[0.0, 2.0]]])
        importance = np.array([[[0.9, 0.1]], [[0.1, 0.9]]])
        together = judge(load, importance, (2,), "global")
        each = judge(load, importance, (2,), "per_layer")
        np.testing.assert_allclose([*together, *each], [2.0, 3.6], rtol=1e-6)

    def test_no_gradient_flows_through_the_load(self):
        logits = np.array([[[1.0, 0.5, -1.0], [0.2, 0.1, 0.0]]])
        found = jax.jit(jax.grad(self.of))(logits)
        load = jnp.array([[[1.0, 1.0, 0.0]]])

        def through_importance(own):
            p = jnp.mean(jax.nn.softmax(own), axis=1)[None]
            return compute_imbalance(load, p, (3,), "global")[0]

        wanted = jax.jit(jax.grad(through_importance))(logits)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
