"""Time and share of the copy bandwidth, beside XLA and cuDNN; tunes the tiles.

    python -m jmem.kernels.windowed_attention.bench           every shape of shapes.py
    python -m jmem.kernels.windowed_attention.bench --only llama3-8b-32k-b1
    python -m jmem.kernels.windowed_attention.bench --tune    and writes tuned.toml

Needs a GPU of compute capability 9.0; without one it says so and exits 2, and with 1 if
a shape is slower than expected. A timed call is a chain over regions of one large
cache, each call's output the next one's query, so that nothing is read from the level-2
cache again: what a model's layers do. Numbers of the kernel are compared with XLA's
before anything is timed.

Expect  80 % of the copy bandwidth contiguous, 75 % for windows from 32, 65 % for 8.
Seen    llama3-8b-32k-b1 on an H200, untuned: 62 %, XLA 26 %, cuDNN 86 %.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jmem.disk import write_atomically
from jmem.kernels import _bench, _tuned
from jmem.kernels._bench import NoGPUError, Time, attached, copy_bandwidth
from jmem.kernels.windowed_attention import windowed_attention
from jmem.kernels.windowed_attention.mosaic_gpu import TUNED, Tile, key, tile_for
from jmem.kernels.windowed_attention.shapes import SHAPES, Shape

MODULE = "jmem.kernels.windowed_attention.bench"
MIN_REGIONS = 4
TOLERANCE = 2.0**-6
"""Of outputs, which are averages of normal values: two units of bfloat16 at 1 to 2."""


def regions(shape: Shape) -> int:
    """Layers in the cache: together at least four times the level-2 cache."""
    return max(MIN_REGIONS, -(-4 * _bench.L2_BYTES // shape.read_bytes))


def chain(shape: Shape, **how: Any) -> Callable:
    """`regions(shape)` calls, one after the other, over the regions of one cache."""

    def run(q, keys, values, starts, length, tail_start, tail_length):
        def layer(q, region):
            at = region * shape.tokens
            table = (starts + at, length, tail_start + at, tail_length)
            sizes = shape.sizes()
            return windowed_attention(q, keys, values, *table, **sizes, **how), None

        every = jnp.arange(regions(shape), dtype=jnp.int32)
        return lax.scan(layer, q, every)[0]

    return run


def cudnn(shape: Shape) -> Callable:
    """The same for a contiguous cache, in the layout that cuDNN wants: [B, S, K, D]."""

    def run(q, caches):
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        for keys, values in caches:
            q = attend(q[:, None], keys, values)[:, 0]
        return q

    return run


def inputs(shape: Shape) -> tuple:
    """Random normal arrays and the table, on the GPU."""
    arrays = shape.arrays(regions(shape))
    seeds = jax.random.split(jax.random.key(0), len(arrays))
    drawn = [
        jax.random.normal(seed, array.shape, array.dtype)
        for seed, array in zip(seeds, arrays, strict=True)
    ]
    return (*drawn, *map(jnp.asarray, shape.table()))


def tiles(shape: Shape) -> Iterator[Tile]:
    """Tiles worth trying: what fits, few enough for minutes."""
    default = heuristic(shape)
    for keys in (64, 128):
        for swizzle in (64, 128):
            for stages in (2, 3, 4, 6):
                for factor in (1, 2):
                    tile = Tile(
                        keys=keys,
                        stages=stages,
                        swizzle=swizzle,
                        splits=factor * default.splits,
                    )
                    try:
                        tile.check(shape.head_dim)
                    except ValueError:
                        continue
                    yield tile


def heuristic(shape: Shape, device: str = "NVIDIA H200") -> Tile:
    """What `tile=None` takes."""
    return tile_for(
        batch=shape.batch,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        windows=shape.windows,
        device=device,
        **shape.sizes(),
    )


def verify(shape: Shape, args: tuple, tile: Tile) -> None:
    """Refuses to time a kernel whose numbers are not XLA's.

    Raises:
      ArithmeticError: names the shape, the tile and the difference.
    """
    of = functools.partial(windowed_attention, *args, **shape.sizes())
    mine = jax.jit(lambda: of(implementation="mosaic_gpu", tile=tile))()
    xla = jax.jit(lambda: of(implementation="xla"))()
    apart = float(jnp.max(jnp.abs(mine.astype("float32") - xla.astype("float32"))))
    if not apart <= TOLERANCE:
        raise ArithmeticError(f"{shape}, {tile}: {apart:.2e} from XLA's output.")


def measure(shape: Shape, device: str, tune: bool) -> tuple[dict[str, Time], Tile]:
    """Milliseconds a layer of each implementation, and the kernel's best tile."""
    args, count = inputs(shape), regions(shape)
    kernel, best = {}, heuristic(shape, device)
    for tile in tiles(shape) if tune else (best,):
        verify(shape, args, tile)
        run = chain(shape, implementation="mosaic_gpu", tile=tile)
        kernel[tile] = _bench.time(run, *args) / count
    best = min(kernel, key=lambda tile: kernel[tile].median)
    times = {
        "mosaic_gpu": kernel[best],
        "xla": _bench.time(chain(shape, implementation="xla"), *args) / count,
    }
    if not shape.window:
        q, keys, values, *_ = args
        caches = [
            tuple(
                jnp.swapaxes(x[:, :, at : at + shape.tokens], 1, 2).copy()
                for x in (keys, values)
            )
            for at in range(0, count * shape.tokens, shape.tokens)
        ]
        del args, keys, values
        times["cudnn"] = _bench.time(cudnn(shape), q, caches) / count
    return times, best


