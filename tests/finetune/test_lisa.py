"""LISA: the official code's trajectories, and what only LISA promises."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# optax and chex type every tree as a union of all that a tree can be.

import dataclasses
import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_decoder import random_params

from jmem.data.batch import Batch
from jmem.finetune.adamw import AdamW, scale_by_adam
from jmem.finetune.full import Full
from jmem.finetune.layerwise import make_slot_gradients
from jmem.finetune.lisa import Lisa, transform
from jmem.finetune.orders import draw
from jmem.models.decoder import Decoder, DecoderConfig
from jmem.models.next_token import next_token_loss

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NO_CLIP = AdamW(learning_rate=1e-2, max_grad_norm=0)


def run(finetuner, model, params, batches, key=0):
    """State and metrics after one jitted step a batch."""
    state = jax.jit(lambda p: finetuner.init(model, p, {}, jax.random.key(key)))(params)
    step = jax.jit(lambda state, batch: finetuner.step(model, state, batch))
    metrics = []
    for batch in batches:
        state, values = step(state, batch)
        metrics.append(jax.device_get(values))
    assert step._cache_size() == 1
    return state, metrics


def golden_tree(golden, prefix):
    """Torch's [out, in] matrices of the official run, as our stacked tree."""

    def maps(names):
        kernels = {n: golden[prefix + n].swapaxes(1, 2) for n in names}
        return {n: {"kernel": jnp.asarray(k)} for n, k in kernels.items()}

    def scale(name):
        return {"scale": jnp.asarray(golden[prefix + name])}

    return {
        "embed": {"embedding": jnp.asarray(golden[prefix + "embed"])},
        "blocks": {
            "attention_norm": scale("norm1"),
            "attention": maps("qkvo"),
            "mlp_norm": scale("norm2"),
            "mlp": maps(("gate", "up", "down")),
        },
        "final_norm": scale("final_norm"),
        "head": {"kernel": jnp.asarray(golden[prefix + "head"].T)},
    }


@pytest.mark.parametrize("moments", ["reset_layers", "persist", "reset_all"])
def test_trajectory_of_the_official_code(moments):
    """LMFlow's callback on a tiny Llama, torch AdamW; tolerances of the sheet."""
    golden = np.load(GOLDEN / f"lisa__{moments}.npz")
    c = json.loads(str(golden["config"]))
    model = Decoder(
        DecoderConfig(
            vocab_size=c["V"],
            layers=c["L"],
            hidden=c["D"],
            heads=c["H"],
            kv_heads=c["KV"],
            head_dim=c["D"] // c["H"],
            intermediate=c["F"],
            max_positions=c["T"],
            rope_theta=c["rope_theta"],
            rms_eps=c["rms_eps"],
        )
    )
    adamw = AdamW(
        learning_rate=c["lr"],
        schedule="linear",
        total_steps=c["steps"],
        b1=c["betas"][0],
        b2=c["betas"][1],
        eps=c["eps"],
        weight_decay=c["wd"],
        max_grad_norm=0,
    )
    lisa = Lisa(active_layers=c["gamma"], period=c["K"], moments=moments, adamw=adamw)
    begin = jax.jit(lambda p: lisa.init(model, p, {}, jax.random.key(0)))
    state = begin(golden_tree(golden, "init_"))
    step = jax.jit(lambda s, batch, active: lisa.step(model, s, batch, active))
    losses = []
    for i in range(c["steps"]):
        labels = golden["labels"][i][:, 1:]
        batch = Batch(
            jnp.asarray(golden["ids"][i][:, :-1]),
            jnp.asarray(np.maximum(labels, 0)),
            jnp.asarray((labels != -100).astype(np.float32)),
        )
        state, metrics = step(state, batch, jnp.asarray(golden["active"][i]))
        losses.append(metrics["loss"])
        np.testing.assert_allclose(metrics["lr"], golden["lr"][i], rtol=1e-6)
    np.testing.assert_allclose(losses, golden["loss"], atol=2e-5)
    found, expected = state["params"], golden_tree(golden, "final_")
    found, expected = jax.device_get((found, expected))
    errors = jax.tree.map(lambda a, b: np.abs(a - b).ravel(), found, expected)
    errors = np.concatenate(jax.tree.leaves(errors))
    assert (errors < 2e-5).mean() > 0.995
    assert errors.max() < 1e-3
    assert step._cache_size() == 1


