"""A policy cut to bytes: the largest that fits, by the bytes of its own plan."""

import dataclasses
import time
from typing import Any

import jax.numpy as jnp
import pytest
from tiny_decoder import TINY

from jmem.kvcache.budget import fit_to_bytes
from jmem.kvcache.full import Full
from jmem.kvcache.members import POLICIES
from jmem.kvcache.pyramidkv import PyramidKV
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.windowkv import WindowKV
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.targets import resolve

MODEL = Decoder(dataclasses.replace(TINY, layers=12))
SIZES: Any = {"prompt": 30, "new_tokens": 3, "batch_size": 2}
FULL = Full().plan(MODEL, **SIZES).bytes()
LLAMA = Decoder(zoo.get("llama3.1-8b"), dtype=jnp.bfloat16)


def nbytes(policy) -> int:
    return policy.plan(MODEL, **SIZES).bytes()


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_no_larger_capacity_fits(name):
    """Tried one by one."""
    policy: Any = POLICIES[name]
    sizes = {}
    for capacity in range(1, 34):
        try:
            sizes[capacity] = nbytes(dataclasses.replace(policy, capacity=capacity))
        except ValueError:  # below what the policy allows
            assert not sizes
    # The equal steps of a pyramid are rounded: a larger capacity may take less.
    uneven = "pyramidkv" in name or "windowkv" in name
    assert ([*sizes.values()] != sorted(sizes.values())) == uneven
    found = []
    for budget in sorted({*sizes.values(), FULL}):
        expected = max(c for c, size in sizes.items() if size <= budget)
        cut: Any = fit_to_bytes(policy, MODEL, budget, **SIZES)
        assert cut == dataclasses.replace(policy, capacity=expected)
        found.append(cut.capacity)
    assert found == sorted(found)
    with pytest.raises(ValueError, match=f"takes {min(sizes.values()):,} bytes"):
        fit_to_bytes(policy, MODEL, min(sizes.values()) - 1, **SIZES)


def test_full_is_all_or_nothing():
    assert fit_to_bytes(Full(), MODEL, FULL, **SIZES) == Full()
    with pytest.raises(ValueError, match=f"Full takes {FULL:,} bytes .* 2 rows"):
        fit_to_bytes(Full(), MODEL, FULL - 1, **SIZES)


def test_more_than_everything_is_everything():
    cut: Any = fit_to_bytes(SnapKV(), MODEL, 10 * FULL, **SIZES)
    assert cut.capacity == 33
    assert cut.plan(MODEL, **SIZES).sizes == Full().plan(MODEL, **SIZES).sizes


def test_a_short_prompt_is_kept_whole_by_a_policy_made_for_longer_ones():
    sizes = SIZES | {"prompt": 9}
    cut = fit_to_bytes(SnapKV(), MODEL, FULL, **sizes)
    assert cut == SnapKV()
    assert sum(cut.plan(MODEL, **sizes).selected) == 0


def test_refuses_less_than_the_smallest():
    policy = SnapKV(window=6)
    least = nbytes(dataclasses.replace(policy, capacity=7))
    cut: Any = fit_to_bytes(policy, MODEL, least, **SIZES)
    assert cut.capacity == 7
    message = rf"nbytes={least - 1:,} is too small .* {least:,} bytes .* capacity=7,"
    with pytest.raises(ValueError, match=message):
        fit_to_bytes(policy, MODEL, least - 1, **SIZES)


def test_a_policy_that_does_not_suit_the_model_says_so_itself():
    with pytest.raises(ValueError, match="group=5 does not divide the model's 12"):
        fit_to_bytes(WindowKV(group=5), MODEL, FULL, **SIZES)


@pytest.mark.parametrize("policy", [SnapKV(), PyramidKV(), WindowKV()], ids=str)
def test_a_long_prompt_on_a_target_takes_no_time(policy):
    """Slots come in eights for its kernel, and still fit."""
    sizes: Any = {"prompt": 131072, "new_tokens": 64, "target": resolve("h200")}
    budget = Full().plan(LLAMA, **sizes).bytes() // 2
    begin = time.process_time()
    found = fit_to_bytes(policy, LLAMA, budget, **sizes).plan(LLAMA, **sizes)
    assert time.process_time() - begin < 2
    assert found.attention == "mosaic_gpu"
    assert 0.999 * budget < found.bytes() <= budget
