"""Rows of several documents: nothing passes between them, and no T*T array is made."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmem
from jmem.data.batch import Batch
from jmem.finetune.full import Full
from jmem.finetune.program import step_program
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.nn.attention import grouped_attention
from jmem.nn.packed import attend_packed, number_positions, take_rows


def test_positions_begin_with_every_run_of_one_number():
    segments = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
    expected = [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert number_positions(segments).tolist() == expected


class TestAttention:
    """12 tokens a row; the second row's documents lie elsewhere."""

    segments = jnp.array([[1] * 5 + [2] * 6 + [0], [1] + [2] * 2 + [3] * 9])

    def arguments(self, kv_heads):
        keys = jax.random.split(jax.random.key(kv_heads), 4)
        shapes = [(2, 12, heads, 8) for heads in (4, kv_heads, kv_heads, 4)]
        return [jax.random.normal(*own) for own in zip(keys, shapes)]

    def masked(self, q, k, v, window):
        """All scores at once, as the segments allow."""
        ago = jnp.arange(12)[:, None] - jnp.arange(12)[None]
        seen = (ago >= 0) & (ago < (window or 12))
        seen = seen[None] & (self.segments[:, :, None] == self.segments[:, None])
        return grouped_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen)

    @pytest.mark.parametrize(
        "block, window, kv_heads", [(4, None, 2), (5, None, 4), (3, 4, 1), (99, 2, 2)]
    )
    def test_blocks_are_all_scores_at_once_and_so_are_gradients(
        self, block, window, kv_heads
    ):
        *inputs, dout = self.arguments(kv_heads)
        positions = number_positions(self.segments)

        def blocks(q, k, v):
            return attend_packed(q, k, v, positions, window, block)

        @jax.jit
        def both(inputs, dout):
            found = jax.vjp(blocks, *inputs)
            expected = jax.vjp(lambda q, k, v: self.masked(q, k, v, window), *inputs)
            return [(out, *transpose(dout)) for out, transpose in (found, expected)]

        for ours, theirs in zip(*both(inputs, dout)):
            # Sums of up to 12 products of numbers around 1.
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_blocks_that_share_no_document_are_passed_over(self):
        """What is not read cannot spoil: 0 * nan would be nan."""
        q, k, v, _ = self.arguments(2)
        positions = number_positions(jnp.array([[1] * 4 + [2] * 8] * 2))
        k, v = (a.at[:, :4].set(jnp.nan) for a in (k, v))
        out = attend_packed(q, k, v, positions, block=4)
        assert jnp.isfinite(out[:, 4:]).all()


def test_rows_of_a_table_and_their_gradient():
    random = np.random.default_rng(0)
    table = jnp.asarray(random.standard_normal((5, 3)), jnp.float32)
    tokens = jnp.array([[1, 4, 1], [0, 1, 4]])
    drows = jnp.asarray(random.standard_normal((2, 3, 3)), jnp.float32)
    for first in (drows[0, 0, 0], -1.0, jnp.nan, jnp.inf):
        given = drows.at[0, 0, 0].set(first)
        found, expected = (
            jax.vjp(take, table)
            for take in (lambda t: take_rows(t, tokens), lambda t: t[tokens])
        )
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1](given)[0], expected[1](given)[0])


def program(target, rows, length, segments, attention=None, **sizes):
    """A step of one layer of SmolLM2-135M, or of a model of these sizes."""
    card = jmem.targets.resolve(target)
    sizes = {"name": "smollm2-135m", "layers": 1, "remat": "none"} | sizes
    config = zoo.get(sizes["name"])
    config = dataclasses.replace(config, layers=sizes["layers"], max_positions=length)
    model = Decoder.on(card, config, dtype="bfloat16", remat=sizes["remat"])
    model = dataclasses.replace(model, attention=attention or model.attention)

    def make(key):
        tokens = jnp.zeros((rows, length), jnp.int32)
        weights = jnp.ones((rows, length), jnp.float32)
        return Batch(tokens, tokens, weights, tokens if segments else None)

    return step_program(Full(), model, batch=make), card


@pytest.mark.compat
@pytest.mark.parametrize(
    "target, rows, length", [("h200", 8, 4096), ("rtx4090", 1, 1024)]
)
def test_no_square_of_a_row_s_tokens_is_made(target, rows, length):
    def squares(segments, attention=None):
        own, card = program(target, rows, length, segments, attention)
        text = own.lower(card).stage.as_text()
        return re.findall(rf"tensor<(?:\d+x)*{length}x(?:\d+x)*{length}x", text)

    assert squares(segments=False, attention="xla")  # the reader sees what is there
    assert not squares(segments=True)


def test_a_packed_step_takes_the_bytes_of_another():
    """Where an embedding's gradient made early is 5 % of the step."""
    sizes = {"name": "tinyllama-1.1b", "layers": 2, "remat": "block"}

    def count(segments):
        own, card = program("h200", 8, 4096, segments, **sizes)
        plan: Any = own.compile(card).memory_analysis()
        return plan.total_allocation_bytes

    assert count(segments=True) < 1.01 * count(segments=False)
