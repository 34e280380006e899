"""The kernel, for Hopper: split-KV flash decoding whose key tiles come from a table.

A block works on one row, one key-value head and one share (split) of the row's steps.
A step is `tile.keys` tokens in table order, windows first, then the tail. Two
warpgroups share a ring of `tile.stages` slots in shared memory:

    warpgroup 1, producer           shared memory            warpgroup 0, consumer
    reads the table               q  [64, D]               s = q kᵀ       tensor cores
    copies windows, or parts  ->  k  [stages, keys, D] ->  masks, online softmax
    of them, by TMA           ->  v  [stages, keys, D] ->  p -> shared memory
    waits for a free slot     <-  p  [64, keys]        <-  o = o * shrink + p v
                                  o  [64, D] float32   <-  after the last step, and
                                  lse [64]                 from there to memory

Barriers: `k_full` and `v_full` complete when all copies of a slot have landed, `free`
when the consumer is done with it. A block writes its normalised output and its natural
log-sum-exp, float32; `reference.merge` joins the splits, in XLA.

The G = H / K query heads of a key-value head are padded to the 64 rows of a tensor-core
product: 64 operations a byte, 275e12 a second at 4.3e12 bytes a second, a third of what
the tensor cores do. With keys as rows nothing would be padded, but softmax would reduce
across warps, and D = 96 could not be.

Three things keep what is not valid out. A step is worked on only if it has a valid
token. Scores of others are set to `MASKED` before the maximum. And as 0 * NaN is NaN,
the first and last steps of a part zero their other value rows in shared memory.

Roofline: 2 * B * K * (length + tail_length) * D * itemsize bytes, read once.
"""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jmem.kernels import _mgpu, _tuned
from jmem.kernels.windowed_attention import ALIGNMENT, MAX_GROUPS, reference

