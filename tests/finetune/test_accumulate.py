"""A batch in parts has the gradient of the whole, and the activations of a part."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.finetune.accumulate import accumulate
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lora import Lora
from jmem.finetune.program import step_program
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.targets import resolve

# A step that shows the gradient itself: AdamW divides it away.
PLAIN = AdamW(learning_rate=1e-2, b1=0.0, b2=0.0, eps=1.0)
METHODS = {
    "full": Full(adamw=PLAIN),
    "lora": Lora(rank=2, adamw=PLAIN),
    "lisa": Lisa(active_layers=2, period=3, adamw=PLAIN),
}


@pytest.mark.parametrize("name", METHODS)
def test_parts_of_unequal_weight_make_the_whole(name, tiny, tiny_params, random_batch):
    """Random weights: the parts' means must be weighed, not averaged."""
    method, batch = METHODS[name], random_batch(tiny, batch_size=4)
    batch = batch._replace(weights=batch.weights.at[0, 2:].set(0))
    state = method.init(tiny, tiny_params, {}, jax.random.key(0))

    def step(parts):
        split = dataclasses.replace(method, accumulate=parts)
        return jax.jit(lambda state, batch: split.step(tiny, state, batch))(
            state, batch
        )

    (whole, expected), (halves, found) = step(1), step(2)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-5)
    chex.assert_trees_all_close(halves, whole, rtol=1e-5, atol=1e-7)


def test_a_part_without_targets_adds_nothing(tiny, random_batch):
    batch = random_batch(tiny, batch_size=2)
    batch = batch._replace(weights=batch.weights.at[1].set(0))

    def gradients(part, number, stats):
        del number
        mean = jnp.sum(part.weights) / jnp.maximum(jnp.sum(part.weights), 1.0)
        return (mean, {"w": part.targets.astype(jnp.float32).mean() * mean}), stats

    (loss, grads), _ = accumulate(gradients, batch, 2, {})
    assert loss == 1.0
    assert grads["w"] == batch.targets[0].astype(jnp.float32).mean()


def test_dropout_differs_between_parts(tiny, tiny_params, random_batch):
    one = random_batch(tiny, batch_size=1)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), one)
    lora = Lora(rank=2, dropout=0.5, adamw=PLAIN)
    state = lora.init(tiny, tiny_params, {}, jax.random.key(0))
    state["lora"] = jax.tree.map(lambda x: x + 0.1, state["lora"])

    def loss(batch, parts):
        split = dataclasses.replace(lora, accumulate=parts)
        return jax.jit(lambda s, b: split.step(tiny, s, b))(state, batch)[1]["loss"]

    assert abs(loss(twice, 2) - loss(one, 1)) > 1e-4


def test_activations_are_those_of_one_part():
    config = dataclasses.replace(zoo.get("smollm2-135m"), layers=8, vocab_size=1024)
    model = Decoder(config, attention="cudnn", remat="none", dtype=jnp.bfloat16)

    def temporaries(parts):
        program = step_program(Full(accumulate=parts), model, batch_size=8, seq_len=512)
        plan: Any = program.compile(resolve("h200")).memory_analysis()
        return plan.temp_size_in_bytes

    gradients = 4 * config.parameters
    assert temporaries(8) - gradients < 0.25 * temporaries(1)


def test_refuses_parts_that_do_not_divide(tiny, tiny_params, random_batch):
    full = Full(accumulate=3)
    state = full.init(tiny, tiny_params, {}, jax.random.key(0))
    with pytest.raises(ValueError, match="accumulate=3 does not divide a batch of 2"):
        full.step(tiny, state, random_batch(tiny))


def test_refuses_no_parts_of_a_method_of_one_s_own_too(random_batch, tiny):
    with pytest.raises(ValueError, match="accumulate=0 must be at least 1"):
        accumulate(lambda *part: part, random_batch(tiny), 0, {})


@pytest.mark.parametrize("method", [Full, Lora, Lisa])
def test_refuses_no_parts(method):
    with pytest.raises(ValueError, match="accumulate=0 must be at least 1"):
        method(accumulate=0)
