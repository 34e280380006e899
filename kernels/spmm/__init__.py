"""Products with a sparse matrix, which is read packed and expanded on the chip.

    from jmem.kernels.spmm import choose, spmm

    implementation = choose(target, "bfloat16")
    y = spmm(x, matrix, implementation=implementation)  # x @ W.T
    y = spmm(x, stack, layer=layer, implementation=implementation)  # in a loop

The matrix is a `FragBitmap`, any share of whose numbers may be zero, in no pattern.

See      fragbitmap.py (the format), reference.py (the definition), mosaic_gpu.py and
         fragments.py (the kernel, for Hopper), tests/kernels/test_spmm.py
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jmem.kernels.spmm.fragbitmap import FragBitmap, check, check_shapes
from jmem.kernels.spmm.reference import decode
from jmem.targets import Target

from . import reference

__all__ = ["FragBitmap", "check", "choose", "decode", "spmm", "unserved"]

Implementation = Literal["mosaic_gpu", "xla"]


def spmm(
    x: Float[Array, "*N inputs"],
    matrix: FragBitmap,
    *,
    layer: Int[Array, ""] | int | None = None,
    implementation: Implementation | None = None,
    tile: Any = None,
    interpret: bool = False,
) -> Float[Array, "*N outputs"]:
    """Multiplies by a sparse matrix W [outputs, inputs]: x @ W.T, in x's dtype.

    Args:
      x: bfloat16, float16 or float32; the numbers of W are multiplied in its dtype.
      matrix: one matrix; with `layer` a stack of them, one leading axis.
      layer: which of the stack, clipped into range. It is read where it lies, so that a
        loop over layers copies no weight.
      implementation: who builds a program resolves it by `choose`; None is "xla".
        "mosaic_gpu" runs the kernel or raises.
      tile: a `mosaic_gpu.Tile`; None takes the tuned one, or a heuristic's.
      interpret: runs the kernel in Pallas's interpreter, on the CPU, with race
        detection. For tests.

    Products are summed in float32 and multiplied by the scales, if there are any, in
    float32. The gradient is that of the dense product: of x, and of the numbers that
    are stored, or the scales of integers. It decodes the matrix, by XLA; the cotangent
    of a stack's values is as long as the stack.

    Raises:
      TypeError, ValueError: arrays that do not fit, or an implementation that cannot
        serve; argument, value and rule are named.
    """
    _check(x, matrix, layer, implementation, interpret)
    chosen = implementation or "xla"
    how = (chosen, tile, interpret)
    if layer is not None:
        layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, matrix.layers[0] - 1)
    with jax.named_scope(f"spmm_{chosen}"):
        return _multiply(how, x, matrix, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(how, x, matrix, layer):
    implementation, tile, interpret = how
    if implementation == "xla":
        return reference.multiply(x, matrix, layer)
    from . import mosaic_gpu

    return mosaic_gpu.multiply(x, matrix, layer, tile=tile, interpret=interpret)


def _forward(how, x, matrix, layer):
    return _multiply(how, x, matrix, layer), (x, matrix, layer)


def _backward(how, saved, dy):
    x, matrix, layer = saved
    return (*reference.transpose(x, matrix, layer, dy), None)


_multiply.defvjp(_forward, _backward)


def choose(
    target: Target | None, dtype: DTypeLike, values: DTypeLike | None = None
) -> Implementation:
    """The fastest implementation that `target` can run; None is the CPU.

    `dtype` is x's, `values` that of the matrix's values, x's if None. The kernel is
    made of Hopper's instructions: compute capability 9.0, no other.
    """
    hopper = target is not None and target.capability == (9, 0)
    served = unserved(dtype, dtype if values is None else values) is None
    return "mosaic_gpu" if hopper and served else "xla"


def unserved(dtype: DTypeLike, values: DTypeLike) -> str | None:
    """What of two dtypes, x's and the values', the kernel cannot serve, or None.

    >>> unserved("bfloat16", "int8")
    >>> unserved("bfloat16", "float16")
    'values of float16 are neither integers nor of the dtype of x, bfloat16'
    """
    dtype, values = str(jnp.dtype(dtype)), str(jnp.dtype(values))
    if dtype not in ("bfloat16", "float16"):
        return f"x of {dtype} is not bfloat16 or float16"
    if values not in (dtype, "int8", "uint8"):
        return f"values of {values} are neither integers nor of the dtype of x, {dtype}"
    return None


def _check(x, matrix, layer, implementation, interpret) -> None:
    """Refuses what does not fit; all of it is known while tracing."""
    if not isinstance(matrix, FragBitmap):
        raise TypeError(
            f"spmm: matrix is a {type(matrix).__name__}; need a FragBitmap."
        )
    check_shapes(matrix)
    layers, wrong = matrix.layers, None
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(
            f"spmm: x is {x.dtype}; need bfloat16, float16 or float32, in which the "
            "matrix is multiplied."
        )
    if not x.ndim or x.shape[-1] != matrix.inputs:
        wrong = (
            f"x has shape {x.shape}; its last axis must be the matrix's "
            f"inputs={matrix.inputs}"
        )
    elif len(layers) != (layer is not None):
        wrong = (
            f"layer={layer} with a matrix of leading axes {layers}; need layer=None "
            "with none, else one, of layers"
        )
    elif isinstance(layer, int) and not 0 <= layer < layers[0]:
        wrong = f"layer={layer}; need 0 to {layers[0] - 1}, the stack's layers"
    elif implementation not in ("mosaic_gpu", "xla", None):
        wrong = f"implementation={implementation!r}; need 'mosaic_gpu', 'xla' or None"
    elif interpret and implementation != "mosaic_gpu":
        wrong = (
            f"interpret=True with implementation={implementation!r}; only "
            "'mosaic_gpu' has a kernel to interpret"
        )
    if wrong:
        raise ValueError(f"spmm: {wrong}.")
    rule = unserved(x.dtype, matrix.values.dtype)
    if implementation == "mosaic_gpu" and rule:
        raise ValueError(
            f"spmm: implementation='mosaic_gpu' cannot serve: {rule}. Use "
            "implementation='xla', or resolve it by `choose`."
        )
