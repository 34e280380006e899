"""A state's numbers are looked at where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmem
from jmem import offload
from jmem.train import finite

PLACES = {"device": offload.on_device, "host": offload.on_host}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "complex64"]
)
def test_one_value_is_found_in_any_dtype_and_memory(dtype, place):
    good = jnp.arange(24.0).reshape(4, 3, 2).astype(dtype)
    bad = good.at[3, 2, 1].set(jnp.nan)
    state = {
        "good": PLACES[place](good),
        "blocks": {"bad": PLACES[place](bad)},
        "scalar": jnp.float32(-jnp.inf),
    }
    assert finite.find_not_finite(state) == ["blocks/bad", "scalar"]


def test_what_is_no_fraction_is_left_alone():
    state = {
        "step": jnp.int32(2**31 - 1),
        "key": jax.random.key(0),
        "none": jnp.zeros((0, 8)),
        "packed": jnp.full((3, 4), 255, jnp.uint8),
        "numpy": np.ones(3),
    }
    assert finite.find_not_finite(state) == []
    assert finite.find_not_finite({}) == []


def test_it_takes_no_copy_of_the_state():
    """Of what is on the device nothing; of a stack on the host, one row at a time."""
    shape = jax.ShapeDtypeStruct((16, 1024, 1024), jnp.float32)
    for leaf, most in ((shape, 0), (offload.on_host(shape), 4 * 2**20)):
        report = jmem.measure(finite.look, [leaf] * 2, target="h200", bounds=False)
        taken = report.device_bytes - report.argument_bytes
        assert most <= taken < most + 2**20
