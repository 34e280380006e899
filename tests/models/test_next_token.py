"""The chunked loss equals the plain one and never makes all logits."""

# pyright: reportOptionalSubscript=false, reportOptionalIterable=false
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false
# Segments are None in rows of one document.

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from jmem.data.windows import pack, pad
from jmem.finetune.adapters import attach
from jmem.finetune.lora import Lora, lora_linear
from jmem.models import next_token as loss_module
from jmem.models.decoder import Decoder
from jmem.models.next_token import find_positions, next_token_loss, token_positions
from jmem.nn import packed
from jmem.nn.stack import run_stack


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def plain_loss(model, params, batch):
    """And its gradients: compiled once for all sizes of chunks."""
    positions = token_positions(batch.tokens)
    x = model.embed(params, batch.tokens)
    x, _, _ = run_stack(model.block, params["blocks"], x, positions, model.ops)
    log_p = jax.nn.log_softmax(model.head(params, x, model.ops))
    picked = jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
    return -(batch.weights * picked).sum() / batch.weights.sum()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [3, 8, 256])  # 20 tokens: padded, padded, one chunk
def test_loss_and_gradients_equal_the_plain_form(
    tiny_config, random_batch, monkeypatch, chunk, tied
):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    model = Decoder(dataclasses.replace(tiny_config, tied=tied))
    params = jax.tree.map(jnp.asarray, random_params(model.config, scale=0.1))
    batch = random_batch(model)
    expected = plain_loss(model, params, batch)
    found = jax.jit(jax.value_and_grad(lambda p: next_token_loss(model, p, batch)))(
        params
    )
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-6)


def test_a_scaled_loss_has_scaled_gradients(tiny, tiny_params, random_batch):
    """The forward pass makes the head's gradients: the cotangent must still arrive."""
    params, batch = tiny_params, random_batch(tiny)
    grad = jax.jit(jax.grad(lambda p, by: by * next_token_loss(tiny, p, batch)))
    thrice = jax.tree.map(lambda g: 3 * g, grad(params, 1.0))
    chex.assert_trees_all_close(grad(params, 3.0), thrice, rtol=1e-5, atol=1e-6)


def every_shape(jaxpr):
    """Shapes of every value in a jaxpr and in the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for value in jax.tree.leaves(
            eqn.params, is_leaf=lambda v: hasattr(v, "jaxpr") or hasattr(v, "eqns")
        ):
            if hasattr(value, "jaxpr"):
                yield from every_shape(value.jaxpr)
            elif hasattr(value, "eqns"):
                yield from every_shape(value)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_all_logits_never_exist(tiny_config, random_batch, monkeypatch, remat):
    monkeypatch.setattr(loss_module, "CHUNK", 8)
    model = Decoder(dataclasses.replace(tiny_config, vocab_size=1009), remat=remat)
    batch = random_batch(model, seq_len=32)
    gradient = jax.grad(lambda p: next_token_loss(model, p, batch))
    traced = jax.make_jaxpr(gradient)(model.abstract())
    largest = max(np.prod(s) for s in every_shape(traced.jaxpr) if 1009 in s)
    assert largest == 32 * 1009  # the head's own weight; 64 * 1009 would be the logits


def test_weight_zero_leaves_a_target_out(tiny, tiny_params, random_batch):
    params, batch = tiny_params, random_batch(tiny)
    loss = jax.jit(lambda batch: next_token_loss(tiny, params, batch))
    other = jnp.where(batch.weights == 0, (batch.targets + 1) % 48, batch.targets)
    assert loss(batch._replace(targets=other)) == loss(batch)


def test_a_batch_without_targets_has_loss_zero(tiny, tiny_params, random_batch):
    params, batch = tiny_params, random_batch(tiny)
    empty = batch._replace(weights=jnp.zeros_like(batch.weights))
    loss = jax.jit(jax.value_and_grad(lambda p: next_token_loss(tiny, p, empty)))
    value, grads = loss(params)
    assert value == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


class TestPackedRows:
    """Three documents in one row, beside the same ones in rows of their own."""

    LENGTHS = (60, 130, 110)
    """The second one, and the third, begin in one block of keys and end in another."""

    def documents(self, seed=0):
        random = np.random.default_rng(seed)
        drawn = (random.integers(0, 48, length) for length in self.LENGTHS)
        return [own.astype(np.int32) for own in drawn]

    @pytest.fixture
    def run(self, monkeypatch, learned, remat):
        monkeypatch.setattr(packed, "BLOCK", 64)
        return self.build(learned, remat)

    @staticmethod
    @functools.cache
    def build(learned, remat):
        """Batch -> (loss, gradients of adapters and embedding), logits."""
        config = dataclasses.replace(TINY, layers=2)
        if learned:
            config = dataclasses.replace(config, positions="learned", max_positions=299)
        model = Decoder(config, remat=remat)
        lora = Lora(rank=2, maps=("q", "v", "up"))
        ops = model.ops._replace(linear=lora_linear(lora.scale))
        params = jax.tree.map(jnp.asarray, random_params(config, scale=0.1))
        adapters = jax.eval_shape(lora.adapters, params["blocks"], jax.random.key(0))
        random = np.random.default_rng(1)
        adapters = jax.tree.map(
            lambda leaf: jnp.float32(0.1 * random.standard_normal(leaf.shape)), adapters
        )

        def loss(trained, batch):
            own = params | {"blocks": attach(params["blocks"], trained["adapters"])}
            own |= {"embed": trained["embed"]}
            return next_token_loss(model, own, batch, ops)

        def logits(batch):
            positions = find_positions(batch)
            blocks = attach(params["blocks"], adapters)
            x = model.embed(params, batch.tokens, positions)
            x, _, _ = run_stack(model.block, blocks, x, positions, ops)
            return model.head(params, x, ops)

        trained = {"adapters": adapters, "embed": params["embed"]}

        @jax.jit
        def both(batch):
            return jax.value_and_grad(loss)(trained, batch), logits(batch)

        return both

    @pytest.mark.parametrize("learned, remat", [(False, "block"), (True, "none")])
    def test_they_are_learnt_as_if_each_were_alone(self, run):
        documents = self.documents()
        length = sum(self.LENGTHS) - 1
        (together, alone) = pack(documents, length), pad(documents, 129)
        found, logits = run(together)
        expected, apart = run(alone)
        assert together.weights.sum() == alone.weights.sum() == length - 2
        chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-6)
        start = 0
        for row, own in enumerate(self.LENGTHS):
            ours = logits[0, start : start + own - 1]
            np.testing.assert_allclose(ours, apart[row, : own - 1], atol=2e-5)
            start += own

    @pytest.mark.parametrize("learned, remat", [(False, "block")])
    def test_another_document_before_changes_no_bit(self, run):
        """Of the loss of those behind it, and of its gradients."""
        documents, length = self.documents(), sum(self.LENGTHS) - 1
        given = pack(documents, length)
        weights = np.where(given.segments == 1, np.float32(0), given.weights)
        other = pack([self.documents(seed=7)[0], *documents[1:]], length)
        assert (given.tokens != other.tokens).any()
        found, _ = run(given._replace(weights=weights))
        expected, _ = run(other._replace(weights=weights))
        chex.assert_trees_all_equal(found, expected)
