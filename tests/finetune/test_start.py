"""Where training starts: weights that stay, and a state of a copy of them."""

import dataclasses

import chex
import jax
import pytest

import jmem.checkpoints
from jmem import offload
from jmem.finetune.full import Full
from jmem.finetune.start import init_state, load_params
from jmem.sharding import Layout


def test_pretrained_weights_stay_and_the_state_holds_a_copy(tiny, tiny_params):
    state = init_state(Full(), tiny, tiny_params, seed=3)
    own, stats = Full().merged(state)
    chex.assert_trees_all_equal(own, tiny_params)
    assert stats == {}
    jax.tree.map(lambda leaf: leaf.delete(), own)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(tiny_params))


def test_a_host_without_room_is_refused(tiny, tiny_params, monkeypatch):
    monkeypatch.setattr(offload, "count_available_host_bytes", lambda: 0)
    with pytest.raises(offload.HostMemoryError, match="the state of Full"):
        init_state(Full(moments="host"), tiny, tiny_params, seed=0)


@pytest.fixture
def checkpoint(tiny_config, tiny_params, tmp_path):
    jmem.checkpoints.save(tiny_params, tiny_config, tmp_path / "model")
    return jmem.checkpoints.load(tmp_path / "model")


def test_weights_without_a_mesh_are_the_checkpoints(tiny, tiny_params, checkpoint):
    chex.assert_trees_all_equal(load_params(tiny, checkpoint), tiny_params)


def test_weights_of_a_mesh_are_placed_by_its_layout(tiny, tiny_params, checkpoint):
    layout = Layout()
    model = dataclasses.replace(tiny)
    object.__setattr__(model, "layout", layout)  # of the one device that there is
    mesh = layout.mesh()
    found = load_params(model, checkpoint, mesh)
    chex.assert_trees_all_equal(found, tiny_params)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(found)} == {mesh}
