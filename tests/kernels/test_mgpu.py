"""The interpreter catches what it is there to catch, under every supported JAX."""

import jax
import jax.numpy as jnp
import pytest

from jmem.kernels import _mgpu

N = 128


def doubled(x, waits: bool):
    """One warpgroup writes to shared memory, the other reads it; it may forget to wait.

    Thread 0 writes `x`, thread 1 adds what it finds to itself.
    """

    def body(x_ref, o_ref, shared, result, written):
        mine = jax.lax.axis_index("warpgroup")

        @_mgpu.when(mine == 0)
        def _():
            shared[...] = x_ref[...]
            _mgpu.barrier_arrive(written)
            if not waits:
                _mgpu.barrier_wait(written)

        @_mgpu.when(mine == 1)
        def _():
            if waits:
                _mgpu.barrier_wait(written)
            result[...] = shared[...] + shared[...]
            _mgpu.commit_smem()
            _mgpu.copy_smem_to_gmem(result, o_ref)
            _mgpu.wait_smem_to_gmem(0)

    return _mgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((N,), jnp.float32),
        scratch_types=(
            _mgpu.SMEM((N,), jnp.float32),
            _mgpu.SMEM((N,), jnp.float32),
            _mgpu.Barrier(),
        ),
        num_threads=2,
        thread_name="warpgroup",
        interpret=True,
    )(x)


@pytest.fixture(autouse=True)
def clean():
    _mgpu.reset_interpreter()
    yield
    _mgpu.reset_interpreter()


@pytest.mark.compat
def test_a_wait_makes_it_sound():
    assert (doubled(jnp.ones(N), waits=True) == 2).all()
    assert not _mgpu.races_found()


@pytest.mark.compat
def test_a_forgotten_wait_is_a_race(capfd):
    raised = False
    try:
        jax.block_until_ready(doubled(jnp.ones(N), waits=False))
    except Exception as error:  # what kind is the interpreter's affair
        raised = "RACE DETECTED" in str(error)
    assert raised or _mgpu.races_found()
    capfd.readouterr()


@pytest.mark.parametrize(
    "columns, dtype, expected",
    [(128, "bfloat16", 128), (96, "float16", 64), (80, "bfloat16", 32), (8, "int8", 0)],
)
def test_the_widest_swizzle_divides_a_row(columns, dtype, expected):
    assert _mgpu.swizzle_of(columns, dtype) == expected
