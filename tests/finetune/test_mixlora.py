"""Mixtures trained together: as alone, sizes of their own, jobs that come and go."""

# pyright: reportPossiblyUnboundVariable=false, reportOptionalMemberAccess=false
# loops that run; plans of programs that compiled

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from donation import count_aliased_bytes

from jmem.finetune.adamw import AdamW
from jmem.finetune.lora import Lora
from jmem.finetune.mixlora import MixLora, Mixture
from jmem.finetune.program import step_program
from jmem.models.decoder import Decoder
from jmem.models.next_token import next_token_loss
from jmem.sharding import Layout

ADAMW = AdamW(learning_rate=3e-3, eps=1e-3, weight_decay=0.01, max_grad_norm=0.0)
"""An eps at which Adam does not blow up what rounding makes of vanishing gradients."""
SMALL = Mixture(rank=2, alpha=4.0, experts=4, adamw=ADAMW)


def alone(mixture, **options):
    return MixLora(mixtures=(mixture,), dropout=0.0, **options)


def joint(*mixtures, **options):
    return MixLora(mixtures=mixtures, dropout=0.0, **options)


def started(finetuner, model, params, key=1):
    """A new state, from a copy of the parameters."""

    params = jax.tree.map(jnp.copy, params)
    return finetuner.init(model, params, {}, jax.random.key(key))


@functools.cache
def stepper(finetuner, model) -> Any:
    """Its jitted step, which takes the state: compiled once for all tests."""
    return jax.jit(
        lambda state, batch: finetuner.step(model, state, batch), donate_argnums=0
    )


@functools.cache
def taker(finetuner) -> Any:
    """Jitted: the own adapters of every mixture of a state."""
    numbers = range(len(finetuner.mixtures))
    return jax.jit(lambda state: [finetuner.mixture(state, n) for n in numbers])


plain_loss = jax.jit(next_token_loss, static_argnums=0)


def rows(batch, start, stop):
    return jax.tree.map(lambda leaf: leaf[start:stop], jax.device_get(batch))


class TestOneMixture:
    @pytest.mark.compat
    def test_learns_a_batch_by_heart_in_one_program(
        self, tiny, tiny_params, random_batch
    ):
        """With 16-bit moments, which are rounded at random."""
        small = dataclasses.replace(ADAMW, moment_dtype="bfloat16")
        finetuner = alone(dataclasses.replace(SMALL, adamw=small))
        state, step = started(finetuner, tiny, tiny_params), stepper(finetuner, tiny)
        batch, losses = random_batch(tiny), []
        for _ in range(20):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0] - 0.01
        assert step._cache_size() == 1

    def test_begins_as_the_base_whatever_the_router_does(
        self, tiny, tiny_params, random_batch
    ):
        finetuner, batch = alone(SMALL), random_batch(tiny)
        state = finetuner.init(tiny, tiny_params, {}, jax.random.key(1))
        loss = jax.jit(finetuner.loss, static_argnums=0)(tiny, state, batch)
        base = plain_loss(tiny, tiny_params, batch)
        np.testing.assert_allclose(loss, base, rtol=1e-6)

    def test_fused_equals_separate(self, tiny, tiny_params, random_batch):
        ends = []
        for update in ("fused", "separate"):
            finetuner = alone(SMALL, update=update)
            state = started(finetuner, tiny, tiny_params)
            step = stepper(finetuner, tiny)
            for seed in range(4):
                state, metrics = step(state, random_batch(tiny, seed))
            ends.append((state, metrics))
        chex.assert_trees_all_close(*ends, rtol=1e-4, atol=2e-6)

    def test_one_expert_is_lora(self, tiny, tiny_params, random_batch):
        """The router has nothing to choose; everything else is plain LoRA's."""
        mixture = dataclasses.replace(SMALL, experts=1, top_k=1)
        mine = alone(mixture, update="separate")
        lora = Lora(rank=2, alpha=4.0, adamw=ADAMW)
        ours, theirs = (
            started(mine, tiny, tiny_params),
            lora.init(tiny, tiny_params, {}, jax.random.key(0)),
        )
        shared = jax.tree.map(
            lambda leaf: jnp.array(leaf[:, 0]),
            {
                part: {n: leaf for n, leaf in tree.items() if n != "router"}
                for part, tree in jax.device_get(ours["adapters"]).items()
            },
        )
        theirs = theirs | {"lora": shared}
        steps = stepper(mine, tiny), stepper(lora, tiny)
        for seed in range(3):
            batch = random_batch(tiny, seed)
            ours, seen = steps[0](ours, batch)
            theirs, wanted = steps[1](theirs, batch)
            np.testing.assert_allclose(seen["loss"], wanted["loss"], rtol=1e-5)
            np.testing.assert_allclose(
                seen["grad_norm"], wanted["grad_norm"], rtol=1e-3
            )


