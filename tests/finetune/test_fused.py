"""The fused step is the separate one in other order, and makes no whole gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY

import jmem
import jmem.finetune.fused as fused
import jmem.finetune.tables as tables
from jmem.data.batch import Batch
from jmem.finetune.adamw import AdamW
from jmem.finetune.lisa import Lisa
from jmem.finetune.program import step_program
from jmem.models.decoder import Decoder

CONFIG = dataclasses.replace(
    TINY, layers=3, hidden=16, head_dim=4, intermediate=24, max_positions=32
)
VARIANTS = {
    "llama": {},
    "tied": {"tied": True},
    "gpt2": {
        "norm": "layer",
        "positions": "learned",
        "gated": False,
        "activation": "gelu_new",
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "tied": True,
    },
    "phi2": {
        "norm": "layer",
        "parallel": True,
        "gated": False,
        "activation": "gelu_new",
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "head_bias": True,
    },
}
ADAMW = AdamW(learning_rate=1e-2, max_grad_norm=0, weight_decay=0.01, eps=1e-2)


def batches(count):
    random = np.random.default_rng(0)
    for _ in range(count):
        tokens = random.integers(0, 48, (2, 11)).astype(np.int32)
        weights = (random.random((2, 10)) < 0.8).astype(np.float32)
        yield Batch(tokens[:, :-1], tokens[:, 1:], weights)


@functools.cache
def weights_of(model):
    return jax.jit(model.init)(jax.random.key(0))


def both(model, count=7, **settings):
    """States and metrics after some steps, separate and fused."""
    found = []
    for update in ("separate", "fused"):
        lisa = Lisa(update=update, **{"adamw": ADAMW, "period": 3} | settings)
        state = lisa.init(model, weights_of(model), {}, jax.random.key(1))
        step: Any = jax.jit(lisa.step, static_argnums=0)
        told = []
        for batch in batches(count):
            state, metrics = step(model, state, batch)
            told.append(metrics)
        assert step._cache_size() == 1
        found.append((state, told))
    return found


def same(found, atol=1e-6):
    (state, told), (fused_state, fused_told) = found
    for one, other in zip(told, fused_told):
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=2e-5, err_msg=name)
    assert jax.tree.structure(state) == jax.tree.structure(fused_state)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(fused_state)
    ):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=atol, err_msg=jax.tree_util.keystr(path))


CASES = {
    "llama": {"moments": "reset_all", "active_layers": 1},
    "llama, no block": {"active_layers": 0},
    "llama, every block": {"moments": "persist", "active_layers": 3},
    "llama, no embedding": {"train": ("blocks", "head"), "moments": "persist"},
    "llama, head": {"train": ("head", "blocks/mlp"), "active_layers": 0},
    "llama, norms": {"train": ("*norm*", "blocks/mlp/up")},
    "tied": {"moments": "persist"},
    "gpt2": {"adamw": dataclasses.replace(ADAMW, layer_decay=0.8)},
    "phi2": {
        "adamw": dataclasses.replace(
            ADAMW, rates=(("head", 3.0),), convention="transformers", warmup_steps=3
        )
    },
}


@pytest.mark.parametrize(
    ("case", "tiles"),
    [(case, tiles) for case in CASES for tiles in ((1, 8) if case == "tied" else (4,))],
)
def test_fused_is_separate(case, tiles, monkeypatch):
    """Every architecture, every kind of moments; numbers of tiles do not matter."""
    monkeypatch.setattr(tables, "TABLE", 48 * 16 // tiles)
    monkeypatch.setattr(fused, "TILES", tiles)
    model = Decoder(dataclasses.replace(CONFIG, **VARIANTS[case.split(",")[0]]))
    found = both(model, **CASES[case])
    same(found)
    if "no embedding" in case:
        start = weights_of(model)["embed"]["embedding"]
        table = found[1][0]["params"]["embed"]["embedding"]
        np.testing.assert_array_equal(table, start)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_moments_of_few_bits_learn_as_well(dtype):
    """Three texts by heart: the loss falls as far as with float32, or nearly.

    With 16-bit moments the weights, too, are of 16 bits.
    """
    weights = jnp.float32 if dtype == "float8" else jnp.bfloat16
    model = Decoder(dataclasses.replace(CONFIG, layers=2), dtype=weights)
    losses = {}
    for kind in ("float32", dtype):
        adamw = AdamW(learning_rate=1e-2, max_grad_norm=0, moment_dtype=kind)
        lisa = Lisa(adamw=adamw, active_layers=2, moments="persist")
        params = jax.tree.map(jnp.copy, weights_of(model))
        state = lisa.init(model, params, {}, jax.random.key(1))
        held = jax.tree.leaves((state["outside"], state["blocks"]))
        size = sum(x.nbytes for x in held)
        step = jax.jit(lisa.step, static_argnums=0, donate_argnums=1)
        texts = list(batches(3))
        loss = jnp.inf
        for number in range(90):
            state, metrics = step(model, state, texts[number % 3])
            loss = metrics["loss"]
        losses[kind] = float(loss), size
    assert losses["float32"][0] < 1.0  # from ln(48) = 3.9
    assert losses[dtype][0] < losses["float32"][0] + 0.15
    share = {"bfloat16": 0.51, "float8": 0.36}[dtype]  # rows here are short for scales
    assert losses[dtype][1] < share * losses["float32"][1]


def test_eight_bits_need_a_fused_step():
    adamw = AdamW(moment_dtype="float8")
    model = Decoder(CONFIG)
    params, key = model.abstract(), jax.random.key(1)
    with pytest.raises(ValueError, match="needs a fused step"):
        Lisa(adamw=adamw).init(model, params, {}, key)


def test_auto_fuses_where_nothing_needs_all_gradients():
    assert Lisa(adamw=ADAMW).fuses
    assert not Lisa().fuses  # clips
    assert not Lisa(adamw=ADAMW, accumulate=2).fuses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update": "fused"}, "max_grad_norm=1.0"),
        ({"update": "fused", "adamw": ADAMW, "accumulate": 2}, "accumulate=2"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Lisa(**settings)


def test_no_gradient_of_a_whole_weight(monkeypatch):
    """Compiled for an H200: no float32 buffer of a weight's size but moments."""
    monkeypatch.setattr(tables, "TABLE", 2**18)
    card = jmem.targets.resolve("h200")
    config = dataclasses.replace(
        CONFIG, vocab_size=4096, hidden=512, head_dim=128, intermediate=1536
    )
    model = Decoder.on(card, config, dtype="bfloat16")
    program = step_program(Lisa(adamw=ADAMW), model, batch_size=1, seq_len=32)
    report = jmem.measure(program, target=card, bounds=False)
    smallest = 512 * 512 * 4  # the gradient of q, o
    wide = [
        row
        for row in report.top(1000)
        if row.shape.startswith("f32") and row.bytes >= smallest
        if row.kind not in ("parameters", "optimizer", "outputs")
    ]
    assert not wide
    assert report.top(1000)


def test_parts_of_a_vocabulary():
    assert tables.count_parts(32000, 4096) == 32
    assert tables.count_parts(32001, 4096) == 3  # and a prime
    assert tables.count_parts(50257, 768) == 29
    assert tables.count_parts(48, 16) == 1
