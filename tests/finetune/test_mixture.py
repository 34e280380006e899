"""The experts' MLP: official arrays, its two identities, routing and balance."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.finetune.mixlora import MixtureFeed
from jmem.finetune.mixture import choose, imbalance, traffic
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
        balance = coefficient * imbalance(**aux, experts=(8,), over="global")[0]
        return jnp.sum(y * g["gy"]) + balance, (y, balance, aux)

    out, gradients = jax.jit(
        jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    )(leaves, jnp.array(g["x"]))
    return g, config, leaves, feed, out[1], gradients


class TestOfficialArrays:
    def test_output(self, found):
        g, *_, (y, _, _), _ = found
        np.testing.assert_allclose(y, g["y"], atol=TOLERANCE)

    def test_choices(self, found):
        g, _, leaves, feed, *_ = found
        x = jnp.array(g["x"]).reshape(1, 24, 32)
        logits = feed.logits(leaves["router"]["kernel"], x, None)
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
            return traffic(*routed, real)

        everything = of(rows, jnp.ones_like(mask))
        two = jax.tree.map(
            lambda *own: jnp.stack(own), of(rows, mask), of(rows[:, ::-1], mask)
        )
        one = jax.tree.map(lambda leaf: leaf[None], everything)
        for aux, key in ((one, "aux_loss_nomask"), (two, "aux_loss_2layers")):
            balance = 0.01 * imbalance(**aux, experts=(8,), over="global")[0]
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
