"""Mosaic GPU as the kernels see it: the only file that imports it.

JAX calls this interface unstable. What a kernel takes from it stands here by name, and
so does every difference between the versions of JAX that are supported (0.11.2, 0.12).
Kernels are lowered for warpgroups, the default, and compile as well for lanes, whose
refusals are the clearer ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

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
warp_map = plgpu.warp_map
wgmma = plgpu.wgmma
wgmma_wait = plgpu.wgmma_wait
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


def lane_numbers() -> Any:
    """The numbers of a warpgroup's threads, 0 to 127: an array for `assemble`."""
    return broadcasted_iota(jnp.int32, (128,), 0, layout=_A_LANE)


_A_LANE = plgpu.Layout.WG_STRIDED((128,), vec_size=1)


def assemble(
    text: str, columns: int, dtype: Any, refs: Sequence[Any], lanes: Sequence[Any]
) -> Any:
    """An array [64, columns] of 16-bit `dtype`, laid out for `wgmma`, that PTX makes.

    `text` gives a thread's `columns / 4` registers, `$0` on: of each eight columns
    those of its first row, then of the other. Its inputs follow: the addresses of
    `refs` in shared memory, and the thread's numbers of the int32 arrays [128] `lanes`.
    """
    layout, shape, count = plgpu.Layout.WGMMA, (64, columns), columns // 4

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * len(refs), *[_A_LANE] * len(lanes)),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout),
    )
    def run(context, *given):
        word = ir.IntegerType.get_signless(32)
        addresses = [
            llvm.ptrtoint(word, mosaic.utils.memref_ptr(ref))
            for ref in given[: len(refs)]
        ]
        numbers = [
            mosaic.utils.bitcast(array.registers.item(), word)
            for array in given[len(refs) :]
        ]
        inputs = [*addresses, *numbers]
        made = llvm.inline_asm(
            ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * count)})>"),
            inputs,
            text,
            ",".join(["=&r"] * count + ["r"] * len(inputs)),
            has_side_effects=True,
        )
        pair = ir.VectorType.get((2,), mosaic.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        registers = [
            mosaic.utils.bitcast(llvm.extractvalue(word, made, [i]), pair)
            for i in range(count)
        ]
        here = layout.to_mgpu()
        return mosaic.FragmentedArray(
            _registers=np.array(registers).reshape(here.registers_shape(shape)),
            _layout=here,
            _is_signed=None,
        )

    return run(*refs, *lanes)


# The interpreter ----------------------------------------------------------------------


def races_found() -> bool:
    """Whether the last interpreted kernel raced.

    JAX 0.12 also raises at the race and then says no here; 0.11 only prints.
    """
    return gpu_callbacks.get_races().races_found


def reset_interpreter() -> None:
    """Forgets what an interpreted kernel left, as is needed after it raised."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
