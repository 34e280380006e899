"""python peak.py CHECKPOINT: bytes by which `params()` raises the resident peak.

A process of its own: the system's high-water mark never falls.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp

from jmem import checkpoints


def resident(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    jnp.zeros(3).block_until_ready()
    checkpoint = checkpoints.load(sys.argv[1])
    before = resident("VmRSS")
    jax.block_until_ready(checkpoint.params())
    print(resident("VmHWM") - before)
