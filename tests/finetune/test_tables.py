"""Moments of embedding and head: on the host the same bits, factored far fewer."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from tiny_decoder import TINY, random_params

import jmem
from jmem.finetune import tables
from jmem.finetune.adamw import AdamW
from jmem.finetune.lisa import Lisa
from jmem.finetune.program import step_program
from jmem.models.decoder import Decoder
from jmem.offload import is_on_host

ADAMW = AdamW(learning_rate=1e-2, max_grad_norm=0, weight_decay=0.01)


def trained(lisa, model, random_batch, steps=5):
    params = jax.tree.map(
        jnp.asarray, random_params(model.config, model.stored_dtype, scale=0.2)
    )
    state = jax.jit(lambda p: lisa.init(model, p, {}, jax.random.key(1)))(params)
    step: Any = jax.jit(lambda s, b: lisa.step(model, s, b), donate_argnums=0)
    told = []
    for seed in range(steps):
        state, metrics = step(state, random_batch(model, seed % 2))
        told.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    return state, told


@pytest.mark.parametrize(
    ("moment_dtype", "tied"),
    [("float32", True), ("bfloat16", False), ("float8", False)],
)
def test_host_is_device_to_the_bit(moment_dtype, tied, random_batch, monkeypatch):
    """Tables in parts; moments that a draw forgets, too, and random rounding."""
    monkeypatch.setattr(tables, "TABLE", 48 * 32 // 4)
    config = dataclasses.replace(TINY, layers=2, tied=tied)
    adamw = dataclasses.replace(ADAMW, moment_dtype=moment_dtype)
    here = Lisa(active_layers=1, period=2, moments="reset_all", adamw=adamw)
    there = dataclasses.replace(here, outside_moments="host")
    model = Decoder(config)
    found = [trained(lisa, model, random_batch) for lisa in (here, there)]
    for part in ("params", "blocks"):
        chex.assert_trees_all_equal(*(state[part] for state, _ in found))
    chex.assert_trees_all_equal(*(told for _, told in found))
    moments = jax.tree.leaves(found[1][0]["outside"])
    hosted = sum(leaf.nbytes for leaf in moments if is_on_host(leaf))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(found[0][0]["outside"]))
    assert hosted > 0.9 * kept


def test_factored_learns_with_a_float_a_row_and_a_column(random_batch):
    model = Decoder(dataclasses.replace(TINY, layers=2))
    lisa = Lisa(active_layers=1, outside_moments="factored", adamw=ADAMW)
    state, told = trained(lisa, model, random_batch, steps=30)
    assert told[-1]["loss"] < told[0]["loss"] - 0.5
    size = sum(leaf.size for leaf in jax.tree.leaves(state["outside"].moments))
    assert size == 2 * (48 + 32) + 32


def test_compiled_for_an_h200_no_table_is_copied(monkeypatch):
    """XLA copied the head where its moments' pieces lay otherwise than the head."""
    monkeypatch.setattr(tables, "TABLE", 2**18)
    card = jmem.targets.resolve("h200")
    config = dataclasses.replace(
        TINY, vocab_size=8192, layers=2, hidden=256, head_dim=64
    )
    model = Decoder.on(card, config, dtype="bfloat16")
    lisa = Lisa(active_layers=1, outside_moments="host", adamw=ADAMW)
    program = step_program(lisa, model, batch_size=1, seq_len=32)
    report = jmem.measure(program, target=card, bounds=False)
    table = 8192 * 256
    held = [row for row in report.top(100) if row.kind != "workspace"]  # cuBLAS's own
    large = [row for row in held if row.bytes >= 2 * table]
    assert sum(row.count for row in large) == 2  # embedding and head themselves
    assert report.host_bytes == 2 * 2 * 4 * table  # two moments of two tables


def test_needs_a_fused_step():
    for kind in ("host", "factored"):
        with pytest.raises(ValueError, match=f"outside_moments='{kind}' needs a fused"):
            Lisa(outside_moments=kind)