class TestSeveral:
    MIXTURES = (
        SMALL,
        dataclasses.replace(
            SMALL,
            rank=3,
            experts=2,
            top_k=1,
            alpha=2.0,
            balance=0.1,
            adamw=dataclasses.replace(ADAMW, learning_rate=1e-3, weight_decay=0.1),
        ),
    )

    @pytest.mark.parametrize("update", ["fused", "separate"])
    def test_each_learns_what_it_would_alone(
        self, tiny, tiny_params, random_batch, update
    ):
        """Of the separate form also: clipped by a norm of its own, in two parts."""
        together = joint(*self.MIXTURES, update=update)
        if update == "separate":
            first = dataclasses.replace(ADAMW, max_grad_norm=0.05)
            mixtures = dataclasses.replace(SMALL, adamw=first), self.MIXTURES[1]
            together = dataclasses.replace(together, mixtures=mixtures, accumulate=2)
        state = started(together, tiny, tiny_params)
        parts = taker(together)(state)
        batches = [random_batch(tiny, seed, batch_size=4) for seed in range(2)]
        step = stepper(together, tiny)
        for batch in batches:
            state, seen = step(state, batch)
        ends, seen = jax.device_get((taker(together)(state), seen))
        for number, adapters in enumerate(parts):
            single = alone(
                together.mixtures[number], update=update, accumulate=together.accumulate
            )
            own = started(single, tiny, tiny_params)
            own = jax.jit(single.replaced, static_argnums=1)(own, 0, adapters)
            walk = stepper(single, tiny)
            for batch in batches:
                own, metrics = walk(own, rows(batch, 2 * number, 2 * number + 2))
            for name in ("losses", "balance", "norms"):
                np.testing.assert_allclose(
                    seen[name][number], np.asarray(metrics[name])[0], rtol=1e-4
                )
            (end,) = taker(single)(own)
            chex.assert_trees_all_close(ends[number], end, rtol=1e-4, atol=5e-6)

    def test_jobs_come_and_go_and_what_one_lacks_stays_zero(
        self, tiny, tiny_params, random_batch
    ):
        finetuner = joint(*self.MIXTURES, update="fused")  # as above: compiled once
        state, step = started(finetuner, tiny, tiny_params), stepper(finetuner, tiny)
        for seed in range(10):
            state, _ = step(state, random_batch(tiny, seed, batch_size=4))
        adapters = jax.device_get(state["adapters"])
        store = jax.jit(finetuner.storage.store, static_argnums=1)
        for number, own in enumerate(taker(finetuner)(state)):
            # Nothing but its own part is not zero.
            stored = jax.tree.map(lambda leaf, n=number: leaf[:, n], adapters)
            chex.assert_trees_all_equal(store(own, number), stored)

        batch = random_batch(tiny, 8, batch_size=4)
        losses = jax.jit(finetuner.losses, static_argnums=0)(tiny, state, batch)
        losses = jax.device_get(losses)
        for number in range(2):
            model, params = finetuner.serving(tiny, state, number)
            mine = rows(batch, 2 * number, 2 * number + 2)
            own = plain_loss(model, params, mine)
            np.testing.assert_allclose(own, losses[number], rtol=1e-5)
        assert abs(losses[0] - losses[1]) > 1e-3

        state = finetuner.stopped(state, 1)
        _, before = taker(finetuner)(state)
        state, seen = step(state, batch)
        _, after = taker(finetuner)(state)
        chex.assert_trees_all_equal(after, before)
        np.testing.assert_array_equal(seen["loss"], np.asarray(seen["losses"])[0])
        assert state["steps"].tolist() == [11, 10]

        state = finetuner.replaced(state, 1, None, jax.random.key(7))
        assert state["steps"].tolist() == [11, 0]
        state, _ = step(state, batch)
        assert state["steps"].tolist() == [12, 1]
        assert step._cache_size() == 1


