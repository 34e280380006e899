"""Decode attention over windows of a cache and a contiguous tail of the same cache.

    from jmem.kernels.windowed_attention import choose, windowed_attention

    implementation = choose(target, "bfloat16", head_dim=128, window=32)
    out = windowed_attention(
        q, cache.keys, cache.values, starts, length, tail_start, tail_length,
        window=32, max_tail=1024, implementation=implementation,
    )

One buffer may hold all layers of a cache: the windows and the tail of a layer are named
by slots, which are data, so that nothing is sliced out of the buffer to call it. With
an empty table it is plain split-KV decoding over a contiguous cache.

See      reference.py (the definition), mosaic_gpu.py (the kernel, for Hopper),
         tests/kernels/test_windowed_attention.py
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jmem.targets import Target

Implementation = Literal["mosaic_gpu", "xla"]

Table = Array | np.ndarray
"""Of jaxtyping: the table and the lengths may be NumPy's."""

ALIGNMENT = 8
"""Slots: windows begin at multiples of it, and `window` and S are multiples of it.

Eight rows are the least that Hopper's copies place in shared memory as its tensor cores
read it.
"""
MAX_GROUPS = 64
"""Query heads to a key-value head, at most: columns of one tensor-core product, each of
which takes registers."""


def windowed_attention(
    q: Float[Array, "B H D"],
    keys: Float[Array, "N K S D"],
    values: Float[Array, "N K S D"],
    starts: Int[Table, "*L B W"],
    length: Int[Table, "*L B"],
    tail_start: Int[Table, "*L B"],
    tail_length: Int[Table, "*L B"],
    *,
    window: int,
    max_tail: int,
    layer: Int[Array, ""] | int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
    tile: Any = None,
    interpret: bool = False,
) -> Float[Array, "B H D"] | tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    """softmax(scale q kᵀ) v of one query a row, over its windows and its tail.

    Args:
      q: one query a row; H / K consecutive heads share a key-value head.
      keys: N = B caches, or N = 1 that all rows share; S is a multiple of 8.
      values: as `keys`, of one dtype with `q` and `keys`.
      starts: int32, first slot of each window, multiples of 8; window i covers `window`
        slots from `starts[b, i]` on. W = 0 leaves the tail alone.
      length: int32, valid tokens of the windows, counted in table order: all windows
        are full but the last valid one. Entries beyond are not looked at.
      tail_start: int32, any slot.
      tail_length: int32, valid slots from `tail_start` on, at most `max_tail`.
      window: slots a window, a multiple of 8.
      max_tail: static bound of `tail_length`; it sets the grid.
      layer: if given, the table and the lengths have a leading axis of layers, and
        count by their row `layer`. The kernel reads that row itself: a loop over layers
        that share one cache then makes no table.
      scale: D**-0.5 if None.
      return_lse: also returns the log-sum-exp.
      implementation: who builds a program resolves it by `choose`; None is "xla".
        "mosaic_gpu" runs the kernel or raises.
      tile: a `mosaic_gpu.Tile`; None takes the tuned one, or a heuristic's.
      interpret: runs the kernel in Pallas's interpreter, on the CPU, with race
        detection. For tests.

    Returns:
      The output in q's dtype. With `return_lse` also the natural log of the softmax's
      denominator, float32, with which `reference.merge` joins the results of several
      caches. A row with nothing to see gives zeros and -inf.

    Scores, softmax and sums are float32, weights are rounded to the values' dtype. What
    lies in slots that are not valid, NaN too, changes nothing. Arguments known on the
    host are checked; others are clamped into range, a start down to a multiple of 8,
    and `out_of_range` tells the rows where that happened. There is no gradient. For
    several GPUs wrap it in `jax.shard_map` over rows or key-value heads, with
    `check_vma=False`.

    Raises:
      ValueError: shapes that do not fit, a table out of range (if known), or an
        implementation that cannot serve.
    """
    table = (starts, length, tail_start, tail_length)
    _check_layer(table, layer)
    _check_static(q, keys, values, starts, window, max_tail, implementation, interpret)
    slots = keys.shape[2]
    if not any(isinstance(x, Tracer) for x in table):
        check(*table, slots=slots, window=window, max_tail=max_tail)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sizes = {"window": window, "max_tail": max_tail, "scale": scale}
    chosen = implementation or "xla"
    with jax.named_scope(f"windowed_attention_{chosen}"):
        if chosen == "mosaic_gpu":
            from . import mosaic_gpu

            sizes |= {"tile": tile, "interpret": interpret, "layer": layer}
            table = (jnp.asarray(x, jnp.int32) for x in table)
            out, lse = mosaic_gpu.attend(q, keys, values, *table, **sizes)
        else:
            from . import reference

            if layer is not None:
                table = (jnp.asarray(x)[jnp.clip(layer, 0, len(x) - 1)] for x in table)
            table = _clamped(*table, slots=slots, window=window, max_tail=max_tail)
            out, lse = reference.attend(q, keys, values, *table, **sizes)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def choose(
    target: Target | None, dtype: DTypeLike, head_dim: int, window: int = ALIGNMENT
) -> Implementation:
    """The fastest implementation that `target` can run; None is the CPU.

    The kernel is made of Hopper's instructions: compute capability 9.0, no other.
    """
    hopper = target is not None and target.capability == (9, 0)
    served = unserved(dtype, head_dim, window=window) is None
    return "mosaic_gpu" if hopper and served else "xla"


