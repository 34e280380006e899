"""Mosaic GPU as the kernels see it: the only file that imports it.

JAX calls this interface unstable. What a kernel takes from it stands here by name, and
so does every difference between the versions of JAX that are supported (0.11.2, 0.12).
Kernels are lowered for warpgroups, the default, and compile as well for lanes, whose
refusals are the clearer ones.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # its types are as unstable as itself

ACC = plgpu.ACC
Barrier = plgpu.Barrier
Layout = plgpu.Layout
SMEM = plgpu.SMEM

barrier_arrive = plgpu.barrier_arrive
barrier_wait = plgpu.barrier_wait
broadcasted_iota = plgpu.broadcasted_iota
commit_smem = plgpu.commit_smem
copy_gmem_to_smem = plgpu.copy_gmem_to_smem
copy_smem_to_gmem = plgpu.copy_smem_to_gmem
ds = pl.ds
layout_cast = plgpu.layout_cast
load = plgpu.load
multiple_of = pl.multiple_of
run_scoped = pl.run_scoped
wait_smem_to_gmem = plgpu.wait_smem_to_gmem
wgmma = plgpu.wgmma
when = pl.when

SHARED_BYTES = 232448
"""Shared memory of a thread block on compute capability 9.0."""


def kernel(
    body: Callable[..., None],
    *,
    lanes: bool = False,
    interpret: bool = False,
    **arguments: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel`, which interprets on the CPU, races detected, if told to.

    `lanes` lowers for lanes. Fast approximations of exp2 and its like are allowed.
    """
    semantics = plgpu.LoweringSemantics
    return plgpu.kernel(
        body,
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=semantics.Lane if lanes else semantics.Warpgroup,
        ),
        **arguments,
    )


def swizzled(shape: tuple[int, ...], dtype: Any, swizzle: int) -> Any:
    """Shared memory that a tensor core reads: rows of `swizzle` bytes, eight a tile.

    Both operands of a product need the same `swizzle`. A copy into it starts at a
    multiple of eight rows on both sides: from another row of the global array the
    copied tiles would hold zeros, which the interpreter does not show.
    """
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(
            plgpu.TilingTransform((8, columns)),
            plgpu.SwizzleTransform(swizzle),
        ),
    )


def swizzle_of(columns: int, dtype: Any) -> int:
    """The widest swizzle whose rows divide `columns` numbers; 0 where none does."""
    row_bytes = columns * jnp.dtype(dtype).itemsize
    return next((s for s in (128, 64, 32) if row_bytes % s == 0), 0)


# The interpreter ----------------------------------------------------------------------


def races_found() -> bool:
    """Whether the last interpreted kernel raced.

    JAX 0.12 also raises at the race and then says no here; 0.11 only prints.
    """
    return gpu_callbacks.get_races().races_found


def reset_interpreter() -> None:
    """Forgets what an interpreted kernel left, as is needed after it raised."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