class TestDraw:
    def test_indices_are_distinct_ascending_and_in_range(self):
        keys = jax.random.split(jax.random.key(0), 1000)
        drawn = np.asarray(jax.jit(jax.vmap(lambda k: draw(k, 7, 3)))(keys))
        assert (np.diff(drawn, axis=1) > 0).all()
        assert drawn.min() == 0
        assert drawn.max() == 6

    def test_every_block_is_equally_likely(self):
        keys = jax.random.split(jax.random.key(1), 100_000)
        drawn = np.asarray(jax.jit(jax.vmap(lambda k: draw(k, 8, 2)))(keys))
        counts = np.bincount(drawn.ravel(), minlength=8)
        share = 100_000 * 2 / 8
        # Chi-square of 8 cells: above 24.3 once in a thousand keys.
        assert ((counts - share) ** 2 / share).sum() < 24.3

    def test_weights_order_how_often_blocks_are_drawn(self):
        keys = jax.random.split(jax.random.key(2), 20_000)
        weights = (0.0, 1.0, 2.0, 4.0, 8.0)
        drawn = np.asarray(jax.jit(jax.vmap(lambda k: draw(k, 5, 2, weights)))(keys))
        counts = np.bincount(drawn.ravel(), minlength=5)
        assert counts[0] == 0
        assert (np.diff(counts) > 0).all()

    def test_the_run_draws_at_the_first_step_and_each_period(
        self, tiny, tiny_params, random_batch
    ):
        lisa = Lisa(active_layers=2, period=3)
        _, metrics = run(lisa, tiny, tiny_params, [random_batch(tiny)] * 12)
        active = [tuple(m["active"]) for m in metrics]
        periods = [active[i : i + 3] for i in range(0, 12, 3)]
        assert all(len(set(p)) == 1 for p in periods)
        assert len(set(active)) > 1


@functools.partial(jax.jit, static_argnums=0)
def slot_gradients(model, params, batch, active):
    return make_slot_gradients(model, params, batch, active)


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, params, batch):
    """Loss and gradients of everything, compiled once for all tests."""
    return jax.value_and_grad(lambda p: next_token_loss(model, p, batch))(params)


class TestSlotGradients:
    @pytest.mark.parametrize(
        "active, tied",
        [((), True), ((2,), False), ((3, 1), True), ((0, 1, 2, 3, 4), False)],
    )
    def test_equal_automatic_differentiation(
        self, tiny_config, random_batch, active, tied
    ):
        model = Decoder(dataclasses.replace(tiny_config, tied=tied))
        params = jax.tree.map(jnp.asarray, random_params(model.config, scale=0.2))
        batch = random_batch(model)
        active = np.asarray(active, np.int32)
        loss, outside, blocks = slot_gradients(model, params, batch, active)
        value, grads = jax.device_get(gradients(model, params, batch))
        expected = jax.tree.map(lambda g: g[active], grads.pop("blocks"))
        chex.assert_trees_all_close(loss, value, rtol=1e-6)
        chex.assert_trees_all_close(outside, grads, rtol=1e-4, atol=1e-7)
        chex.assert_trees_all_close(blocks, expected, rtol=1e-4, atol=1e-7)

    def test_match_finite_differences(self, tiny, tiny_params, random_batch):
        params, batch = tiny_params, random_batch(tiny)
        active = jnp.asarray([1, 3], jnp.int32)
        _, _, grads = slot_gradients(tiny, params, batch, active)
        kernel = params["blocks"]["mlp"]["down"]["kernel"]
        direction = np.random.default_rng(1).standard_normal(kernel.shape[1:])

        @jax.jit
        def loss(amount):
            moved = kernel.at[1].add(amount * direction)
            mlp = params["blocks"]["mlp"] | {"down": {"kernel": moved}}
            return next_token_loss(
                tiny, params | {"blocks": params["blocks"] | {"mlp": mlp}}, batch
            )

        slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
        found = (np.asarray(grads["mlp"]["down"]["kernel"])[0] * direction).sum()
        np.testing.assert_allclose(found, slope, rtol=2e-2)


