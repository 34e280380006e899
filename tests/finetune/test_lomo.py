"""LOMO is gradient descent, AdaLomo the official update; no gradient is whole."""

import dataclasses
import functools
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from jmem.finetune import tables
from jmem.finetune.lomo import Lomo, Variant
from jmem.finetune.rules import Factored
from jmem.models.decoder import Decoder
from jmem.models.next_token import next_token_loss
from jmem.program import by_key
from jmem.sharding import Layout

VARIANTS = {
    "llama": {},
    "tied": {"tied": True},
    "phi2": {"norm": "layer", "parallel": True, "gated": False, "head_bias": True},
}


def official(w, state, g, rate, t, decay):
    """AdaLomo's update of one parameter, as its authors' code has it, in float64."""
    w, g = np.float64(w), np.float64(g)
    beta, square = 1 - t**-0.8, g**2 + 1e-30
    if g.ndim > 1:
        found = square.mean(axis=-1), square.mean(axis=-2)
        row, column = (beta * s + (1 - beta) * f for s, f in zip(state, found))
        update = g / np.sqrt((row / row.mean())[:, None] * column[None])
        state = row, column
    else:
        state = (beta * state[0] + (1 - beta) * square,)
        update = g / np.sqrt(state[0])
    update /= max(np.sqrt(np.mean(update**2)), 1.0)
    rate = rate * max(np.sqrt(np.mean(w**2)), 1e-3)
    return w * (1 - rate * decay) - rate * update, state


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, params, batch):
    return jax.value_and_grad(lambda p: next_token_loss(model, p, batch))(params)


def by_hand(lomo, model, params, batches):
    """All gradients first, then every parameter, or every layer of a stacked one."""
    flat = {path: np.asarray(leaf) for path, leaf in by_key(params).items()}
    structure, states, losses = jax.tree.structure(params), {}, []
    for t, batch in enumerate(batches, start=1):
        tree = structure.unflatten([jnp.asarray(leaf) for leaf in flat.values()])
        loss, grads = gradients(model, tree, batch)
        losses.append(float(loss))
        for path, g in by_key(grads).items():
            rows = range(g.shape[0]) if path.startswith("blocks/") else (...,)
            moved = np.array(flat[path])
            for row in rows:
                w, own = moved[row], np.asarray(g[row])
                if lomo.variant == "lomo":
                    own = np.clip(own, -lomo.clip_value, lomo.clip_value)
                    own = own + lomo.weight_decay * w
                    moved[row] = w - lomo.learning_rate * own
                else:
                    start = [np.zeros(n) for n in own.shape]
                    state = states.get((path, row), start)
                    moved[row], states[path, row] = official(
                        *(w, state, own, lomo.learning_rate, t, lomo.weight_decay)
                    )
            flat[path] = moved
    return flat, losses


@pytest.mark.parametrize("variant", get_args(Variant))
@pytest.mark.parametrize("model", VARIANTS)
def test_is_the_update_of_whole_gradients(variant, model, random_batch, monkeypatch):
    """Tables in several parts, the head's bias, norms, tied or not."""
    monkeypatch.setattr(tables, "TABLE", 48 * 32 // 4)
    config = dataclasses.replace(TINY, layers=2, **VARIANTS[model])
    model = Decoder(config)
    rates: dict[str, Any] = {"lomo": {"learning_rate": 0.5, "clip_value": 1e-2}}
    lomo = Lomo(variant=variant, weight_decay=0.01, **rates.get(variant, {}))
    params = jax.tree.map(jnp.asarray, random_params(config, scale=0.2))
    batches = [random_batch(model, seed) for seed in range(3)]
    expected, losses = by_hand(lomo, model, params, batches)
    state = lomo.init(model, params, {}, jax.random.key(0))
    step: Any = jax.jit(lambda state, batch: lomo.step(model, state, batch))
    found = []
    for batch in batches:
        state, metrics = step(state, batch)
        found.append(metrics["loss"])
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for path, leaf in by_key(state["params"]).items():
        np.testing.assert_allclose(leaf, expected[path], atol=2e-6, err_msg=path)


def test_a_part_is_trained_alone(tiny, tiny_params, random_batch):
    lomo = Lomo(train=("head", "final_norm"))
    state = lomo.init(tiny, tiny_params, {}, jax.random.key(0))
    state, _ = jax.jit(lambda s, b: lomo.step(tiny, s, b))(state, random_batch(tiny))
    for name in ("blocks", "embed"):
        chex.assert_trees_all_equal(state["params"][name], tiny_params[name])
    assert (state["params"]["head"]["kernel"] != tiny_params["head"]["kernel"]).all()


def test_state_is_a_float_a_row_and_a_column(tiny):
    sizes = {
        variant: sum(
            leaf.size
            for leaf in jax.tree.leaves(
                jax.eval_shape(
                    lambda p, v=variant: Lomo(variant=v).init(tiny, p, {}, None),
                    tiny.abstract(),
                )["moments"]
            )
        )
        for variant in get_args(Variant)
    }
    expected = sum(
        int(np.prod(leaf.shape[:-2])) * sum(leaf.shape[-2:])
        if "kernel" in path or "embedding" in path
        else leaf.size
        for path, leaf in by_key(tiny.abstract()).items()
    )
    assert sizes == {"lomo": 0, "adalomo": expected}


def test_an_update_is_as_large_as_its_matrix_says():
    """A gradient a thousand times larger moves a weight as far."""
    w = jax.random.normal(jax.random.key(0), (8, 6))
    g = jax.random.normal(jax.random.key(1), (8, 6))
    rule, rate, t = Factored(relative=True), jnp.float32(0.1), jnp.int32(1)
    moved = [rule(w, rule.init(w), size * g, rate, t, 0)[0] - w for size in (1, 1e3)]
    np.testing.assert_allclose(*moved, rtol=1e-4)
    size = [float(jnp.sqrt(jnp.mean(x**2))) for x in (moved[0], w)]
    assert size[0] <= 0.1001 * size[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_value": -1.0}, r"Lomo: clip_value=-1.0 must be finite"),
        ({"learning_rate": -1.0}, r"learning_rate=-1.0 must be finite"),
        ({"schedule": "cosine", "total_steps": 0}, r"needs total_steps above"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Lomo(**settings)


def test_factors_are_not_divided_over_a_mesh():
    divided = Decoder(TINY, layout=Layout(fsdp=2))
    with pytest.raises(ValueError, match=r"Layout\(fsdp=2.*not divided over a mesh"):
        Lomo().init(divided, random_params(TINY), {}, jax.random.key(0))
    Lomo(variant="lomo").init(divided, random_params(TINY), {}, jax.random.key(0))
