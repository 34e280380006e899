"""Training a part of the model, each part at its own rate, in three precisions."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# optax and chex type every tree as a union of all that a tree can be.

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import random_params

from jmem.finetune.adamw import AdamW, descend
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lora import Lora
from jmem.finetune.program import step_program
from jmem.models import zoo
from jmem.models.decoder import PRECISIONS, Decoder
from jmem.program import by_key
from jmem.targets import resolve

ADAMW = AdamW(learning_rate=1e-2, weight_decay=0.1)


def moved(before: dict, after: dict) -> set[str]:
    """Paths of the leaves that are not what they were, to the bit."""
    after = by_key(after)
    return {
        path
        for path, leaf in by_key(before).items()
        if not np.array_equal(leaf, after[path])
    }


def one_step(finetuner, model, params, batch):
    state = finetuner.init(model, params, {}, jax.random.key(0))
    return jax.jit(lambda state: finetuner.step(model, state, batch))(state)


class TestTrain:
    """Patterns choose what is trained; the rest costs its own bytes and no more."""

    def test_full_moves_what_the_patterns_mean(self, tiny, tiny_params, random_batch):
        full = Full(train=("*norm", "blocks/attention/v"), adamw=ADAMW)
        state, _ = one_step(full, tiny, tiny_params, random_batch(tiny))
        expected = {p for p in by_key(tiny_params) if "norm" in p or "/v/" in p}
        assert moved(tiny_params, full.merged(state)[0]) == expected

    def test_lisa_moves_what_the_patterns_mean(self, tiny_config, random_batch):
        model = Decoder(dataclasses.replace(tiny_config, tied=True))
        params = jax.tree.map(jnp.asarray, random_params(model.config, scale=0.1))
        lisa = Lisa(train=("blocks/mlp", "final_norm"), active_layers=2, adamw=ADAMW)
        state, metrics = one_step(lisa, model, params, random_batch(model))
        after = state["params"]
        maps = {f"blocks/mlp/{name}/kernel" for name in ("gate", "up", "down")}
        assert moved(params, after) == maps | {"final_norm/scale"}
        kernels = [p["blocks"]["mlp"]["up"]["kernel"] for p in (params, after)]
        rows = {i for i in range(5) if (kernels[0][i] != kernels[1][i]).any()}
        assert rows == set(metrics["active"].tolist())

    def test_frozen_parameters_have_no_moments_gradients_or_copies(self):
        """Compiled for an H200 where each of them would outweigh all that is left.

        Mixed precision that keeps what its blocks compute: a cast kernel must not be
        among what is kept, nor all kernels be cast at once.
        """
        config = dataclasses.replace(
            zoo.get("tinyllama-1.1b"), layers=8, intermediate=2048
        )
        model = Decoder(config, attention="cudnn", remat="none", **PRECISIONS["mixed"])
        full = Full(train=("*norm",))
        program = step_program(full, model, batch_size=1, seq_len=64)
        _, batch = program.args
        norms = (2 * config.layers + 1) * config.hidden
        plan: Any = program.compile(resolve("h200")).memory_analysis()
        held = 4 * config.parameters + 2 * 4 * norms
        counters = 2 * 4  # of updates, in the state and in the optimizer's
        tokens = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))
        assert plan.argument_size_in_bytes == held + counters + tokens
        table = config.vocab_size * config.hidden
        head_gradient, stack_copy = 4 * table, 2 * (config.parameters - 2 * table)
        assert plan.temp_size_in_bytes < min(head_gradient, stack_copy)

    def test_a_mistake_is_refused_before_anything_is_trained(self, tiny):
        def start(finetuner):
            step_program(finetuner, tiny, batch_size=1, seq_len=4)

        with pytest.raises(ValueError, match=r"Full: train=\('hed',\): 'hed' matches"):
            start(Full(train=("hed",)))
        with pytest.raises(ValueError, match=r"nothing to draw. Use Full\(train"):
            start(Lisa(train=("head", "embed")))
        rates = AdamW(rates=(("head", 2.0),))
        with pytest.raises(ValueError, match=r"AdamW: rates=.*'head' matches no"):
            start(Full(train=("blocks",), adamw=rates))
        with pytest.raises(ValueError, match=r"AdamW: rates=.*'head' matches no"):
            start(Lora(adamw=rates))
        with pytest.raises(ValueError, match=r"AdamW: rates=.*'head' matches no"):
            start(Lisa(train=("blocks",), adamw=rates))


class TestLastBlocks:
    """Blocks of weight 0 are frozen: LISA over the last k, drawn once."""

    def test_only_they_move_and_only_they_have_moments(
        self, tiny, tiny_params, random_batch
    ):
        last = Lisa(active_layers=2, weights=(0, 0, 0, 1, 1), period=10**6, adamw=ADAMW)
        state = last.init(tiny, tiny_params, {}, jax.random.key(0))
        step = jax.jit(lambda state, batch: last.step(tiny, state, batch))
        for seed in range(3):
            state, metrics = step(state, random_batch(tiny, seed))
            assert metrics["active"].tolist() == [3, 4]
        kernels = [
            p["blocks"]["mlp"]["up"]["kernel"] for p in (tiny_params, state["params"])
        ]
        assert [bool((a != b).any()) for a, b in zip(*kernels)] == [0, 0, 0, 1, 1]
        assert {leaf.shape[0] for leaf in jax.tree.leaves(state["blocks"])} == {2}
        assert state["blocks"][0].count.tolist() == [3, 3]  # never started afresh


class TestRates:
    """One update of a gradient of ones: how far each leaf goes is its rate."""

    def test_of_patterns_and_depth(self, tiny):
        adamw = AdamW(
            learning_rate=1.0,
            rates=(("blocks/mlp", 3.0), ("*/up", 5.0), ("head", 0.0)),
            layer_decay=0.5,
        )
        rates = adamw.find_leaf_rates(
            tiny.abstract(), adamw.rate(jnp.int32(0)), layers=5
        )
        ones = jax.tree.map(lambda p: jnp.ones(p.shape), tiny.abstract())
        after = descend(ones, ones, rates)
        gone = by_key(jax.tree.map(lambda p: 1 - p, after))
        depth = np.array([0.0625, 0.125, 0.25, 0.5, 1.0])

        def assert_gone(path, expected):
            found = gone[path].reshape(gone[path].shape[0], -1)
            assert (found == found[:, :1]).all()
            np.testing.assert_allclose(found[:, 0], expected)

        assert_gone("blocks/attention/q/kernel", depth)
        assert_gone("blocks/mlp_norm/scale", depth)
        assert_gone("blocks/mlp/gate/kernel", 3 * depth)
        assert_gone("blocks/mlp/up/kernel", 5 * depth)  # the last that means it
        assert_gone("embed/embedding", np.full(48, 0.5**5))
        assert_gone("head/kernel", np.zeros(32))
        assert_gone("final_norm/scale", np.ones(32))

    def test_reach_every_method_s_step(self, tiny, tiny_params, random_batch):
        """A factor of 0 leaves a map where it was, decay all blocks but the last."""
        rates = (("blocks/*/v", 0.0), ("blocks/*/v/lora_b", 1.0))
        adamw = AdamW(learning_rate=1e-2, rates=rates[:1], layer_decay=1e-20)
        lisa = Lisa(active_layers=5, adamw=adamw)
        state, _ = one_step(lisa, tiny, tiny_params, random_batch(tiny))
        maps = [p["blocks"]["attention"] for p in (tiny_params, state["params"])]
        assert not (maps[0]["v"]["kernel"] != maps[1]["v"]["kernel"]).any()
        changed = (maps[0]["q"]["kernel"] != maps[1]["q"]["kernel"]).any(axis=(1, 2))
        assert changed.tolist() == [False, False, False, False, True]

        lora = Lora(rank=2, maps=("q", "v"), adamw=AdamW(rates=rates))
        before = lora.init(tiny, tiny_params, {}, jax.random.key(0))["lora"]
        state, _ = one_step(lora, tiny, tiny_params, random_batch(tiny))
        # B starts at zero, so the first update has no gradient for A.
        assert moved(before, state["lora"]) == {
            "attention/q/lora_b",
            "attention/v/lora_b",
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rates": (("head", -1.0),)}, r"'head' the factor -1.0, which must be"),
            ({"rates": (("head", float("nan")),)}, "must be finite"),
            ({"layer_decay": 0.0}, "layer_decay=0.0 must be above 0"),
            ({"layer_decay": 1.1}, "layer_decay=1.1 must be above 0 and at most 1"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            AdamW(**options)


class TestMixed:
    """float32 parameters under bfloat16 activations."""

    def test_keeps_updates_that_bfloat16_rounds_away(
        self, tiny_config, tiny_params, random_batch
    ):
        model = Decoder(tiny_config, **PRECISIONS["mixed"])
        lisa = Lisa(adamw=AdamW(learning_rate=1e-6))
        state, _ = one_step(lisa, model, tiny_params, random_batch(model))
        scale = state["params"]["final_norm"]["scale"]  # 1 before
        assert scale.dtype == jnp.float32
        assert (scale != 1).all()
        assert (scale.astype(jnp.bfloat16) == 1).all()

    def test_adapters_may_be_float32_above_a_bfloat16_base(
        self, tiny_config, tiny_params, random_batch
    ):
        model = Decoder(tiny_config, dtype=jnp.bfloat16)
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tiny_params)
        adamw = AdamW(learning_rate=1e-6)
        lora = Lora(rank=2, alpha=1, adapter_dtype="float32", adamw=adamw)
        before = lora.init(model, params, {}, jax.random.key(0))
        before["lora"] = jax.tree.map(lambda x: x + 0.1, before["lora"])
        state, _ = jax.jit(lambda s: lora.step(model, s, random_batch(model)))(before)
        for old, new in zip(*map(jax.tree.leaves, (before["lora"], state["lora"]))):
            assert new.dtype == jnp.float32
            assert 0 < jnp.abs(new - old).max() < 2e-6
        merged = jax.tree.leaves(lora.merged(state)[0])
        assert {leaf.dtype for leaf in merged} == {jnp.dtype(jnp.bfloat16)}
