"""The GPU in this machine, as far as memory is concerned."""

import dataclasses
from typing import Any

import jax

from jmem.targets import TARGETS, Target


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


def find_gpu() -> Any:
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


def describe_attached(devices: int = 1) -> Card:
    """The attached GPU, with its memory as JAX's allocator may use it."""
    device = find_gpu()
    limit = device.memory_stats()["bytes_limit"]
    known = find_described(device.device_kind)
    size = known.compiler_bytes if known else limit
    return Card(device.device_kind, size, limit, devices)


def find_described(kind: str) -> Target | None:
    """The described GPU that the driver calls `kind`; None for one nobody described.

    >>> find_described("NVIDIA H200").name, find_described("NVIDIA T4")
    ('h200', None)
    """
    return next((t for t in TARGETS.values() if t.description == kind), None)