ROWS = MAX_GROUPS
"""Rows of a warpgroup's tensor-core product, which query heads are padded to."""
MASKED = -1e30
"""Score of a token that is not valid: finite, so that no maximum is -inf."""
LOG2E = math.log2(math.e)
PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200."""
MIN_BLOCKS = 2 * PROCESSORS
"""Blocks in the grid, if the keys give enough steps."""
TUNED = pathlib.Path(__file__).with_name("tuned.toml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What may be tuned; results differ by rounding only.

    Raises:
      ValueError: a size no tensor core takes.
    """

    keys: int = 64
    """Tokens a step: 64 or 128."""
    stages: int = 4
    """Steps in flight."""
    splits: int = 1
    """Blocks that share the tokens of a row and key-value head."""
    swizzle: int = 128
    """Bytes of a row of a shared-memory tile: 32, 64 or 128; fewer need fewer registers
    and divide more head dims."""

    def __post_init__(self):
        if self.keys not in (64, 128):
            raise ValueError(f"Tile: keys={self.keys}; need 64 or 128.")
        if self.swizzle not in (32, 64, 128):
            raise ValueError(f"Tile: swizzle={self.swizzle}; need 32, 64 or 128.")
        if self.stages < 1 or self.splits < 1:
            raise ValueError(
                f"Tile: stages={self.stages}, splits={self.splits}; need 1 or more."
            )

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory of a block, in closed form, for 16-bit keys.

        Each array begins at a multiple of 1024; one such piece holds the barriers, and
        one is lost by aligning the first.
        """
        halves = (ROWS * head_dim, ROWS * self.keys)
        ring = 2 * self.stages * self.keys * head_dim
        sizes = [2 * n for n in (*halves, ring)] + [4 * ROWS * head_dim, 4 * ROWS]
        return sum(-(-size // 1024) * 1024 for size in sizes) + 2 * 1024

    def check(self, head_dim: int) -> None:
        """Refuses a tile that does not fit `head_dim`.

        Raises:
          ValueError: the swizzle does not divide a row, or shared memory is exceeded.
        """
        if 2 * head_dim % self.swizzle:
            raise ValueError(
                f"Tile: swizzle={self.swizzle} does not divide the {2 * head_dim} "
                f"bytes of a row of head_dim={head_dim}; need a divisor."
            )
        if self.shared_bytes(head_dim) > _mgpu.SHARED_BYTES:
            raise ValueError(
                f"Tile: keys={self.keys} and stages={self.stages} need "
                f"{self.shared_bytes(head_dim):,} bytes of shared memory at "
                f"head_dim={head_dim}, a block has {_mgpu.SHARED_BYTES:,}; lower one."
            )


def tile_for(
    *,
    batch: int,
    kv_heads: int,
    head_dim: int,
    windows: int,
    window: int,
    max_tail: int,
    device: str = "NVIDIA H200",
) -> Tile:
    """The tile that was measured best on `device` for such sizes, or a heuristic's.

    The number of splits is always the heuristic's: blocks enough for two waves, and
    then, within twice that, the fewest that leave the last wave fullest.
    """
    tokens = windows * window + max_tail
    measured = _tuned.lookup(
        TUNED, device, key(batch, head_dim, tokens, windows, window)
    )
    swizzle = _mgpu.swizzle_of(head_dim, jnp.bfloat16)
    # At D = 64 narrower rows take under 128 registers: two blocks share a processor.
    default = Tile(swizzle=64 if head_dim == 64 else swizzle)
    tile = dataclasses.replace(default, **measured)
    # An unaligned tail is copied from up to seven slots before it.
    parts = (windows * window, max_tail and max_tail + ALIGNMENT - 1)
    steps = sum(-(-part // tile.keys) for part in parts)
    return dataclasses.replace(tile, splits=_splits(batch * kv_heads, steps))


def key(batch: int, head_dim: int, tokens: int, windows: int, window: int) -> dict:
    """What a measured tile is filed under: sizes up to the next power of two."""
    return {
        "batch": _tuned.bucket(batch),
        "head_dim": head_dim,
        "tokens": _tuned.bucket(tokens),
        "window": window if windows else 0,
    }


def kernel_name(head_dim: int, window: int, lanes: bool = False) -> str:
    """What profilers call the kernel; window 0 where the table is empty."""
    return f"windowed_attention_d{head_dim}_w{window}{'_lanes' * lanes}"


def _splits(blocks: int, most: int) -> int:
    """Splits for `blocks` pairs of row and head, at most `most`, at least 1.

    >>> [_splits(blocks, 512) for blocks in (8, 48, 128, 256)]
    [33, 8, 3, 2]
    """
    fewest = max(1, min(-(-MIN_BLOCKS // blocks), most))

    def idle(splits: int) -> float:
        waves = -(-blocks * splits // PROCESSORS)
        return 1 - blocks * splits / (waves * PROCESSORS)

    candidates = range(fewest, max(fewest, min(2 * fewest, most)) + 1)
    return min(candidates, key=lambda splits: (round(idle(splits), 1), splits))


def attend(
    q: Float[Array, "B H D"],
    keys: Float[Array, "N K S D"],
    values: Float[Array, "N K S D"],
    starts: Int[Array, "*L B W"],
    length: Int[Array, "*L B"],
    tail_start: Int[Array, "*L B"],
    tail_length: Int[Array, "*L B"],
    *,
    window: int,
    max_tail: int,
    scale: float,
    layer: Int[Array, ""] | int | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
    lanes: bool = False,
) -> tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    """As `reference.attend`, of row `layer` of a table that the kernel clamps itself.

    `lanes` compiles by the other lowering of Mosaic.
    """
    lengths = (length, tail_start, tail_length)
    if layer is None:
        layer, starts, lengths = 0, starts[None], [x[None] for x in lengths]
    layers, batch, windows = starts.shape
    _, heads, dim = q.shape
    pools, kv_heads, slots, _ = keys.shape
    groups = heads // kv_heads
    if tile is None:
        tile = tile_for(
            batch=batch,
            kv_heads=kv_heads,
            head_dim=dim,
            windows=windows,
            window=window,
            max_tail=max_tail,
        )
    tile.check(dim)
    stages, splits, dtype = tile.stages, tile.splits, q.dtype
    rows = -(-groups // ALIGNMENT) * ALIGNMENT  # written to memory, of ROWS computed
    # A copy lies within one window and fills a divisor of a step.
    chunk = math.gcd(window, tile.keys) if windows else tile.keys
    copies = tile.keys // chunk
    # The second product goes piece by piece through D: each needs its own registers.
    piece = tile.swizzle // 2
    pieces = [_mgpu.ds(at, piece) for at in range(0, dim, piece)]

    def body(*refs):
        q_ref, keys_ref, values_ref, layer_ref, starts_ref, *lengths_refs = refs[:8]
        o_ref, lse_ref = refs[8:10]
        q_s, k_s, v_s, p_s, o_s, lse_s, q_full, k_full, v_full, free = refs[10:]
        row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
        at_layer = jnp.clip(layer_ref[0], 0, layers - 1)
        valid, tail, tail_valid = (ref[at_layer, row] for ref in lengths_refs)
        valid = jnp.clip(valid, 0, windows * window)
        tail = jnp.clip(tail, 0, slots)
        tail_valid = jnp.clip(tail_valid, 0, jnp.minimum(max_tail, slots - tail))
        lead = lax.rem(tail, ALIGNMENT)  # slots copied before the tail, to be aligned
        window_steps = lax.div(valid + (tile.keys - 1), tile.keys)
        tail_steps = lax.div(lead + tail_valid + (tile.keys - 1), tile.keys)
        all_steps = window_steps + jnp.where(tail_valid > 0, tail_steps, 0)
        first = lax.div(split * all_steps, splits)
        count = lax.div((split + 1) * all_steps, splits) - first

        def slot_of(step, j):
            """First cache slot of copy `j` of a step."""
            at = tail - lead + (step - window_steps) * tile.keys + j * chunk
            if windows:
                token = step * tile.keys + j * chunk
                entry = jnp.minimum(lax.div(token, window), windows - 1)
                start = jnp.clip(starts_ref[at_layer, row, entry], 0, slots - window)
                start = start - lax.rem(start, ALIGNMENT)
                inside = start + lax.rem(token, window)
                at = jnp.where(step < window_steps, inside, at)
            return _mgpu.multiple_of(at, ALIGNMENT)

        def produce(i, _):
            # The table is read before waiting: its latency hides behind the ring.
            sources = [slot_of(first + i, j) for j in range(copies)]
            stage = lax.rem(i, stages)
            _mgpu.when(i >= stages)(lambda: _mgpu.barrier_wait(free.at[stage]))
            pool = row if pools > 1 else 0
            rings = ((keys_ref, k_s, k_full), (values_ref, v_s, v_full))
            for source, ring, full in rings:
                for j, slot in enumerate(sources):
                    _mgpu.copy_gmem_to_smem(
                        source.at[pool, head, _mgpu.ds(slot, chunk)],
                        ring.at[stage, _mgpu.ds(j * chunk, chunk)],
                        full.at[stage],
                    )
            return ()

        def drain(i, _):
            _mgpu.barrier_wait(free.at[lax.rem(i, stages)])
            return ()

        @_mgpu.when(lax.axis_index("warpgroup") == 1)
        def _():
            lax.fori_loop(0, count, produce, ())
            lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, ())

        def consume(i, carry):
            out, top, total = carry
            step, stage = first + i, lax.rem(i, stages)
            before = jnp.where(step < window_steps, step, step - window_steps)
            before = before * tile.keys
            low = jnp.where(step < window_steps, 0, lead - before)
            high = jnp.where(step < window_steps, valid, lead + tail_valid) - before

            _mgpu.barrier_wait(k_full.at[stage])
            scores = product(q_s, k_s.at[stage].transpose((1, 0)), tile.keys)
            column = iota((ROWS, tile.keys), 1)
            seen = (column >= low) & (column < high)
            scores = jnp.where(seen, scores * (scale * LOG2E), MASKED)
            new = jnp.maximum(top, scores.max(axis=1))
            shrink = jnp.exp2(top - new)
            weights = jnp.exp2(scores - along(new, tile.keys))
            total = total * shrink + weights.sum(axis=1)
            p_s[...] = weights.astype(dtype)

            _mgpu.barrier_wait(v_full.at[stage])

            @_mgpu.when((low > 0) | (high < tile.keys))
            def _():
                for columns in pieces:
                    v = _mgpu.load(v_s.at[stage, :, columns], layout=layout)
                    token = iota((tile.keys, piece), 0)
                    kept = (token >= low) & (token < high)
                    v_s[stage, :, columns] = jnp.where(kept, v, jnp.zeros((), dtype))

            _mgpu.commit_smem()
            out = [
                part * along(shrink, piece)
                + product(p_s, v_s.at[stage, :, columns], piece)
                for part, columns in zip(out, pieces, strict=True)
            ]
            _mgpu.barrier_arrive(free.at[stage])
            return out, new, total

        @_mgpu.when(lax.axis_index("warpgroup") == 0)
        def _():
            _mgpu.copy_gmem_to_smem(q_ref.at[row, head], q_s, q_full)
            _mgpu.barrier_wait(q_full)
            vector = layout.reduce(1)
            out = [constant(0, (ROWS, piece), layout) for _ in pieces]
            top, total = constant(MASKED, (ROWS,), vector), constant(0, (ROWS,), vector)
            out, top, total = lax.fori_loop(0, count, consume, (out, top, total))
            some = total > 0  # not so in a split without a step
            share = along(jnp.where(some, 1 / total, 0), piece)
            for part, columns in zip(out, pieces, strict=True):
                o_s[:, columns] = part * share
            lse_s[...] = jnp.where(some, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
            _mgpu.commit_smem()
            for mine, whole in ((o_s, o_ref), (lse_s, lse_ref)):
                used = mine.at[_mgpu.ds(0, rows)]
                _mgpu.copy_smem_to_gmem(used, whole.at[split, row, head])
            _mgpu.wait_smem_to_gmem(0)

    layout = _mgpu.Layout.WGMMA
    iota = functools.partial(_mgpu.broadcasted_iota, jnp.int32, layout=layout)

    def constant(value, shape, layout):
        return _mgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def along(vector, columns):
        return lax.broadcast_in_dim(vector, (ROWS, columns), [0])

    def product(a, b, columns):
        def run(accumulator):
            _mgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        return _mgpu.run_scoped(run, _mgpu.ACC((ROWS, columns), jnp.float32))

    call = _mgpu.kernel(
        body,
        kernel_name=kernel_name(dim, window if windows else 0, lanes),
        grid=(batch, kv_heads, splits),
        grid_names=("row", "head", "split"),
        num_threads=2,
        thread_name="warpgroup",
        out_type=(
            jax.ShapeDtypeStruct((splits, batch, kv_heads, rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, kv_heads, rows), jnp.float32),
        ),
        scratch_types=(
            _mgpu.swizzled((ROWS, dim), dtype, tile.swizzle),
            _mgpu.swizzled((stages, tile.keys, dim), dtype, tile.swizzle),
            _mgpu.swizzled((stages, tile.keys, dim), dtype, tile.swizzle),
            _mgpu.swizzled((ROWS, tile.keys), dtype, tile.swizzle),
            _mgpu.swizzled((ROWS, dim), jnp.float32, min(4 * piece, 128)),
            _mgpu.SMEM((ROWS,), jnp.float32),
            _mgpu.Barrier(),
            _mgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            _mgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            _mgpu.Barrier(num_barriers=stages),
        ),
        lanes=lanes,
        interpret=interpret,
    )
    padding = ((0, 0), (0, 0), (0, ROWS - groups), (0, 0))
    outs, lses = call(
        jnp.pad(q.reshape(batch, kv_heads, groups, dim), padding),
        keys,
        values,
        jnp.asarray(layer, jnp.int32).reshape(1),
        starts if windows else jnp.zeros((1, 1, 1), jnp.int32),  # no empty operand
        *lengths,
    )
    return reference.merge(
        outs[..., :groups, :].reshape(splits, batch, heads, dim),
        lses[..., :groups].reshape(splits, batch, heads),
    )
