"""Blocks in turn: each comes as often as the others, whatever the groups."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.finetune.lisa import Lisa
from jmem.finetune.orders import choose_active, outlier_weights


def periods(order, count, layers, active_layers):
    key = jax.random.key(3)
    run: Any = jax.jit(lambda n: choose_active(n, order, key, layers, active_layers))
    found = np.stack([run(jnp.int32(n)) for n in range(count)])
    assert run._cache_size() == 1
    assert (np.diff(found, axis=1) > 0).all()  # distinct and ascending
    assert ((found >= 0) & (found < layers)).all()
    return found


def test_up_and_down():
    up = periods("ascending", 4, 6, 2)
    np.testing.assert_array_equal(up, [[0, 1], [2, 3], [4, 5], [0, 1]])
    down = periods("descending", 4, 6, 2)
    np.testing.assert_array_equal(down, [[4, 5], [2, 3], [0, 1], [4, 5]])


def test_round_the_end():
    found = periods("ascending", 5, 5, 2)
    np.testing.assert_array_equal(found[2], [0, 4])
    np.testing.assert_array_equal(np.bincount(found.ravel()), [2] * 5)


@pytest.mark.parametrize("active_layers", [1, 2, 3, 6])
def test_a_permutation_visits_every_block_once(active_layers):
    groups = 6 // active_layers
    found = periods("reshuffled", 5 * groups, 6, active_layers)
    for start in range(0, 5 * groups, groups):
        rounds = found[start : start + groups].ravel()
        np.testing.assert_array_equal(np.sort(rounds), np.arange(6))
    if active_layers == 1:
        assert len({tuple(found[n : n + 6].ravel()) for n in range(0, 30, 6)}) > 1


def test_groups_that_do_not_divide_leave_others_out_each_time():
    found = periods("reshuffled", 60, 5, 2)
    left_out = [set(range(5)) - set(found[n : n + 2].ravel()) for n in range(0, 60, 2)]
    assert all(len(out) == 1 for out in left_out)
    assert len(set.union(*left_out)) == 5


def test_none_active():
    for order in ("drawn", "ascending", "descending", "reshuffled"):
        assert periods(order, 2, 4, 0).shape == (2, 0)


def test_lisa_in_turn(tiny):
    lisa = Lisa(active_layers=2, period=3, order="descending")
    layers = tiny.config.layers
    state = {"key": jax.random.key_data(jax.random.key(0)), "step": jnp.int32(2)}
    np.testing.assert_array_equal(lisa.active(state, layers), [layers - 2, layers - 1])
    state["step"] = jnp.int32(3)
    np.testing.assert_array_equal(lisa.active(state, layers), [layers - 4, layers - 3])


def test_refuses_weights_in_turn():
    with pytest.raises(ValueError, match="order='ascending' none is"):
        Lisa(active_layers=1, order="ascending", weights=(1.0, 2.0))


def test_outliers_by_hand():
    kernel = np.full((3, 10, 10), 0.1, np.float32)
    kernel[1, 0, :2] = 50.0
    kernel[2, 0, :1] = -50.0
    blocks = {"q": {"kernel": jnp.asarray(kernel), "bias": jnp.full((3, 10), 9.0)}}
    weights = outlier_weights({"blocks": blocks})
    np.testing.assert_allclose(weights, [0, 0.02, 0.01])
    assert Lisa(active_layers=2, weights=weights)
    with pytest.raises(ValueError, match="threshold=600"):
        outlier_weights({"blocks": blocks}, threshold=600)
