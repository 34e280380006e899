"""How many weights of each map are among the smallest of all maps of all layers.

Idea     The size of a float32 is in order the integer of its bits, so the threshold is
         found in two readings of all weights, by counting their upper 16 bits and then,
         of those that agree in them, the lower: exact, and no more than one map of one
         layer is in memory.
"""

import itertools
from collections.abc import Callable, Mapping

import numpy as np

Read = Callable[[str, int], np.ndarray]
"""A map's weights [out, in] in one layer, float32."""


def count_below(
    sparsity: float, shapes: Mapping[str, tuple[int, int, int]], read: Read
) -> dict[str, np.ndarray]:
    """Of each map and layer, how many are among the smallest floor(sparsity * all).

    `shapes` are [layers, out, in] by name; the counts are int32 [layers]. Of equal
    weights those of earlier layers are counted first, then those of earlier maps.
    """
    total = sum(
        layers * outputs * inputs for layers, outputs, inputs in shapes.values()
    )
    left = int(sparsity * total)
    layers = max(shape[0] for shape in shapes.values())
    order = [(n, at) for at, n in itertools.product(range(layers), shapes)]

    def read_bits(place: tuple[str, int]) -> np.ndarray:
        return np.abs(read(*place)).view(np.uint32).reshape(-1)

    def find(bits: Callable[[np.ndarray], np.ndarray], left: int) -> tuple[int, int]:
        """The 16 bits at which `left` is reached, and what is left of it there."""
        found = np.zeros(2**16, np.int64)
        for place in order:
            found += np.bincount(bits(read_bits(place)), minlength=2**16)
        sums = np.cumsum(found)
        at = int(np.searchsorted(sums, left))
        return at, left - int(sums[at] - found[at])

    counts = {name: np.zeros(shape[0], np.int32) for name, shape in shapes.items()}
    if not left:
        return counts
    upper, left = find(lambda bits: bits >> 16, left)
    lower, left = find(lambda bits: bits[bits >> 16 == upper] & 0xFFFF, left)
    threshold = np.uint32(upper << 16 | lower)
    for name, layer in order:
        bits = read_bits((name, layer))
        equal = min(int(np.count_nonzero(bits == threshold)), left)
        counts[name][layer] = int(np.count_nonzero(bits < threshold)) + equal
        left -= equal
    return counts
