"""Live: what the allocator of an attached GPU really held while a program ran.

The allocator counts the most bytes it ever held and cannot be reset, so the number is a
program's own only in a process that has held no more before: one process a case.
"""

import dataclasses
import gc
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmem.program import Program
from jmem.targets import TARGETS


class NoGPUError(RuntimeError):
    """The machine has no GPU that JAX can use."""


@dataclasses.dataclass(frozen=True)
class Card:
    """An attached GPU as a report needs it; of a mesh, any one of its GPUs."""

    name: str
    compiler_bytes: int
    usable_bytes: int
    """What JAX's allocator may take in this process."""
    devices: int


@dataclasses.dataclass(frozen=True)
class LiveReport:
    """Bytes of the allocator around one run of a program."""

    name: str
    device: str
    base_bytes: int
    """In use before the run: the arguments."""
    peak_bytes: int
    """The most in use, up to the end of the run."""
    earlier_peak_bytes: int
    """The most in use before the run; compiling and autotuning count."""
    limit_bytes: int
    planned_bytes: int
    """XLA's `total_allocation_bytes` of the program that ran."""

    @property
    def own(self) -> bool:
        """Whether the peak is the run's; if not, it is only known to be below."""
        return self.peak_bytes > self.earlier_peak_bytes


def gpu() -> Any:
    """The first attached GPU.

    Raises:
      NoGPUError: there is none; says what there is.
    """
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        raise NoGPUError(
            f"no GPU is attached (JAX sees {jax.devices()}). Measure ahead of time "
            "instead: jmem.measure(..., target='h200')."
        ) from error


def attached(devices: int = 1) -> Card:
    """The attached GPU, with its memory as JAX's allocator may use it."""
    device = gpu()
    limit = device.memory_stats()["bytes_limit"]
    known = [t for t in TARGETS.values() if t.description == device.device_kind]
    size = known[0].compiler_bytes if known else limit
    return Card(device.device_kind, size, limit, devices)


def live(
    what: Program | Callable,
    *args: Any,
    donate: tuple[int, ...] = (),
    static: tuple[int, ...] = (),
    key: int | None = 0,
) -> LiveReport:
    """Runs a program once on the attached GPU and reads its allocator.

    Compile beforehand in another process with JAX's compilation cache on, so that
    autotuning does not raise the peak; `own` says whether anything did.

    Args:
      what: a `Program`, or any function with its arguments.
      *args: the function's arguments; descriptions will do.
      donate: positions of arguments the function may take over.
      static: positions of hashable arguments that are compiled in.
      key: seed of the program's own `make`. None, or a program without one: zeros of
        the described shapes, which take no more memory to make than they have.

    Raises:
      NoGPUError: there is no GPU.
    """
    program = what if isinstance(what, Program) else Program(what, args, donate, static)
    device = gpu()
    compiled = program.compile()
    analysis: Any = compiled.memory_analysis()
    if program.make is None or key is None:
        arguments = _zeros(program)
    else:
        arguments = jax.jit(program.make)(jax.random.key(key))
    run = [a for n, a in enumerate(arguments) if n not in program.static]
    jax.block_until_ready(run)
    gc.collect()
    before = device.memory_stats()
    result = compiled(*run)
    jax.block_until_ready(result)
    after = device.memory_stats()
    return LiveReport(
        name=program.name,
        device=device.device_kind,
        base_bytes=before["bytes_in_use"],
        peak_bytes=after["peak_bytes_in_use"],
        earlier_peak_bytes=before["peak_bytes_in_use"],
        limit_bytes=after["bytes_limit"],
        planned_bytes=analysis.total_allocation_bytes,
    )


def _zeros(program: Program) -> tuple:
    """Arguments of zeros where the program wants them, one array at a time."""
    described, *_ = program.placed(None)

    def zeros(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys = jax.random.split(jax.random.key(0), math.prod(leaf.shape))
            return keys.reshape(leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

    return tuple(
        value if position in program.static else jax.tree.map(zeros, value)
        for position, value in enumerate(described)
    )
