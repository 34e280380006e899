"""The time of decoding: a cache is filled as a prompt would leave it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY

from jmem.generate.rate import fill
from jmem.kvcache.cache import find_held
from jmem.kvcache.full import Full
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.windowkv import WindowKV
from jmem.models.decoder import Decoder

MODEL = Decoder(dataclasses.replace(TINY, layers=4, max_positions=128))
SMALL = {
    "full": Full(),
    "snapkv": SnapKV(capacity=24, window=8),
    "windowkv": WindowKV(capacity=16, observation=8, group=2, divisor=4),
}


@pytest.mark.parametrize("name", SMALL)
def test_all_slots_that_a_prompt_fills_are_attended(name):
    plan = SMALL[name].plan(MODEL, prompt=64, new_tokens=4, batch_size=2)
    cache = fill(plan, jax.random.key(0))
    assert {n: (a.shape, a.dtype) for n, a in cache._asdict().items()} == {
        n: (a.shape, a.dtype) for n, a in plan.arrays().items()
    }
    for layer, selected in enumerate(plan.selected):
        last = jnp.full((2,), plan.prompt - 1, jnp.int32)
        _, seen = find_held(plan, cache, last, jnp.int32(layer))
        assert (np.asarray(seen.sum(axis=-1)) == selected + plan.recent).all()
