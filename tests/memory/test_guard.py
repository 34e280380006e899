"""`assert_fits`: passes with the report, fails with the reason and the report."""

import jax
import jax.numpy as jnp
import pytest

import jmem
from jmem.memory.guard import MemoryExceededError

x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
MiB = 2**20


def double(x):
    return x * 2


def test_gives_the_report_of_what_fits():
    report = jmem.memory.assert_fits(double, x, target="rtx4090", bounds=False)
    assert report.device_bytes == 8 * MiB
    assert jmem.memory.assert_fits(double, x, budget_bytes=8 * MiB, bounds=False)


def test_a_budget_in_bytes():
    with pytest.raises(MemoryExceededError, match="1 more than budget_bytes") as raised:
        jmem.memory.assert_fits(double, x, budget_bytes=8 * MiB - 1, bounds=False)
    assert raised.value.report.device_bytes == 8 * MiB
    assert "what fills the peak" in str(raised.value)


def test_a_card_too_small():
    large = jax.ShapeDtypeStruct((2**32,), jnp.float32)
    with pytest.raises(AssertionError, match="does not fit rtx4090"):
        jmem.memory.assert_fits(double, large, target="rtx4090", bounds=False)


def test_refuses_a_negative_budget():
    with pytest.raises(ValueError, match="budget_bytes=-1 must not be negative"):
        jmem.memory.assert_fits(double, x, budget_bytes=-1)
