"""What every kernel's bench does alike: find the GPU, time on it, know its bandwidth.

Times are of the device alone, as CUPTI reports them: the median of many runs, and how
far they spread. A share of bandwidth is of a copy measured in the same process, not of
a data sheet.
"""

import dataclasses
import importlib
import math
import re
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmem.targets import GiB

WARM_UP = 3
RUNS = 30
L2_BYTES = 50 * 2**20
"""Level-2 cache of an H100 or H200: what a bench must not read again from."""
_ENTRY = re.compile(r"^ENTRY %(\S+) \(", re.M)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)
_INSTRUCTION = re.compile(
    r" = (?:\(.*?\)|\S+) ([a-z-]+)\(.*?(?:to_apply=%([^\s,]+).*)?$"
)
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_FREE |= {"copy-done", "async-done", "after-all", "opt-barrier"}


class NoGPUError(RuntimeError):
    """There is no GPU to time a kernel on."""


def attached(capability: str) -> str:
    """The name of the attached GPU, which must have that compute capability.

    Raises:
      NoGPUError: names what is attached instead.
    """
    device = jax.devices()[0]
    found = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or found != capability:
        words = f"{device.platform}, {device.device_kind!r}" + (
            f" of compute capability {found}" if found else ""
        )
        raise NoGPUError(
            f"needs an attached GPU of compute capability {capability}, and found "
            f"{words}. Nothing was timed; the tests compile the kernel without one."
        )
    return device.device_kind


@dataclasses.dataclass(frozen=True)
class Time:
    """Milliseconds of one run on the device."""

    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""

    def __truediv__(self, parts: int) -> "Time":
        return Time(self.median / parts, self.low / parts, self.high / parts)

    @classmethod
    def of(cls, runs: list[float]) -> "Time":
        """Of at least two runs.

        >>> Time.of([1.0, 2.0, 3.0, 4.0, 5.0]).median
        3.0
        """
        tenths = statistics.quantiles(runs, n=10, method="inclusive")
        return cls(statistics.median(runs), tenths[0], tenths[-1])


def time(fn: Callable, *args: Any) -> tuple[Time, float]:
    """Device time of `fn(*args)`, all of its launches together, and their number."""
    profiler = importlib.import_module("jax.experimental.mosaic.gpu.profiler")
    compiled = jax.jit(fn).lower(*args).compile()
    for _ in range(WARM_UP):
        jax.block_until_ready(compiled(*args))
    _, runs = profiler.measure(compiled, iterations=RUNS)(*args)
    return Time.of(runs), count_launches(compiled)


def count_launches(compiled: Any) -> float:
    """Kernels and copies that a compiled program starts, those of CUDA graphs too.

    NaN where it has a loop or a branch, whose launches are no fixed number.
    """
    text = compiled.as_text()
    bodies = dict(_COMPUTATION.findall(text))

    def count(name: str) -> float:
        total = 0.0
        for line in bodies[name].splitlines():
            operation, called = _INSTRUCTION.findall(line)[0]
            if operation == "call":
                total += count(called)
            elif operation in ("while", "conditional"):
                total = math.nan
            else:
                total += operation not in _FREE
        return total

    return count(_ENTRY.findall(text)[0])


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB moves, reads and writes together.

    The results of all timed runs are held until the last one ends.
    """
    x = jax.random.normal(jax.random.key(0), (GiB // 4,), jnp.float32)
    taken, _ = time(lambda x: -x, x)
    return 2 * x.nbytes / (taken.median / 1e3)
