"""The kernel, for Hopper: tiles are read packed and expanded in registers.

A block works on `tile.rows` tiles below each other, one column block of x, and one
share (split) of the tiles across, `tile.tiles` of them a step. Its warpgroups share a
ring of `tile.stages` slots in shared memory:

    a warp of the last warpgroup      shared memory          warpgroup w, consumer
    reads where tiles start        x  [N, 64 tiles]        decodes its tiles, two at a
    copies, by TMA, x and      ->  masks, prefixes,    ->  time, in registers
    the packed tiles               values [cap, 64]        yᵀ += a xᵀ      tensor cores
    waits for a free slot      <-                      <-  frees the slot
                                   y  [N, 64] float32  <-  after the last step, and
                                                           from there to memory

Rows of W are the 64 rows that a tensor-core product must have, tokens its N columns: up
to 64, a multiple of 8. More are worked on in column blocks, side by side, so that they
find the packed tiles in the level-2 cache; from `DENSE` on the matrix is decoded once,
by XLA, and multiplied dense. Splits are float32; XLA sums and scales them.

A copy is as long as the fullest tile and reads on into the next one's values, which the
same block needs next. What is read beyond a tile's end is never taken.

Bounds: the packed bytes, read once; and the decoding, `fragments.py`: a warp's
instructions a tile, which `budget.toml` holds, and its 38 loads from shared memory.
"""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jmem.kernels import _mgpu, _tuned
from jmem.kernels._resources import Resources
from jmem.kernels.spmm import fragments, reference
from jmem.kernels.spmm.fragbitmap import SIDE, FragBitmap

