"""Time beside cuBLAS and XLA, and the share of what bounds it; tunes the tiles.

    python -m jmem.kernels.spmm.bench                 every shape of shapes.py
    python -m jmem.kernels.spmm.bench --only opt-30b-o-n8-s80
    python -m jmem.kernels.spmm.bench --tune          and writes tuned.toml

Needs a GPU of compute capability 9.0; without one it says so and exits 2, and with 1 if
a shape is slower than expected. A timed call is a row of products, each with its own
layer of one stack, together larger than the level-2 cache. cuBLAS multiplies the same
matrix dense; XLA's way decodes it first. Numbers of the kernel are compared with XLA's
before anything is timed.

Two bounds: the packed bytes at the copy bandwidth, and the instructions of a scheduler
(`INSTRUCTIONS`), of which a multiprocessor has four. `bound` is the share of the time
that the longer one takes.

Expect  2.5 times cuBLAS at 80 % zeros and 8 to 32 tokens, 1.5 at 60 %, 1.2 at 50 % and
        one token (MACKO-SpMV, arXiv:2511.13061, is there).
Seen    nothing yet: the kernel has not run on a GPU.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmem.disk import write_atomically
from jmem.kernels import _bench, _tuned
from jmem.kernels._bench import NoGPUError, Time, attached, copy_bandwidth
from jmem.kernels.spmm import FragBitmap, decode, spmm
from jmem.kernels.spmm.fragbitmap import SIDE
from jmem.kernels.spmm.mosaic_gpu import PROCESSORS, TUNED, Tile, key, tile_for
from jmem.kernels.spmm.shapes import SHAPES, Shape
from jmem.targets import resolve

MODULE = "jmem.kernels.spmm.bench"
INSTRUCTIONS = 148
"""A scheduler's for a tile: 141 of a consumer warp, see `budget.toml`, and a fourth of
the 28 of the warp that copies."""
TOLERANCE = 2.0**-7
"""Of the sum of a product's absolute terms: a unit of bfloat16."""


