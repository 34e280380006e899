"""Moments at rest on the host are those on the device, to the bit, at less memory."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem
from jmem.finetune.adamw import AdamW
from jmem.finetune.lisa import Lisa
from jmem.finetune.program import step_program
from jmem.finetune.resting import Resting, swap
from jmem.models.decoder import Decoder
from jmem.offload import is_on_host, on_host
from jmem.train.loop import train

UPDATES = {
    "fused": AdamW(learning_rate=1e-2, max_grad_norm=0),
    "fused, 8 bits": AdamW(learning_rate=1e-2, max_grad_norm=0, moment_dtype="float8"),
    "separate": AdamW(learning_rate=1e-2),
}


def start(lisa, model):
    params = jax.tree.map(jnp.asarray, random_params(TINY, scale=0.1))
    return jax.jit(lambda p: lisa.init(model, p, {}, jax.random.key(1)))(params)


def lisas(update: str) -> tuple[Lisa, Lisa]:
    """The same method with its moments on the device and on the host."""
    there = Lisa(moments="persist", persist_in="host", period=2, adamw=UPDATES[update])
    return dataclasses.replace(there, persist_in="device"), there


def moments_of_all(lisa, state):
    """Of every block, from wherever they are: as a state has them on the device."""
    if "resting" not in state:
        return state["blocks"]
    resting, slots = state["resting"], state["blocks"]

    def leaf(rested, slot):
        rested = np.array(rested)
        rested[np.asarray(resting.held)] = slot
        return rested

    return jax.tree.map(leaf, resting.moments, slots)


@pytest.mark.parametrize("update", UPDATES)
def test_host_is_device_to_the_bit(update, tiny, random_batch):
    """Over draws that share blocks and draws that do not; one program for all."""
    found = []
    for lisa in lisas(update):
        state = start(lisa, tiny)
        step: Any = jax.jit(
            lambda state, batch, lisa=lisa: lisa.step(tiny, state, batch),
            donate_argnums=0,
        )
        told = []
        for seed in range(9):
            state, metrics = step(state, random_batch(tiny, seed))
            told.append(jax.device_get(metrics))
        assert step._cache_size() == 1
        found.append((state["params"], state["outside"], told))
        found[-1] += (moments_of_all(lisa, state),)
    chex.assert_trees_all_equal(*found)
    drawn = {tuple(metrics["active"]) for metrics in found[0][2]}
    assert len(drawn) > 2


def test_host_is_device_across_a_checkpoint(tiny, random_batch, tmp_path):
    """Stopped in the middle of a period and resumed: still the same bits.

    A folder knows arrays and their places; by which step they came does not matter.
    """

    class Data:
        digest = "random"

        def batch(self, step):
            return random_batch(tiny, step)

    def run(lisa, folder, *stops):
        state: Any = None
        for stop in stops:
            state = train(
                *(lisa, tiny, start(lisa, tiny), Data()),
                steps=stop,
                folder=tmp_path / folder,
                resume=stop != stops[0],
                progress=False,
            )
        return state

    device, host = lisas("fused")
    there = run(host, "stopped", 3, 7)
    rested = jax.tree.leaves(there["resting"].moments)
    assert {is_on_host(leaf) for leaf in rested if leaf.ndim > 1} == {True}
    here = run(device, "at once", 7)
    chex.assert_trees_all_equal(here["params"], there["params"])
    chex.assert_trees_all_equal(here["blocks"], moments_of_all(host, there))


def test_a_block_may_change_its_slot():
    rows = jnp.arange(5.0)[:, None] * jnp.ones((5, 3))
    resting = Resting({"m": on_host(rows), "count": jnp.arange(5)}, jnp.asarray([1, 2]))
    slots = {"m": jnp.asarray([[10.0] * 3, [20.0] * 3]), "count": jnp.asarray([11, 12])}
    active = jnp.asarray([2, 4])
    resting, slots = jax.jit(swap)(resting, slots, active)
    assert slots["m"][:, 0].tolist() == [20, 4]
    assert slots["count"].tolist() == [12, 4]
    assert resting.held.tolist() == [2, 4]
    assert np.array(resting.moments["m"])[:, 0].tolist() == [0, 10, 20, 3, 4]


def test_compiled_for_an_h200_it_costs_the_device_slots_only():
    """Host: every block's moments, once. Device: as if nothing persisted."""
    card = jmem.targets.resolve("h200")
    config = dataclasses.replace(TINY, hidden=128, head_dim=64, intermediate=512)
    model = Decoder.on(card, config, dtype="bfloat16")
    _, there = lisas("fused")
    forgets = dataclasses.replace(there, moments="reset_layers", persist_in="device")

    def measured(lisa):
        program = step_program(lisa, model, batch_size=1, seq_len=64)
        return jmem.measure(program, target=card, bounds=False)

    host, device = measured(there), measured(forgets)
    block = sum(
        leaf.size // config.layers
        for leaf in jax.tree.leaves(model.abstract()["blocks"])
    )
    assert host.host_bytes == 8 * block * config.layers
    smallest = 4 * 128 * 128  # a moment of the key projection
    assert host.device_bytes < device.device_bytes + smallest
    assert "optimizer" in host.host_by_label


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"persist_in": "host"}, r"moments='reset_layers' forgets them"),
        (
            {"persist_in": "host", "moments": "persist", "active_layers": 0},
            r"active_layers=0 trains none",
        ),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Lisa(**settings)