def test_all_layers_persisting_is_full_adamw(tiny, tiny_params, random_batch):
    params = tiny_params
    batches = [random_batch(tiny, seed) for seed in range(8)]
    adamw = AdamW(learning_rate=1e-3, weight_decay=0.1)
    lisa = Lisa(active_layers=5, period=3, moments="persist", adamw=adamw)
    ours, metrics = run(lisa, tiny, params, batches)
    full, expected = run(Full(adamw=adamw), tiny, params, batches)
    np.testing.assert_allclose(
        [m["loss"] for m in metrics], [m["loss"] for m in expected], rtol=1e-6
    )
    # Adam divides by sqrt(v): where a gradient is all rounding, so is its direction.
    chex.assert_trees_all_close(ours["params"], full["params"], atol=2e-5)


@pytest.mark.parametrize("active_layers", [0, 2])
def test_frozen_blocks_are_untouched_to_the_bit(
    tiny, tiny_params, random_batch, active_layers
):
    params = tiny_params
    adamw = AdamW(learning_rate=1e-2, weight_decay=0.1)
    lisa = Lisa(active_layers=active_layers, period=4, adamw=adamw)
    state, metrics = run(lisa, tiny, params, [random_batch(tiny, s) for s in range(4)])
    active = set(metrics[0]["active"].tolist())
    assert len(active) == active_layers
    params, moved = jax.device_get((params, state["params"]))
    for before, after in zip(
        jax.tree.leaves(params["blocks"]), jax.tree.leaves(moved["blocks"])
    ):
        same = [bool((before[i] == after[i]).all()) for i in range(5)]
        assert same == [i not in active for i in range(5)]
    for name in ("embed", "final_norm", "head"):
        changed = jax.tree.map(
            lambda a, b: bool((a != b).any()), params[name], moved[name]
        )
        assert all(jax.tree.leaves(changed))


def test_every_block_ever_drawn_is_trained(tiny, tiny_params, random_batch):
    """Rivals built the optimizer after the first draw, and trained only that."""
    params = tiny_params
    lisa = Lisa(active_layers=2, period=1, adamw=NO_CLIP)
    state, metrics = run(lisa, tiny, params, [random_batch(tiny, s) for s in range(9)])
    drawn = {int(i) for m in metrics for i in m["active"]}
    trees = jax.device_get((params, state["params"]))
    kernels = [tree["blocks"]["mlp"]["up"]["kernel"] for tree in trees]
    assert {i for i in range(5) if (kernels[0][i] != kernels[1][i]).any()} == drawn
    assert len(drawn) > 2


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_moments_are_stored_as_asked_for_and_only_for_slots(tiny_config, moment_dtype):
    model = Decoder(tiny_config, dtype=jnp.bfloat16)
    lisa = Lisa(active_layers=2, adamw=AdamW(moment_dtype=moment_dtype))
    state = jax.eval_shape(
        lambda key: lisa.init(model, model.init(key), {}, key), jax.random.key(0)
    )
    moments = {"outside": state["outside"], "blocks": state["blocks"]}
    floating = [
        leaf
        for leaf in jax.tree.leaves(moments)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert {str(leaf.dtype) for leaf in floating} == {moment_dtype}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state["blocks"])} == {2}