COLUMNS = 64
"""Tokens of a block, at most: columns of a product, which take registers."""
DENSE = 257
"""Tokens from which decoding once and multiplying dense is less work."""
PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200."""
RESIDENT = 3
"""Blocks that a multiprocessor is to hold, so that some decode while others wait."""
MOST_SPLITS = 16
"""That XLA sums in one launch."""
TOGETHER = 2
"""Tiles decoded for one product: more take registers, fewer more instructions."""
REGISTERS = 72
"""A thread's for eight columns; `budget.toml` holds the compiled kernels to it."""
TUNED = pathlib.Path(__file__).with_name("tuned.toml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What may be tuned; results differ by rounding only.

    Raises:
      ValueError: a size that the kernel does not have.
    """

    rows: int = 1
    """Tiles below each other, each a warpgroup's, that share x: 1, 2 or 4."""
    tiles: int = 4
    """Tiles across a step, 1, 2 or 4; halved until it divides the matrix's tiles."""
    stages: int = 3
    """Steps in flight."""
    splits: int = 1
    """Blocks that share the tiles of a row of tiles."""

    def __post_init__(self):
        for name in ("rows", "tiles"):
            if getattr(self, name) not in (1, 2, 4):
                raise ValueError(f"Tile: {name}={getattr(self, name)}; need 1, 2 or 4.")
        if self.stages < 2 or self.splits < 1:
            raise ValueError(
                f"Tile: stages={self.stages}, splits={self.splits}; need 2 or more "
                "stages and 1 split or more."
            )

    @property
    def threads(self) -> int:
        """Of a block."""
        return 128 * (self.rows + 1)

    def fitted(self, across: int) -> "Tile":
        """Whose steps divide a row of `across` tiles, and no split is without one."""
        tiles = math.gcd(self.tiles, across)
        splits = min(self.splits, across // tiles)
        return dataclasses.replace(self, tiles=tiles, splits=splits)

    def shared_bytes(self, columns: int, cap: int, bits: int = 16) -> int:
        """Shared memory of a block, in closed form; each array begins at a 1024th."""
        slots = self.stages * self.tiles
        packed = slots * self.rows
        sizes = (
            2 * slots * columns * SIDE,
            packed * slot_rows(cap, bits) * SIDE * bits // 8,
            packed * 4 * 2 * SIDE,
            packed * 2 * SIDE,
            4 * self.rows * columns * SIDE,
        )
        return sum(-(-size // 1024) * 1024 for size in sizes)

    def resident(self, columns: int, cap: int, bits: int = 16) -> int:
        """Blocks that a multiprocessor holds at once, by registers as seen compiled."""
        return Resources(
            registers=REGISTERS + (columns - 8) // 3,
            spill_bytes=0,
            shared_bytes=self.shared_bytes(columns, cap, bits),
        ).blocks_per_core(self.threads)

    def check(self, columns: int, cap: int, bits: int = 16) -> None:
        """Refuses a tile whose ring is larger than shared memory.

        Raises:
          ValueError: as said.
        """
        needed = self.shared_bytes(columns, cap, bits)
        if needed > _mgpu.SHARED_BYTES:
            raise ValueError(
                f"Tile: rows={self.rows}, tiles={self.tiles} and stages={self.stages} "
                f"need {needed:,} bytes of shared memory for {columns} columns and "
                f"cap={cap}, a block has {_mgpu.SHARED_BYTES:,}; lower one."
            )


def slot_rows(cap: int, bits: int) -> int:
    """Rows of values in a tile's slot: copies begin at a multiple of 128 bytes."""
    together = 128 // (SIDE * bits // 8)
    return -(-cap // together) * together


def columns_of(tokens: int) -> tuple[int, int]:
    """Column blocks, and the columns of each."""
    blocks = max(1, -(-tokens // COLUMNS))
    return blocks, max(8, -(-tokens // (8 * blocks)) * 8)


def tile_for(
    *,
    tokens: int,
    down: int,
    across: int,
    cap: int,
    bits: int = 16,
    device: str = "NVIDIA H200",
) -> Tile:
    """The tile that was measured best on `device` for such sizes, or a heuristic's.

    The heuristic: more rows share x where it has many columns; as many tiles and stages
    as let `RESIDENT` blocks stay on a multiprocessor; and of the splits that give every
    multiprocessor as many blocks as it holds, if there are any, those by which the
    busiest has the least to do, a block's start counted as half a step.
    """
    blocks, columns = columns_of(tokens)
    measured = _tuned.lookup(TUNED, device, key(tokens, down, across, cap, bits))
    rows = 2 if columns > 16 and down > 1 else 1
    sizes = (columns, cap, bits)
    options = [
        Tile(rows=rows, tiles=tiles, stages=stages).fitted(across)
        for tiles in (4, 2, 1)
        for stages in (4, 3, 2)
    ]
    tile = max(options, key=lambda one: min(one.resident(*sizes), RESIDENT))
    tile = dataclasses.replace(tile, **measured).fitted(across)
    grid, steps = blocks * -(-down // tile.rows), across // tile.tiles

    def cost(splits: int) -> tuple[bool, float]:
        few = grid * splits < PROCESSORS * tile.resident(*sizes)
        busiest = -(-grid * splits // PROCESSORS)
        return few, busiest * (-(-steps // splits) + 0.5)

    splits = min(range(1, min(steps, MOST_SPLITS) + 1), key=cost)
    return dataclasses.replace(tile, splits=splits)


def key(tokens: int, down: int, across: int, cap: int, bits: int) -> dict:
    """What a measured tile is filed under: sizes up to the next power of two."""
    return {
        "tokens": _tuned.bucket(tokens),
        "outputs": _tuned.bucket(down * SIDE),
        "inputs": _tuned.bucket(across * SIDE),
        "cap": _tuned.bucket(cap),
        "bits": bits,
    }


def kernel_name(
    columns: int, values: str, dtype: str, tile: Tile, lanes: bool = False
) -> str:
    """What profilers call the kernel."""
    kind = values if values == dtype else f"{values}_{dtype}"
    return f"spmm_n{columns}_{kind}_r{tile.rows}t{tile.tiles}{'_lanes' * lanes}"


def multiply(
    x: Float[Array, "... inputs"],
    matrix: FragBitmap,
    layer: ArrayLike | None = None,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
    lanes: bool = False,
) -> Float[Array, "... outputs"]:
    """As `reference.multiply`. `lanes` compiles by the other lowering of Mosaic."""
    tokens = math.prod(x.shape[:-1])
    if tokens >= DENSE:
        return reference.multiply(x, matrix, layer)
    wide = x.reshape(tokens, matrix.inputs)
    how = {"tile": tile, "interpret": interpret, "lanes": lanes}
    y = sum_splits(wide, matrix, layer, **how)
    y *= reference.scales_of(matrix, 2, layer)
    return y.astype(x.dtype).reshape(*x.shape[:-1], matrix.outputs)


def sum_splits(
    x: Float[Array, "tokens inputs"],
    matrix: FragBitmap,
    layer: ArrayLike | None = None,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
    lanes: bool = False,
) -> Float[Array, "tokens outputs"]:
    """The product before it is scaled, float32; part by part, that it is one launch."""
    parts = _multiply(x, matrix, layer, tile, interpret, lanes)
    return functools.reduce(jnp.add, parts[:, : len(x), : matrix.outputs])


def _multiply(x, matrix, layer, tile, interpret, lanes):
    """Float32 [splits, tokens, outputs], or more of both: what each split adds."""
    (down, across), cap, bits = matrix.tiles, matrix.cap, matrix.bits
    blocks, columns = columns_of(len(x))
    if tile is None:
        sizes = {"tokens": len(x), "down": down, "across": across}
        tile = tile_for(**sizes, cap=cap, bits=bits)
    tile = tile.fitted(across)
    tile.check(columns, cap, bits)
    stages, tiles, steps = tile.stages, tile.tiles, across // tile.tiles
    together, width = min(tiles, TOGETHER), tiles * SIDE
    dtype, values = str(x.dtype), {4: "int4", 8: "int8"}.get(bits, str(x.dtype))
    slot_bytes = slot_rows(cap, bits) * SIDE * bits // 8
    by_ptx = fragments.decode_by_ptx(values, dtype, together, slot_bytes)
    by_jax = fragments.decode_by_jax(values, dtype)
    arrays = [matrix.values, matrix.masks, matrix.prefixes, matrix.starts]
    if layer is None:
        layer, arrays = 0, [array[None] for array in arrays]
    layers, rows = arrays[0].shape[:2]
    above = -(-down // tile.rows)

    def body(*refs):
        x_ref, values_ref, masks_ref, prefixes_ref, starts_ref, layer_ref = refs[:6]
        y_ref, x_s, values_s, masks_s, prefixes_s, y_s, full, free, *spare = refs[6:]
        row, split, block = (lax.axis_index(n) for n in ("row", "split", "block"))
        thread = lax.axis_index("warpgroup")
        at_layer = jnp.clip(layer_ref[0], 0, layers - 1)
        first = lax.div(split * steps, tile.splits)
        count = lax.div((split + 1) * steps, tile.splits) - first
        columns_here = _mgpu.ds(block * columns, columns)

        def tile_of(below, step):
            """The first tile of a step, in a row below the block's first one."""
            at = jnp.minimum(row * tile.rows + below, down - 1)
            return at * across + step * tiles

        def starts_of(i):
            step = first + jnp.minimum(i, count - 1)
            return [
                jnp.clip(starts_ref[at_layer, tile_of(below, step) + t], 0, rows - cap)
                for below in range(tile.rows)
                for t in range(tiles)
            ]

        def produce(i, starts):
            ahead = starts_of(i + 1)  # their latency hides behind the wait
            stage, step = lax.rem(i, stages), first + i
            _mgpu.when(i >= stages)(lambda: _mgpu.barrier_wait(free.at[stage]))
            copies = [
                (x_ref.at[columns_here, _mgpu.ds(step * width, width)], x_s.at[stage])
            ]
            for below in range(tile.rows):
                slot, packed = stage * tile.rows + below, tile_of(below, step)
                for source, ring in ((masks_ref, masks_s), (prefixes_ref, prefixes_s)):
                    part = source.at[at_layer, _mgpu.ds(packed, tiles)]
                    copies.append((part, ring.at[slot]))
                for t in range(tiles):
                    start = starts[below * tiles + t]
                    part = values_ref.at[at_layer, _mgpu.ds(start, cap)]
                    copies.append((part, values_s.at[slot, t, _mgpu.ds(0, cap)]))
            for source, to in copies:
                _mgpu.copy_gmem_to_smem(source, to, full.at[stage])
            return ahead

        def drain(i, _):
            _mgpu.barrier_wait(free.at[lax.rem(i, stages)])
            return ()

        # One warp copies, as four would issue the same instructions four times. Which
        # one differs between the blocks of a multiprocessor, as a scheduler has the
        # same warp of each.
        number = (row * tile.splits + split) * blocks + block
        copying = lax.rem(lax.div(number, PROCESSORS), 4)

        @_mgpu.when(thread == tile.rows)
        def _():
            @_mgpu.warp_map
            def _(warp):
                @_mgpu.when(warp == copying)
                def _():
                    lax.fori_loop(0, count, produce, starts_of(0))
                    lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, ())

        def consume(y, lanes):
            def step(i, _):
                stage = lax.rem(i, stages)
                slot = stage * tile.rows + thread
                rings = [ring.at[slot] for ring in (values_s, masks_s, prefixes_s)]

                _mgpu.barrier_wait(full.at[stage])
                if interpret:  # which multiplies from shared memory only
                    for t in range(tiles):
                        a = by_jax(*(ring.at[t] for ring in rings))
                        spare[0][thread, :, _mgpu.ds(t * SIDE, SIDE)] = a
                    _mgpu.commit_smem()
                    _mgpu.wgmma(y, spare[0].at[thread], x_s.at[stage].transpose((1, 0)))
                    _mgpu.wgmma_wait(0)
                else:
                    for t in range(0, tiles, together):
                        some = _mgpu.ds(t, together)
                        a = by_ptx([ring.at[some] for ring in rings], lanes)
                        part = x_s.at[stage, :, _mgpu.ds(t * SIDE, together * SIDE)]
                        _mgpu.wgmma(y, a, part.transpose((1, 0)))
                        _mgpu.wgmma_wait(0)  # before its registers are written again
                _mgpu.barrier_arrive(free.at[stage])
                return ()

            lax.fori_loop(0, count, step, ())
            return y[...]

        @_mgpu.when(thread < tile.rows)
        def _():
            lanes = None if interpret else fragments.lane_constants()
            run = functools.partial(consume, lanes=lanes)
            y = _mgpu.run_scoped(run, _mgpu.ACC((SIDE, columns), jnp.float32))
            turned = _mgpu.layout_cast(y, _mgpu.Layout.WGMMA_TRANSPOSED)
            y_s.at[thread].transpose((1, 0))[...] = turned
            _mgpu.commit_smem()
            to = _mgpu.ds((row * tile.rows + thread) * SIDE, SIDE)
            _mgpu.copy_smem_to_gmem(y_s.at[thread], y_ref.at[split, columns_here, to])
            _mgpu.wait_smem_to_gmem(0)

    ring = (stages * tile.rows, tiles)
    row_values, dtype_values = arrays[0].shape[-1], arrays[0].dtype
    turn = tile.rows, columns, SIDE
    call = _mgpu.kernel(
        body,
        kernel_name=kernel_name(columns, values, dtype, tile, lanes),
        grid=(above, tile.splits, blocks),
        grid_names=("row", "split", "block"),
        num_threads=tile.rows + 1,
        thread_name="warpgroup",
        out_type=jax.ShapeDtypeStruct(
            (tile.splits, blocks * columns, above * tile.rows * SIDE), jnp.float32
        ),
        scratch_types=(
            _mgpu.swizzled((stages, columns, width), dtype, 128),
            _mgpu.SMEM((*ring, slot_rows(cap, bits), row_values), dtype_values),
            _mgpu.SMEM((*ring, 2 * SIDE), jnp.int32),
            _mgpu.SMEM((*ring, SIDE), jnp.int16),
            _mgpu.swizzled(turn, jnp.float32, 128),
            _mgpu.Barrier(
                num_arrivals=1 + tile.rows * (2 + tiles), num_barriers=stages
            ),
            _mgpu.Barrier(num_arrivals=tile.rows, num_barriers=stages),
            *([_mgpu.swizzled((tile.rows, SIDE, width), dtype, 128)] * interpret),
        ),
        lanes=lanes,
        interpret=interpret,
    )
    padding = ((0, blocks * columns - len(x)), (0, across * SIDE - matrix.inputs))
    return call(
        jnp.pad(x, padding),
        arrays[0],
        lax.bitcast_convert_type(arrays[1], jnp.int32),
        lax.bitcast_convert_type(arrays[2], jnp.int16),
        arrays[3],
        jnp.asarray(layer, jnp.int32).reshape(1),
    )