def layers_of(shape: Shape) -> int:
    """Layers in the stack: together at least four times the level-2 cache."""
    return max(2, -(-4 * _bench.L2_BYTES // shape.read_bytes))


def draw(shape: Shape, layers: int) -> FragBitmap:
    """A stack with random zeros and random normal numbers, made packed."""

    def masks_of(key):
        bits = jax.random.bernoulli(
            key, 1 - shape.zeros / 100, (shape.tiles, 2 * SIDE, 32)
        )
        places = jnp.arange(32, dtype=jnp.uint32)[None, None]
        return jnp.sum(bits.astype(jnp.uint32) << places, axis=-1, dtype=jnp.uint32)

    keys = jax.random.split(jax.random.key(0), layers)
    masks = jax.lax.map(masks_of, keys)
    ones = jax.lax.population_count(masks).astype(jnp.int32)
    counts = ones[..., :SIDE] + ones[..., SIDE:]
    ends = jnp.cumsum(counts, axis=-1)
    taken = -(-ends[..., -1] // SIDE)
    starts = jnp.pad(jnp.cumsum(taken, axis=-1), ((0, 0), (1, 0)))
    cap = max(shape.cap, int(taken.max()))
    rows = int(starts.max()) + cap
    described = shape.matrix(layers)
    values = described.values
    size = (layers, rows, values.shape[-1])
    if values.dtype in (jnp.int8, jnp.uint8):
        numbers = jax.random.bits(keys[0], size, jnp.uint8).astype(values.dtype)
    else:
        numbers = jax.random.normal(keys[0], size, values.dtype)
    scales = described.scales
    return FragBitmap(
        numbers,
        masks,
        (ends - counts).astype(jnp.uint16),
        starts.astype(jnp.int32),
        None if scales is None else jnp.full(scales.shape, 0.01, jnp.float32),
        outputs=shape.outputs,
        inputs=shape.inputs,
        cap=cap,
    )


def run_sparse(layers: int, **how: Any) -> Callable:
    """A product with each layer of a stack."""

    def run(x, matrix):
        return [spmm(x, matrix, layer=layer, **how) for layer in range(layers)]

    return run


def run_dense(x, *matrices):
    """The same by cuBLAS, of dense matrices."""
    return [jnp.einsum("ni,oi->no", x, matrix) for matrix in matrices]


def tiles(shape: Shape) -> Iterator[Tile]:
    """Tiles worth trying: what fits, few enough for minutes."""
    default = heuristic(shape)
    for rows in (1, 2, 4):
        for stages in (2, 3, 4, 6):
            for splits in sorted({1, 2, 4, 7, 8, 14, default.splits}):
                tile = dataclasses.replace(
                    default, rows=rows, stages=stages, splits=splits
                )
                try:
                    tile.check(min(max(shape.tokens, 8), 64), shape.cap)
                except ValueError:
                    continue
                yield tile


def _sizes(shape: Shape) -> dict[str, int]:
    matrix = shape.matrix(1)
    down, across = matrix.tiles
    sizes = {"tokens": shape.tokens, "down": down, "across": across}
    return {**sizes, "cap": shape.cap, "bits": matrix.bits}


def heuristic(shape: Shape, device: str = "NVIDIA H200") -> Tile:
    """What `tile=None` takes."""
    return tile_for(**_sizes(shape), device=device)


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation, a product."""

    ms: Time
    launches: float
    """Of everything, the kernel itself too."""


def verify(shape: Shape, x: jax.Array, matrix: FragBitmap, tile: Tile) -> None:
    """Refuses to time a kernel whose numbers are not XLA's.

    Raises:
      ArithmeticError: names the shape, the tile and the difference.
    """

    def apart(x, matrix):
        mine = spmm(x, matrix, layer=1, implementation="mosaic_gpu", tile=tile)
        one = jax.tree.map(lambda leaf: leaf[1], matrix)
        dense = decode(one, jnp.float32)
        exact = jnp.matmul(x.astype("float32"), dense.T, precision="highest")
        most = jnp.matmul(jnp.abs(x.astype("float32")), jnp.abs(dense).T)
        wrong = jnp.abs(mine.astype("float32") - exact) / (most + 1e-6)
        return jnp.max(wrong), jnp.mean(wrong)

    largest, mean = map(float, jax.jit(apart)(x, matrix))
    if not largest <= TOLERANCE:
        raise ArithmeticError(
            f"{shape}, {tile}: {largest:.2e} (mean {mean:.2e}) of the sum of absolute "
            "terms from XLA's product."
        )


def measure(shape: Shape, device: str, tune: bool) -> tuple[dict[str, Row], Tile]:
    """A row of each implementation, and the kernel's best tile."""
    layers = layers_of(shape)
    matrix = draw(shape, layers)
    x = jax.random.normal(jax.random.key(1), (shape.tokens, shape.inputs), "bfloat16")

    def timed(run: Callable, count: int, *args: Any) -> Row:
        taken, launches = _bench.time(run, *args)
        return Row(taken / count, launches / count)

    kernel, best = {}, heuristic(shape, device)
    for tile in tiles(shape) if tune else (best,):
        verify(shape, x, matrix, tile)
        run = run_sparse(layers, implementation="mosaic_gpu", tile=tile)
        kernel[tile] = timed(run, layers, x, matrix)
    best = min(kernel, key=lambda tile: kernel[tile].ms.median)
    found = {"mosaic_gpu": kernel[best], "xla": timed(run_sparse(2), 2, x, matrix)}
    dense_bytes = 2 * shape.outputs * shape.inputs
    one = jax.tree.map(lambda leaf: leaf[0], matrix)
    count = max(2, -(-4 * _bench.L2_BYTES // dense_bytes))
    weights = jax.jit(lambda one: decode(one, jnp.bfloat16))(one)
    copies = [weights + np.asarray(i, weights.dtype) for i in range(count)]
    found["cublas"] = timed(run_dense, count, x, *copies)
    return found, best


def bounds_ms(shape: Shape, bandwidth: float) -> tuple[float, float]:
    """Milliseconds that the packed bytes take, and that instructions take to issue.

    A tile is four warps' work, one on each scheduler of a multiprocessor.
    """
    clock = resolve("h200").clock_ghz * 1e9
    issued = shape.tiles / PROCESSORS * INSTRUCTIONS / clock
    return 1e3 * shape.read_bytes / bandwidth, 1e3 * issued


def expected(shape: Shape) -> float | None:
    """How many times as fast as cuBLAS the kernel must be."""
    if shape.tokens == 1 and shape.zeros == 50:
        return 1.2
    if 8 <= shape.tokens <= 32:
        return {60: 1.5, 80: 2.5}.get(shape.zeros)
    return None


HEAD = (
    f"{'shape':<24}{'':<12}{'ms':>9}  {'10 % - 90 %':<18}{'cuBLAS':>8}{'launches':>10}"
    f"{'bytes':>9}{'issue':>9}{'bound':>7}"
)


def lines(
    name: str, shape: Shape, found: dict[str, Row], bandwidth: float
) -> Iterator[str]:
    """Lines of the table."""
    bounds = bounds_ms(shape, bandwidth)
    for implementation, row in found.items():
        spread = f"{row.ms.low:.4f} - {row.ms.high:.4f}"
        times = found["cublas"].ms.median / row.ms.median
        line = (
            f"{name:<24}{implementation:<12}{row.ms.median:>9.4f}  {spread:<18}"
            f"{times:>8.2f}{row.launches:>10.1f}"
        )
        if implementation == "mosaic_gpu":
            share = max(bounds) / row.ms.median
            line += f"{bounds[0]:>9.4f}{bounds[1]:>9.4f}{share:>7.0%}"
        yield line


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 2 without a GPU, 1 where the kernel is slow."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tune", action="store_true", help="try tiles, keep the best")
    parser.add_argument("--out", type=pathlib.Path, help="also write records as JSON")
    given = parser.parse_args(arguments)
    try:
        device = attached("9.0")
    except NoGPUError as error:
        print(f"{MODULE}: {error}", file=sys.stderr)
        return 2
    bandwidth = copy_bandwidth()
    print(f"{device}, jax {jax.__version__}, copies at {bandwidth / 1e9:.0f} GB/s")
    print(HEAD)
    records, tuned, slow = [], _tuned.read(TUNED), []
    for name in given.only:
        shape = SHAPES[name]
        found, tile = measure(shape, device, given.tune)
        print(*lines(name, shape, found, bandwidth), sep="\n", flush=True)
        mine, wanted = found["mosaic_gpu"], expected(shape)
        faster = found["cublas"].ms.median / mine.ms.median
        if wanted and faster < wanted:
            slow.append(
                f"{name} is {faster:.2f} times as fast as cuBLAS, expected {wanted}"
            )
        fields = dataclasses.asdict(tile)
        records.append(
            {"shape": name, "device": device, "tile": fields, "copy": bandwidth}
            | {"ms": {name: dataclasses.asdict(r.ms) for name, r in found.items()}}
            | {"launches": {name: r.launches for name, r in found.items()}}
            | {"bounds_ms": bounds_ms(shape, bandwidth)}
        )
        if given.tune:
            del fields["splits"]  # the heuristic's
            entry = {"device": device, "key": key(**_sizes(shape)), "tile": fields}
            entry |= {"ms": round(mine.ms.median, 5), "jax": jax.__version__}
            tuned.append({**entry, "date": time.strftime("%Y-%m-%d")})
            _tuned.write(TUNED, MODULE, tuned)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(given.out, json.dumps(records, indent=1) + "\n")
    for words in slow:
        print(words)
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
