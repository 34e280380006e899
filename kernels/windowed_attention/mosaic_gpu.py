"""The kernel, for Hopper: split-KV flash decoding whose key tiles come from a table.

A block works on one row, one key-value head and one share (split) of the row's steps.
A step is `tile.keys` tokens in table order, windows first, then the tail. Two
warpgroups share a ring of `tile.stages` slots in shared memory:

    warpgroup 1, producer           shared memory            warpgroup 0, consumer
    reads and clamps the table    q  [N, D]               s = k qᵀ       tensor cores
    copies windows, or parts  ->  k  [stages, keys, D] ->  masks, online softmax
    of them, by TMA           ->  v  [stages, keys, D] ->  p -> shared memory
    waits for a free slot     <-  p  [N, keys]        <-  o = o * shrink + vᵀ pᵀ
                                  o  [N, D] float32   <-  after the last step, and
                                                          from there to memory

Barriers: `k_full` and `v_full` complete when all copies of a slot have landed, `free`
when the consumer is done with it. A block writes its normalised output and its natural
log-sum-exp, float32, the latter repeated to the former's width: for XLA merging the
splits is then element by element, which is one launch.

Tokens, and then the columns of v, are the 64 rows that a tensor-core product must have;
its columns are the N query heads of a key-value head, G = H / K up to the next multiple
of 8. So little is padding, and so few registers and bytes are taken that two blocks
share a multiprocessor: one reads while the other starts or ends. The maximum of a query
is over rows, hence across warps, once a step; its sum is, once a block. All warps meet
at that maximum, so that none writes p while another still multiplies by the last one.

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
from jmem.kernels._resources import Resources
from jmem.kernels.windowed_attention import ALIGNMENT, reference

HEIGHT = 64
"""Rows of a warpgroup's tensor-core product: tokens, or columns of the values."""
MASKED = -1e30
"""Score of a token that is not valid: finite, so that no maximum is -inf."""
LOG2E = math.log2(math.e)
PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200."""
THREADS = 256
"""Of a block: two warpgroups."""
REGISTERS = 80
"""A thread's, for up to eight query heads a key-value head; `budget.toml` holds the
compiled kernels to it."""
MERGED = 64
"""Splits that XLA is sure to merge in one launch."""
TUNED = pathlib.Path(__file__).with_name("tuned.toml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What may be tuned; results differ by rounding only.

    Raises:
      ValueError: a size no tensor core takes.
    """

    keys: int = 64
    """Tokens a step: 64 or 128."""
    stages: int = 3
    """Steps in flight."""
    splits: int = 1
    """Blocks that share the tokens of a row and key-value head."""
    swizzle: int = 128
    """Bytes of a row of a shared-memory tile: 32, 64 or 128; fewer divide more head
    dims."""

    def __post_init__(self):
        if self.keys not in (64, 128):
            raise ValueError(f"Tile: keys={self.keys}; need 64 or 128.")
        if self.swizzle not in (32, 64, 128):
            raise ValueError(f"Tile: swizzle={self.swizzle}; need 32, 64 or 128.")
        if self.stages < 1 or self.splits < 1:
            raise ValueError(
                f"Tile: stages={self.stages}, splits={self.splits}; need 1 or more."
            )

    def shared_bytes(self, head_dim: int, groups: int = 1) -> int:
        """Shared memory of a block, in closed form, for 16-bit keys.

        Each array begins at a multiple of 1024; two such pieces are for reductions
        across warps.
        """
        columns = columns_of(groups)
        ring = self.stages * self.keys * head_dim
        halves = (columns * head_dim, ring, ring, columns * self.keys)
        sizes = [2 * n for n in halves] + [4 * columns * head_dim]
        return sum(-(-size // 1024) * 1024 for size in sizes) + 2 * 1024

    def resident(self, head_dim: int, groups: int = 1) -> int:
        """Blocks that a multiprocessor holds at once, by registers as seen compiled."""
        more = 3 * (columns_of(groups) - ALIGNMENT) + 48 * (self.keys // 64 - 1)
        return Resources(
            registers=min(REGISTERS + more, 255),
            spill_bytes=0,
            shared_bytes=self.shared_bytes(head_dim, groups),
        ).blocks_per_core(THREADS)

    def check(self, head_dim: int, groups: int = 1) -> None:
        """Refuses a tile that does not fit `head_dim`.

        Raises:
          ValueError: the swizzle does not divide a row, or shared memory is exceeded.
        """
        if 2 * head_dim % self.swizzle:
            raise ValueError(
                f"Tile: swizzle={self.swizzle} does not divide the {2 * head_dim} "
                f"bytes of a row of head_dim={head_dim}; need a divisor."
            )
        needed = self.shared_bytes(head_dim, groups)
        if needed > _mgpu.SHARED_BYTES:
            raise ValueError(
                f"Tile: keys={self.keys} and stages={self.stages} need "
                f"{needed:,} bytes of shared memory at "
                f"head_dim={head_dim}, a block has {_mgpu.SHARED_BYTES:,}; lower one."
            )


def columns_of(groups: int) -> int:
    """Query heads of a key-value head, padded for a tensor-core product."""
    return -(-groups // ALIGNMENT) * ALIGNMENT


def steps_of(tile: Tile, *, windows: int, window: int, max_tail: int) -> int:
    """Steps of a row, all of whose slots are valid."""
    # An unaligned tail is copied from up to seven slots before it.
    parts = (windows * window, max_tail and max_tail + ALIGNMENT - 1)
    return sum(-(-part // tile.keys) for part in parts)


def tile_for(
    *,
    batch: int,
    kv_heads: int,
    head_dim: int,
    windows: int,
    window: int,
    max_tail: int,
    groups: int = 1,
    device: str = "NVIDIA H200",
) -> Tile:
    """The tile that was measured best on `device` for such sizes, or a heuristic's.

    The number of splits is always the heuristic's: of those within 2 % of the least
    predicted time the one that fills the multiprocessors most, then the fewest. No more
    are tried than merge in one launch, unless it takes more for every multiprocessor to
    have a block.
    """
    tokens = windows * window + max_tail
    measured = _tuned.lookup(
        TUNED, device, key(batch, head_dim, tokens, windows, window)
    )
    tile = Tile(swizzle=_mgpu.swizzle_of(head_dim, jnp.bfloat16))
    tile = dataclasses.replace(tile, **measured)
    steps = steps_of(tile, windows=windows, window=window, max_tail=max_tail)
    pairs = batch * kv_heads
    sizes = {"pairs": pairs, "steps": steps, "head_dim": head_dim, "groups": groups}
    most = max(1, min(steps, max(MERGED, PROCESSORS // pairs)))
    tiles = [dataclasses.replace(tile, splits=1 + n) for n in range(most)]
    times = {one: predicted_us(one, **sizes) for one in tiles}
    near = [one for one in tiles if times[one] <= 1.02 * min(times.values())]
    room = PROCESSORS * tile.resident(head_dim, groups)
    return max(near, key=lambda one: (min(pairs * one.splits, room), -one.splits))


def predicted_us(
    tile: Tile,
    *,
    pairs: int,
    steps: int,
    head_dim: int,
    groups: int = 1,
    launches: float = 1,
) -> float:
    """Microseconds of a call on an H200, by a model; nothing here was measured.

        waves * (0.98 * steps + 4.2) + 1.5 * launches

    with `pairs` of row and key-value head, `steps` a row and `launches` beside the
    kernel. A wave is what the multiprocessors hold at once, its steps are those of one
    multiprocessor, one after the other, as they share its part of the bandwidth. 0.98
    (a step of 64 tokens at D = 128) and 4.2 (a block's start and end) were fitted to
    times of this kernel's earlier form, one block a multiprocessor; 1.5 is assumed.

    >>> alone = Tile(stages=6, splits=33)  # one block a multiprocessor
    >>> round(predicted_us(alone, pairs=8, steps=512, head_dim=128, launches=7))
    50
    """
    blocks = -(-pairs * tile.splits // PROCESSORS)  # of one multiprocessor, in turn
    waves = -(-blocks // tile.resident(head_dim, groups))
    step = 0.98 * tile.keys * head_dim / (64 * 128)
    return blocks * -(-steps // tile.splits) * step + 4.2 * waves + 1.5 * launches


def key(batch: int, head_dim: int, tokens: int, windows: int, window: int) -> dict:
    """What a measured tile is filed under: sizes up to the next power of two."""
    return {
        "batch": _tuned.bucket(batch),
        "head_dim": head_dim,
        "tokens": _tuned.bucket(tokens),
        "window": window if windows else 0,
    }


def kernel_name(
    head_dim: int, window: int, groups: int = 1, lanes: bool = False
) -> str:
    """What profilers call the kernel; window 0 where the table is empty."""
    columns = f"_n{columns_of(groups)}" if groups > ALIGNMENT else ""
    return f"windowed_attention_d{head_dim}_w{window}{columns}{'_lanes' * lanes}"


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
            groups=groups,
        )
    tile.check(dim, groups)
    stages, splits, dtype = tile.stages, tile.splits, q.dtype
    columns = columns_of(groups)
    # A copy lies within one window and fills a divisor of a step.
    chunk = math.gcd(window, tile.keys) if windows else tile.keys
    copies = tile.keys // chunk
    # The second product has one row a column of v, 64 at a time: where D is no multiple
    # of it two products overlap, and both give the same numbers.
    heights = [(0, dim)] if dim % HEIGHT == 0 else [(0, HEIGHT), (dim - HEIGHT, HEIGHT)]
    pieces = [_mgpu.ds(*piece) for piece in heights]
    part = tile.swizzle // 2  # columns that lie together in shared memory

    def body(*refs):
        q_ref, keys_ref, values_ref, layer_ref, starts_ref, *lengths_refs = refs[:8]
        o_ref, lse_ref = refs[8:10]
        q_s, k_s, v_s, p_s, o_s, q_full, k_full, v_full, free = refs[10:]
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
            scores = product(k_s.at[stage], q_s.transpose((1, 0)))
            token = iota((tile.keys, columns), 0)
            seen = (token >= low) & (token < high)
            scores = jnp.where(seen, scores * (scale * LOG2E), MASKED)
            new = jnp.maximum(top, scores.max(axis=0))
            shrink = jnp.exp2(top - new)
            weights = jnp.exp2(scores - along(new, tile.keys))
            total = total * along(shrink, tile.keys) + weights
            p_s.transpose((1, 0))[...] = turned(weights.astype(dtype))

            _mgpu.barrier_wait(v_full.at[stage])

            @_mgpu.when((low > 0) | (high < tile.keys))
            def _():
                for at in range(0, dim, part):
                    v = _mgpu.load(v_s.at[stage, :, _mgpu.ds(at, part)], layout=layout)
                    token = iota((tile.keys, part), 0)
                    kept = (token >= low) & (token < high)
                    v = jnp.where(kept, v, jnp.zeros((), dtype))
                    v_s[stage, :, _mgpu.ds(at, part)] = v

            _mgpu.commit_smem()
            p = p_s.transpose((1, 0))
            out = [
                mine * along(shrink, mine.shape[0])
                + product(v_s.at[stage, :, piece].transpose((1, 0)), p)
                for mine, piece in zip(out, pieces, strict=True)
            ]
            _mgpu.barrier_arrive(free.at[stage])
            return out, new, total

        @_mgpu.when(lax.axis_index("warpgroup") == 0)
        def _():
            _mgpu.copy_gmem_to_smem(q_ref.at[row, head], q_s, q_full)
            _mgpu.barrier_wait(q_full)
            out = [constant(0, (height, columns), layout) for _, height in heights]
            top = constant(MASKED, (columns,), layout.reduce(0))
            total = constant(0, (tile.keys, columns), layout)
            out, top, total = lax.fori_loop(0, count, consume, (out, top, total))
            total = total.sum(axis=0)
            some = total > 0  # not so in a split without a step
            share = jnp.where(some, 1 / total, 0)
            lse = jnp.where(some, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
            outs = [mine * along(share, mine.shape[0]) for mine in out]
            lses = [along(lse, mine.shape[0]) for mine in out]
            for found, whole in ((outs, o_ref), (lses, lse_ref)):
                for mine, piece in zip(found, pieces, strict=True):
                    o_s.at[:, piece].transpose((1, 0))[...] = turned(mine)
                _mgpu.commit_smem()
                _mgpu.copy_smem_to_gmem(o_s, whole.at[split, row, head])
                _mgpu.wait_smem_to_gmem(0)

    layout = _mgpu.Layout.WGMMA
    iota = functools.partial(_mgpu.broadcasted_iota, jnp.int32, layout=layout)

    def constant(value, shape, layout):
        return _mgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def along(vector, height):
        wide = lax.broadcast_in_dim(vector, (height, columns), [1])
        return _mgpu.layout_cast(wide, layout)

    def turned(x):
        return _mgpu.layout_cast(x, _mgpu.Layout.WGMMA_TRANSPOSED)

    def product(a, b):
        def run(accumulator):
            _mgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        return _mgpu.run_scoped(run, _mgpu.ACC((a.shape[0], columns), jnp.float32))

    found = jax.ShapeDtypeStruct((splits, batch, kv_heads, columns, dim), jnp.float32)
    call = _mgpu.kernel(
        body,
        kernel_name=kernel_name(dim, window if windows else 0, groups, lanes),
        grid=(batch, kv_heads, splits),
        grid_names=("row", "head", "split"),
        num_threads=2,
        thread_name="warpgroup",
        out_type=(found, found),
        scratch_types=(
            _mgpu.swizzled((columns, dim), dtype, tile.swizzle),
            _mgpu.swizzled((stages, tile.keys, dim), dtype, tile.swizzle),
            _mgpu.swizzled((stages, tile.keys, dim), dtype, tile.swizzle),
            _mgpu.swizzled((columns, tile.keys), dtype, tile.swizzle),
            _mgpu.swizzled((columns, dim), jnp.float32, min(2 * tile.swizzle, 128)),
            _mgpu.Barrier(),
            _mgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            _mgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            _mgpu.Barrier(num_barriers=stages),
        ),
        lanes=lanes,
        interpret=interpret,
    )
    padding = ((0, 0), (0, 0), (0, columns - groups), (0, 0))
    results = call(
        jnp.pad(q.reshape(batch, kv_heads, groups, dim), padding),
        keys,
        values,
        jnp.asarray(layer, jnp.int32).reshape(1),
        starts if windows else jnp.zeros((1, 1, 1), jnp.int32),  # no empty operand
        *lengths,
    )
    out, lse = reference.merge(
        *(x[..., :groups, :].reshape(splits, batch, heads, dim) for x in results)
    )
    return out, lse[..., 0]