def unserved(
    dtype: DTypeLike, head_dim: int, *, window: int = ALIGNMENT, groups: int = 1
) -> str | None:
    """What of a configuration the kernel cannot serve, with the rule; None if nothing.

    >>> unserved("bfloat16", 128, window=32, groups=4)
    >>> unserved("float32", 128)
    'dtype=float32 is not bfloat16 or float16'
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype("bfloat16"), jnp.dtype("float16")):
        return f"dtype={dtype} is not bfloat16 or float16"
    if head_dim % 16 or not 64 <= head_dim <= 128:
        return f"head_dim={head_dim} is not a multiple of 16 from 64 to 128"
    if window % ALIGNMENT or window < ALIGNMENT:
        return f"window={window} is not a positive multiple of {ALIGNMENT}"
    if not 1 <= groups <= MAX_GROUPS:
        return f"{groups} query heads to a key-value head are not 1 to {MAX_GROUPS}"
    return None


def check(
    starts: Int[Table, "*L B W"],
    length: Int[Table, "*L B"],
    tail_start: Int[Table, "*L B"],
    tail_length: Int[Table, "*L B"],
    *,
    slots: int,
    window: int,
    max_tail: int,
) -> None:
    """Refuses what `out_of_range` would flag, naming the row, the value and the rule.

    Raises:
      ValueError: as said. Waits for the arrays: it is for the host.
    """
    starts, length, tail_start, tail_length = map(
        np.asarray, (starts, length, tail_start, tail_length)
    )
    room = starts.shape[-1] * window
    valid = np.arange(starts.shape[-1]) * window < length[..., None]
    last = slots - window
    wrong = {
        f"length={{}}; need 0 to {room}, the slots of the table's windows": (
            length,
            (length < 0) | (length > room),
        ),
        f"starts={{}}; need a multiple of {ALIGNMENT} from 0 to {last}, as the cache "
        f"has {slots} slots and a window {window}": (
            starts,
            valid & ((starts < 0) | (starts > last) | (starts % ALIGNMENT != 0)),
        ),
        f"tail_length={{}}; need 0 to max_tail={max_tail}": (
            tail_length,
            (tail_length < 0) | (tail_length > max_tail),
        ),
        f"tail_start={{}}; need 0 to {slots} less tail_length, as the cache has "
        f"{slots} slots": (
            tail_start,
            (tail_start < 0) | (tail_start > slots - np.maximum(tail_length, 0)),
        ),
    }
    for rule, (found, bad) in wrong.items():
        if bad.any():
            at = tuple(map(int, np.argwhere(bad)[0]))
            words = rule.format(int(found[at]))
            raise ValueError(f"windowed_attention: at {list(at)}, {words}.")


def out_of_range(
    starts: Int[Table, "*L B W"],
    length: Int[Table, "*L B"],
    tail_start: Int[Table, "*L B"],
    tail_length: Int[Table, "*L B"],
    *,
    slots: int,
    window: int,
    max_tail: int,
) -> Bool[Array, "*L B"]:
    """Rows whose table, lengths or tail `windowed_attention` would clamp.

    Pure, for the device: return it beside the output, and look at it when convenient.
    """
    given = (starts, length, tail_start, tail_length)
    clamped = _clamped(*given, slots=slots, window=window, max_tail=max_tail)
    first = jnp.arange(starts.shape[-1], dtype=jnp.int32) * window
    valid = jnp.broadcast_to(first, starts.shape) < clamped[1][..., None]
    rows = jnp.any(valid & (clamped[0] != starts), axis=-1)
    for before, after in zip(given[1:], clamped[1:], strict=True):
        rows |= before != after
    return rows


def _clamped(starts, length, tail_start, tail_length, *, slots, window, max_tail):
    """The same, in range: no copy leaves the cache, and all starts are aligned."""
    starts, length, tail_start, tail_length = (
        jnp.asarray(x, jnp.int32) for x in (starts, length, tail_start, tail_length)
    )
    starts = jnp.clip(starts, 0, slots - window) // ALIGNMENT * ALIGNMENT
    length = jnp.clip(length, 0, starts.shape[-1] * window)
    tail_start = jnp.clip(tail_start, 0, slots)
    tail_length = jnp.clip(tail_length, 0, jnp.minimum(max_tail, slots - tail_start))
    return starts, length, tail_start, tail_length


def _check_layer(table, layer) -> None:
    """Refuses a table whose axes are not those that `layer` asks for."""
    axes = tuple(np.ndim(x) for x in table)
    layers = {np.shape(x)[0] for x in table} if layer is not None else set()
    wrong = None
    if axes != ((2, 1, 1, 1) if layer is None else (3, 2, 2, 2)):
        wrong = (
            f"layer={layer} with a table and lengths of {axes} axes; need (2, 1, 1, 1) "
            "with layer=None, else (3, 2, 2, 2), layers first"
        )
    elif len(layers) > 1:
        wrong = f"the table and the lengths have {sorted(layers)} layers; need as many"
    elif not isinstance(layer, Tracer | None) and not 0 <= layer < min(layers):
        wrong = f"layer={layer}; need 0 to {min(layers) - 1}, the table's layers"
    if wrong:
        raise ValueError(f"windowed_attention: {wrong}.")


def _check_static(
    q, keys, values, starts, window, max_tail, implementation, interpret
) -> None:
    batch, heads, dim = q.shape
    pools, kv_heads, slots, _ = keys.shape
    wrong = None
    if not q.dtype == keys.dtype == values.dtype:
        wrong = f"dtypes {q.dtype}, {keys.dtype}, {values.dtype} differ; cast to one"
    elif keys.shape != values.shape or keys.shape[-1] != dim:
        wrong = (
            f"keys {keys.shape} and values {values.shape} must have one shape, and "
            f"end in q's head dim, {dim}"
        )
    elif pools not in (1, batch):
        wrong = f"keys hold {pools} caches for {batch} rows; need {batch}, or 1 for all"
    elif heads % kv_heads:
        wrong = f"{heads} query heads do not divide among {kv_heads} key-value heads"
    elif slots % ALIGNMENT:
        wrong = f"the cache has {slots} slots; round up to a multiple of {ALIGNMENT}"
    elif starts.shape[-1] and (window % ALIGNMENT or not 0 < window <= slots):
        wrong = (
            f"window={window}; need a multiple of {ALIGNMENT} up to the cache's "
            f"{slots} slots"
        )
    elif max_tail < 0:
        wrong = f"max_tail={max_tail}; need 0 or more"
    elif implementation not in ("mosaic_gpu", "xla", None):
        wrong = f"implementation={implementation!r}; need 'mosaic_gpu', 'xla' or None"
    elif interpret and implementation != "mosaic_gpu":
        wrong = (
            f"interpret=True with implementation={implementation!r}; only "
            "'mosaic_gpu' has a kernel to interpret"
        )
    if wrong:
        raise ValueError(f"windowed_attention: {wrong}.")
    if implementation == "mosaic_gpu":
        rule = unserved(
            q.dtype,
            dim,
            window=window if starts.shape[-1] else ALIGNMENT,
            groups=heads // kv_heads,
        )
        if rule:
            raise ValueError(
                f"windowed_attention: implementation='mosaic_gpu' cannot serve: {rule}."
                " Use implementation='xla', or resolve it by `choose`."
            )