class TestTransform:
    """The plain optax transform, for anybody's loop."""

    @pytest.mark.parametrize("moments", ["reset_layers", "reset_all", "persist"])
    def test_walks_with_the_finetuner(self, tiny, tiny_params, random_batch, moments):
        params = tiny_params
        batches = [random_batch(tiny, seed) for seed in range(7)]
        # By eps a gradient that is all rounding has no direction.
        adamw = AdamW(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0, eps=1e-5)
        lisa = Lisa(active_layers=2, period=3, moments=moments, adamw=adamw)
        state, metrics = run(lisa, tiny, params, batches, key=11)

        adam = scale_by_adam(adamw.b1, adamw.b2, adamw.eps)
        inner = optax.chain(adam, optax.add_decayed_weights(0.1))
        optimizer = optax.chain(
            transform(inner, active_layers=2, period=3, seed=11, moments=moments),
            optax.scale_by_learning_rate(1e-3),
        )

        @jax.jit
        def step(params, state, batch):
            grads = jax.grad(lambda p: next_token_loss(tiny, p, batch))(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        theirs = optimizer.init(params)
        for batch, metric in zip(batches, metrics, strict=True):
            params, theirs = step(params, theirs, batch)
            np.testing.assert_array_equal(theirs[0].active, metric["active"])
        chex.assert_trees_all_close(params, state["params"], atol=2e-5)
        assert step._cache_size() == 1

    def test_serves_any_optimizer_on_any_stacked_tree(self):
        params = {"table": jnp.ones(3), "layers": {"w": jnp.ones((4, 2))}}
        lisa = transform(
            optax.trace(0.9), active_layers=1, period=2, blocks="layers", seed=5
        )
        state = lisa.init(params)
        for _ in range(2):
            updates, state = lisa.update(params, state, params)
        moved = np.flatnonzero(np.asarray(updates["layers"]["w"]).any(axis=1))
        assert moved.tolist() == state.active.tolist()
        np.testing.assert_allclose(updates["layers"]["w"][moved], 1.9)  # momentum
        np.testing.assert_allclose(updates["table"], 1.9)

    def test_no_active_layers_trains_the_rest(self):
        params = {"head": jnp.ones(3), "blocks": {"w": jnp.ones((4, 2))}}
        lisa = transform(optax.identity(), active_layers=0, period=2)
        updates, _ = lisa.update(params, lisa.init(params), params)
        assert not updates["blocks"]["w"].any()
        assert updates["head"].all()


REFUSED = {
    "gamma below zero": ({"active_layers": -1}, "active_layers=-1"),
    "period zero": ({"period": 0}, "period=0"),
    "negative weight": ({"weights": (1.0, -1.0)}, "not negative"),
    "weights not a number": ({"weights": (1.0, float("nan"))}, "finite"),
    "too few positive": ({"weights": (1.0, 0.0), "active_layers": 2}, "fewer than"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=list(REFUSED))
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        Lisa(**options)
    with pytest.raises(ValueError, match=message):
        transform(optax.identity(), **({"active_layers": 1, "period": 5} | options))


def test_refuses_more_active_layers_than_the_model_has(tiny):
    with pytest.raises(
        ValueError, match=r"active_layers=6 exceeds the model's 5 blocks"
    ):
        Lisa(active_layers=6).init(tiny, tiny.abstract(), {}, jax.random.key(0))


def test_refuses_weights_of_another_depth(tiny):
    lisa = Lisa(active_layers=1, weights=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"weights=\(.* has 2 entries for 5 blocks"):
        lisa.init(tiny, tiny.abstract(), {}, jax.random.key(0))


@pytest.mark.parametrize("active", [[1, 1], [3, 1], [-1, 2], [0, 5], [1]])
def test_refuses_forced_blocks_that_are_no_draw(tiny, random_batch, active):
    lisa = Lisa(active_layers=2)
    state = jax.eval_shape(
        lambda key: lisa.init(tiny, tiny.init(key), {}, key), jax.random.key(0)
    )
    with pytest.raises(ValueError, match=r"Lisa.step: active"):
        lisa.step(tiny, state, random_batch(tiny), jnp.asarray(active, jnp.int32))


class TestMaster:
    """A float32 copy of what is trained, in the state of the active blocks."""

    ADAMW = AdamW(learning_rate=2e-5, max_grad_norm=0.0)  # far below 2^-9 of a weight

    def test_small_updates_add_up_and_weights_are_it_rounded(
        self, tiny_config, random_batch
    ):
        model = Decoder(tiny_config, dtype=jnp.bfloat16)
        before = random_params(tiny_config, jnp.bfloat16, scale=0.2)
        before = jax.tree.map(jnp.asarray, before)
        batches = [random_batch(model)] * 12

        def kernel(tree):
            return np.asarray(tree["blocks"]["mlp"]["up"]["kernel"])

        def walk(master, moment_dtype):
            adamw = dataclasses.replace(self.ADAMW, moment_dtype=moment_dtype)
            lisa = Lisa(active_layers=2, period=20, adamw=adamw, master=master)
            state, metrics = run(lisa, model, before, batches, key=1)
            moved = kernel(before) != kernel(state["params"])
            return float(np.mean(moved)), state, metrics[-1]

        without, *_ = walk(False, "float32")
        for moment_dtype in ("float32", "float8"):
            moved, state, metrics = walk(True, moment_dtype)
            assert moved > 1.5 * without
            copy = np.asarray(state["blocks"].moments["mlp"]["up"]["kernel"][-1])
            stored = kernel(state["params"])[metrics["active"]]
            np.testing.assert_array_equal(copy.astype(jnp.bfloat16), stored)

    def test_needs_a_fused_step(self):
        with pytest.raises(ValueError, match="master=True needs a fused step"):
            Lisa(master=True)
