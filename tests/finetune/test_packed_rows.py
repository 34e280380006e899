"""Rows of several documents in every kind of step: what shares a row doesn't matter."""

# pyright: reportOptionalSubscript=false, reportOptionalIterable=false
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false
# Segments are None in rows of one document.

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.data.loader import Loader
from jmem.data.windows import pack, pad
from jmem.finetune.adamw import AdamW
from jmem.finetune.family import FINETUNERS
from jmem.finetune.full import Full
from jmem.finetune.mixlora import MixLora, Mixture
from jmem.models.next_token import next_token_loss
from jmem.train.loop import train

STEPS = {
    name: FINETUNERS[name].finetuner
    for name in ("lora-fused", "lisa", "lisa-separate", "mixlora")
} | {"full in parts": Full(accumulate=2, adamw=AdamW(learning_rate=3e-3))}
"""One of each way in which a step reads a batch."""


def documents(count=4):
    """Of 8 to 11 tokens."""
    random = np.random.default_rng(0)
    drawn = (random.integers(0, 48, 8 + n % 4) for n in range(count))
    return [own.astype(np.int32) for own in drawn]


def in_rows(*rows):
    """A row for each list of documents."""
    parts = [pack(own, 20) for own in rows]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def alone(documents):
    return jax.tree.map(jnp.asarray, pad(documents, 10))


@pytest.fixture
def small(tiny_config):
    from jmem.models.decoder import Decoder

    return Decoder(dataclasses.replace(tiny_config, layers=2))


@pytest.fixture
def small_params(tiny_params):
    blocks = jax.device_get(tiny_params["blocks"])
    return tiny_params | {"blocks": jax.tree.map(lambda a: jnp.asarray(a[:2]), blocks)}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_same_however_documents_share_rows(name, small, small_params):
    finetuner, (a, b, c, d) = STEPS[name], documents()
    state = finetuner.init(small, small_params, {}, jax.random.key(1))
    step = jax.jit(lambda state, batch: finetuner.step(small, state, batch))
    found = [
        step(state, in_rows(*rows))[1] for rows in ([[a, b], [c, d]], [[d, b], [a, c]])
    ]
    for metric in ("loss", "grad_norm"):
        ours, theirs = (own[metric] for own in found)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    compute = jax.jit(next_token_loss, static_argnums=0)
    expected = compute(small, small_params, alone([a, b, c, d]))
    np.testing.assert_allclose(found[0]["loss"], expected, rtol=1e-5)


def test_a_router_counts_the_tokens_that_it_counts_of_documents_alone(
    small, small_params
):
    """The last token of each has no target: nothing that is learnt depends on it."""
    finetuner = MixLora(mixtures=(Mixture(rank=2, experts=4),), dropout=0.0)
    state = finetuner.init(small, small_params, {}, jax.random.key(1))
    a, b, c, d = documents()
    load = jax.jit(lambda batch: finetuner.load(small, state, batch))
    found, expected = load(in_rows([a, b], [c, d])), load(alone([a, b, c, d]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_run_on_packed_rows_is_resumed_bit_for_bit(small, small_params, tmp_path):
    finetuner = FINETUNERS["lora-fused"].finetuner
    data = Loader(pack(documents(40), 20), batch_size=2)
    assert (data.batch(0).segments > 1).any()

    def run(folder, steps, **settings):
        params = jax.tree.map(jnp.copy, small_params)
        state = finetuner.init(small, params, {}, jax.random.key(1))
        settings |= {"folder": tmp_path / folder, "progress": False}
        return train(finetuner, small, state, data, steps=steps, **settings)

    run("halves", 2)
    halves, whole = run("halves", 4, resume=True), run("whole", 4)
    for ours, theirs in zip(jax.tree.leaves(halves), jax.tree.leaves(whole)):
        np.testing.assert_array_equal(ours, theirs)
