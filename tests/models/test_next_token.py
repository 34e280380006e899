"""The chunked loss equals the plain one and never makes all logits."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import random_params

from jmem.models import next_token as loss_module
from jmem.models.decoder import Decoder
from jmem.models.next_token import next_token_loss, token_positions
from jmem.nn.stack import run_stack


def plain_loss(model, params, batch):
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
    expected = jax.jit(jax.value_and_grad(lambda p: plain_loss(model, p, batch)))(
        params
    )
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