class TestMore:
    def test_dropout_and_jitter_change_training_and_nothing_else(
        self, tiny, tiny_params, random_batch
    ):
        drawn = dataclasses.replace(alone(SMALL), dropout=0.3, jitter=0.1)
        step, batch = stepper(drawn, tiny), random_batch(tiny)
        first = started(drawn, tiny, tiny_params)
        np.testing.assert_allclose(
            jax.jit(drawn.loss, static_argnums=0)(tiny, first, batch),
            plain_loss(tiny, tiny_params, batch),
            rtol=1e-6,
        )
        state, seen = step(first, batch)
        again, same = step(started(drawn, tiny, tiny_params), batch)
        chex.assert_trees_all_equal(state, again)
        np.testing.assert_allclose(seen["losses"], same["losses"])
        # B is zero at first, so only the router sees the jitter, and A gets nothing.
        later, more = step(again, batch)
        assert not np.allclose(more["norms"], seen["norms"])
        another = step(jax.tree.map(jnp.copy, later) | {"step": jnp.int32(9)}, batch)
        assert float(another[1]["loss"]) != float(step(later, batch)[1]["loss"])

    def test_top_p_uses_as_many_experts_as_it_takes(
        self, tiny, tiny_params, random_batch
    ):
        finetuner = alone(dataclasses.replace(SMALL, top_p=0.6), router="top_p")
        state, step = started(finetuner, tiny, tiny_params), stepper(finetuner, tiny)
        for seed in range(3):
            state, seen = step(state, random_batch(tiny, seed))
        # Nearly even probabilities of four experts: three pass 0.6.
        np.testing.assert_allclose(seen["load"].sum(), 3.0, atol=0.05)

    def test_state_is_updated_in_place(self, tiny_config):
        model = Decoder(tiny_config, dtype=jnp.bfloat16)
        program = step_program(joint(SMALL, SMALL), model, batch_size=2, seq_len=8)
        lowered = program.lower()
        state, _ = lowered.stage.out_info
        chex.assert_trees_all_equal_shapes_and_dtypes(state, program.args[0])
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert count_aliased_bytes(lowered) == held
        labels = zip(program.label_leaves(), program.list_leaves(), strict=True)
        unlabelled = {path for label, (_, path, _) in labels if label is None}
        assert unlabelled <= {"step", "steps", "key", "active"}


class TestRefusals:
    @pytest.mark.parametrize(
        "given, words",
        [
            ({"top_k": 5}, r"top_k=5 exceeds experts=4"),
            ({"experts": 0}, r"experts=0; need >= 1"),
            ({"rank": 0}, r"rank=0; need >= 1"),
            ({"top_p": 1.5}, r"top_p=1.5 must be above 0"),
            ({"alpha": 0.0}, r"alpha=0.0 must be positive"),
            ({"balance": -1.0}, r"balance=-1.0 must be finite"),
            ({"maps": ("q", "wrong", "up")}, r"names 'wrong'"),
            ({"maps": ("q", "v")}, r"names none of the MLP's maps"),
            (
                {"adamw": dataclasses.replace(ADAMW, layer_decay=0.5)},
                r"layer_decay=0.5",
            ),
        ],
    )
    def test_mixture(self, given, words):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(SMALL, **given)

    @pytest.mark.parametrize(
        "given, words",
        [
            ({"mixtures": ()}, r"mixtures=\(\) is empty"),
            ({"dropout": 1.0}, r"dropout=1.0 must be at least 0"),
            ({"accumulate": 0}, r"accumulate=0"),
            ({"update": "fused", "accumulate": 2}, r"update='fused' moves adapters"),
        ],
    )
    def test_mixlora(self, given, words):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(MixLora(mixtures=(SMALL,)), **given)

    def test_mixtures_that_cannot_train_together(self):
        other = dataclasses.replace(SMALL, maps=("up", "down"))
        with pytest.raises(ValueError, match=r"mixtures\[1\]\.maps"):
            joint(SMALL, other)
        other = dataclasses.replace(SMALL, adamw=dataclasses.replace(ADAMW, b1=0.5))
        with pytest.raises(ValueError, match=r"mixtures\[1\]\.adamw\.b1=0\.5"):
            joint(SMALL, other)

    def test_a_batch_of_unequal_shares(self, tiny, tiny_params, random_batch):
        finetuner = joint(SMALL, SMALL)
        state = started(finetuner, tiny, tiny_params)
        with pytest.raises(ValueError, match=r"batch of 3 rows is not as many"):
            finetuner.step(tiny, state, random_batch(tiny, batch_size=3))

    def test_adapters_of_another_base_or_size(self, tiny, tiny_params):
        finetuner = joint(SMALL, SMALL)
        state = started(finetuner, tiny, tiny_params)
        other = alone(dataclasses.replace(SMALL, rank=3))
        adapters = other.mixture(started(other, tiny, tiny_params), 0)
        with pytest.raises(ValueError, match=r"rank=2, experts=4"):
            finetuner.replaced(state, 0, adapters)
        with pytest.raises(ValueError, match=r"number=2"):
            finetuner.replaced(state, 2, None, jax.random.key(0))
        with pytest.raises(ValueError, match=r"adapters=None and key=None"):
            finetuner.replaced(state, 0, None)

    def test_a_mesh(self, tiny, tiny_params):
        divided = dataclasses.replace(tiny, layout=Layout(fsdp=2))
        with pytest.raises(ValueError, match=r"not divided over a mesh"):
            alone(SMALL).init(divided, tiny_params, {}, jax.random.key(0))

    def test_merging(self, tiny, tiny_params):
        finetuner = alone(SMALL)
        with pytest.raises(ValueError, match=r"cannot be merged"):
            finetuner.merged(started(finetuner, tiny, tiny_params))