def expected(shape: Shape) -> float:
    """Share of the copy bandwidth that the kernel must reach."""
    if not shape.window:
        return 0.8
    return 0.75 if shape.window >= 32 else 0.65


def rows(name: str, shape: Shape, times: dict, bandwidth: float) -> Iterator[str]:
    """Lines of the table."""
    for implementation, taken in times.items():
        speed = shape.read_bytes / (taken.median / 1e3)
        spread = f"{taken.low:.4f} - {taken.high:.4f}"
        yield (
            f"{name:<28}{implementation:<12}{taken.median:>9.4f}  {spread:<18}"
            f"{speed / 1e9:>8.0f}{speed / bandwidth:>7.0%}"
        )


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
    print(f"{'shape':<28}{'':<12}{'ms':>9}  {'10 % - 90 %':<18}{'GB/s':>8}{'copy':>7}")
    records, tuned, slow = [], _tuned.read(TUNED), []
    for name in given.only:
        shape = SHAPES[name]
        times, tile = measure(shape, device, given.tune)
        print(*rows(name, shape, times, bandwidth), sep="\n", flush=True)
        taken = times["mosaic_gpu"].median / 1e3
        if shape.read_bytes / taken < expected(shape) * bandwidth:
            slow.append(f"{name} is below {expected(shape):.0%} of the bandwidth")
        fields = dataclasses.asdict(tile)
        records.append(
            {"shape": name, "device": device, "tile": fields, "copy": bandwidth}
            | {"ms": {name: dataclasses.asdict(t) for name, t in times.items()}}
        )
        if given.tune:
            del fields["splits"]
            tokens = shape.windows * shape.window + shape.max_tail
            tuned.append(
                {
                    "device": device,
                    "key": key(
                        shape.batch,
                        shape.head_dim,
                        tokens,
                        shape.windows,
                        shape.window,
                    ),
                    "tile": fields,
                    "ms": round(times["mosaic_gpu"].median, 5),
                    "jax": jax.__version__,
                    "date": time.strftime("%Y-%m-%d"),
                }
            )
            _tuned.write(TUNED, MODULE, tuned)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(given.out, json.dumps(records, indent=1) + "\n")
    for words in slow:
        print(words)
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
