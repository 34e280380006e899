"""Sizes from real models, which the tests compile and the bench times.

    SHAPES["opt-30b-o-n8-s80"]     attention's output map, 8 tokens, 80 % zeros

Source: the models' published configurations; tokens and zeros as in the paper's
figures, and one token at half of them.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.typing import DTypeLike

from jmem.kernels.spmm import FragBitmap
from jmem.kernels.spmm.fragbitmap import SIDE

SPREAD = 4
"""Standard deviations between a tile's mean and the fullest one, of random zeros."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One product, of a matrix with random zeros."""

    outputs: int
    inputs: int
    tokens: int
    zeros: int
    """Percent."""
    values: str = "bfloat16"
    """bfloat16, float16, int8 or int4."""

    @property
    def tiles(self) -> int:
        """Of the matrix."""
        return -(-self.outputs // SIDE) * -(-self.inputs // SIDE)

    @property
    def cap(self) -> int:
        """Rows of values of a tile that is as full as one of many may be."""
        share = 1 - self.zeros / 100
        mean, spread = SIDE * SIDE * share, SIDE * (share * (1 - share)) ** 0.5
        return min(SIDE, -(-int(mean + SPREAD * spread) // SIDE))

    @property
    def read_bytes(self) -> int:
        """The packed matrix, its tiles half a row longer than their numbers."""
        bits = {"int4": 4, "int8": 8}.get(self.values, 16)
        numbers = SIDE * SIDE * (1 - self.zeros / 100) + SIDE / 2
        return int(self.tiles * (numbers * bits / 8 + 10 * SIDE + 4))

    def matrix(self, layers: int) -> FragBitmap:
        """Described, with `layers` stacked."""
        rows = int(self.tiles * (SIDE * (1 - self.zeros / 100) + 0.5)) + self.cap
        width, dtype = {"int4": (SIDE // 2, "uint8"), "int8": (SIDE, "int8")}.get(
            self.values, (SIDE, self.values)
        )
        array = jax.ShapeDtypeStruct
        floats = self.values not in ("int4", "int8")
        return FragBitmap(
            array((layers, rows, width), dtype),
            array((layers, self.tiles, 2 * SIDE), "uint32"),
            array((layers, self.tiles, SIDE), "uint16"),
            array((layers, self.tiles + 1), "int32"),
            None if floats else array((layers, self.outputs), "float32"),
            outputs=self.outputs,
            inputs=self.inputs,
            cap=self.cap,
        )

    def x(self, dtype: DTypeLike = "bfloat16") -> jax.ShapeDtypeStruct:
        """Described."""
        return jax.ShapeDtypeStruct((self.tokens, self.inputs), dtype)


MAPS = {
    "opt-30b-qkv": (3 * 7168, 7168),
    "opt-30b-o": (7168, 7168),
    "opt-30b-up": (4 * 7168, 7168),
    "opt-30b-down": (7168, 4 * 7168),
    "opt-66b-up": (4 * 9216, 9216),
    "opt-175b-up": (4 * 12288, 12288),
    "llama2-7b-up": (11008, 4096),
    "llama2-7b-down": (4096, 11008),
}
"""Outputs and inputs."""
POINTS = ((1, 50), (8, 60), (8, 70), (8, 80), (8, 90), (16, 80), (32, 80), (64, 80))
"""Tokens, percent of zeros."""

SHAPES = {
    f"{name}-n{tokens}-s{zeros}": Shape(
        outputs=outputs, inputs=inputs, tokens=tokens, zeros=zeros
    )
    for name, (outputs, inputs) in MAPS.items()
    for tokens, zeros in POINTS
}


def kernel_calls() -> dict[str, tuple[Any, tuple]]:
    """Calls to compile, by kernel name, for `budget.toml`."""
    from jmem.kernels.spmm import mosaic_gpu

    calls = {}

    def add(tokens: int, values: str, dtype: str = "bfloat16", lanes=False) -> None:
        shape = Shape(outputs=7168, inputs=7168, tokens=tokens, zeros=80, values=values)
        matrix, (_, columns) = shape.matrix(2), mosaic_gpu.columns_of(tokens)
        down, across = matrix.tiles
        tile = mosaic_gpu.tile_for(
            tokens=tokens, down=down, across=across, cap=shape.cap, bits=matrix.bits
        )
        name = mosaic_gpu.kernel_name(columns, values, dtype, tile, lanes)
        call = functools.partial(mosaic_gpu.multiply, layer=1, lanes=lanes)
        calls[name] = (call, (shape.x(dtype), matrix))

    for tokens in (1, 32, 64):
        add(tokens, "bfloat16")
    add(8, "float16", "float16")
    for values in ("int8", "int4"):
        add(8, values)
        add(8, values, "float16")
    add(8, "bfloat16", lanes=True)
    return calls
