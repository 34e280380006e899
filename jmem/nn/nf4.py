"""NF4: four bits a value, levels where normally distributed weights lie.

Paper    Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023,
         arXiv:2305.14314, section 3.
Idea     A block of 64 values is divided by its largest magnitude, and each value
         becomes the nearest of 16 levels: quantiles of a normal distribution, equally
         probable, zero and both ends among them.
Memory   Bytes a value: NF4 36/64, a float32 scale a block. NF4_DOUBLE 33/64 and 8 a
         row: a block's scale is a byte between the least and the greatest of its row.
Values   Of normal data the error is 0.092 standard deviations in root mean square,
         0.073 in the mean.
Differs  The paper quantises the scales of 256 blocks in turn, wherever rows end, to an
         8-bit float about their mean; here those of a row, to equal steps. Codes are
         those nearest under the scale that is stored, not under the exact one.
See      jmem/nn/quantised.py (where rows are used), tests/nn/test_nf4.py

A row of `in` values, in bytes: in/2 of codes, in a block the low halves first; then the
scale of each block, little-endian; NF4_DOUBLE ends in the least scale and the step.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

BLOCK = 64
"""Values that share a scale."""

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
"""The published table (bitsandbytes; appendix E of the paper), exact float32 values."""

_TABLE = np.array(LEVELS, np.float32)
_BETWEEN = (_TABLE[1:] + _TABLE[:-1]) / 2


def encode(values: Float[Array, "*N in"]) -> UInt8[Array, "*N bytes"]:
    """Packs values into rows of NF4; `in` is a multiple of `BLOCK`."""
    blocks = _cut_blocks(values)
    scale = jnp.max(jnp.abs(blocks), axis=-1)
    return _join_bytes(
        _choose_codes(blocks, scale), jax.lax.bitcast_convert_type(scale, jnp.uint8)
    )


def decode(rows: UInt8[Array, "*N bytes"]) -> Float[Array, "*N in"]:
    """The float32 values of rows of NF4."""
    codes, scales = _split_rows(rows, rows.shape[-1] // 36, 4)
    return _look_up_values(codes, jax.lax.bitcast_convert_type(scales, jnp.float32))


def encode_double(values: Float[Array, "*N in"]) -> UInt8[Array, "*N bytes"]:
    """Packs values into rows of NF4_DOUBLE; `in` is a multiple of `BLOCK`."""
    blocks = _cut_blocks(values)
    exact = jnp.max(jnp.abs(blocks), axis=-1)
    least = jnp.min(exact, axis=-1, keepdims=True)
    step = (jnp.max(exact, axis=-1, keepdims=True) - least) / 255
    level = jnp.round((exact - least) / jnp.where(step > 0, step, 1))
    level = jnp.clip(level, 0, 255).astype(jnp.uint8)
    ends = jnp.concatenate([least, step], axis=-1)
    return _join_bytes(
        _choose_codes(blocks, _read_scale(level, ends)),
        level[..., None],
        jax.lax.bitcast_convert_type(ends, jnp.uint8),
    )


def decode_double(rows: UInt8[Array, "*N bytes"]) -> Float[Array, "*N in"]:
    """The float32 values of rows of NF4_DOUBLE."""
    blocks = (rows.shape[-1] - 8) // 33
    codes, level = _split_rows(rows[..., :-8], blocks, 1)
    ends = rows[..., -8:].reshape(*rows.shape[:-1], 2, 4)
    ends = jax.lax.bitcast_convert_type(ends, jnp.float32)
    return _look_up_values(codes, _read_scale(level[..., 0], ends))


def _read_scale(level: jax.Array, ends: jax.Array) -> jax.Array:
    return ends[..., :1] + ends[..., 1:] * level.astype(jnp.float32)


def _cut_blocks(values: jax.Array) -> jax.Array:
    return values.astype(jnp.float32).reshape(*values.shape[:-1], -1, BLOCK)


def _choose_codes(blocks: jax.Array, scale: jax.Array) -> jax.Array:
    """Numbers of the nearest levels, two a byte: [..., blocks, 32].

    A block of zeros has the level that is zero.
    """
    unit = blocks / jnp.where(scale > 0, scale, 1)[..., None]
    # Fifteen comparisons that fuse: nothing is made that is 16 times as large.
    code = jnp.zeros(unit.shape, jnp.uint8)
    for middle in _BETWEEN:
        code += (unit > middle).astype(jnp.uint8)
    return code[..., : BLOCK // 2] | (code[..., BLOCK // 2 :] << 4)


def _join_bytes(codes: jax.Array, scales: jax.Array, *tail: jax.Array) -> jax.Array:
    parts = [part.reshape(*part.shape[:-2], -1) for part in (codes, scales, *tail)]
    return jnp.concatenate(parts, axis=-1)


def _split_rows(
    rows: jax.Array, blocks: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Codes [..., blocks, 32] and scales [..., blocks, width] of whole rows."""
    end = blocks * BLOCK // 2
    codes, scales = rows[..., :end], rows[..., end:]
    lead = (*rows.shape[:-1], blocks)
    return codes.reshape(*lead, BLOCK // 2), scales.reshape(*lead, width)


def _look_up_values(codes: jax.Array, scale: jax.Array) -> jax.Array:
    shifts = np.array([[0], [4]], np.uint8)
    shifts = shifts.reshape((1,) * (codes.ndim - 1) + (2, 1))
    code = (codes[..., None, :] >> shifts) & np.uint8(15)
    level = jnp.asarray(_TABLE).at[code.astype(jnp.int32)].get(mode="promise_in_bounds")
    values = level * scale[..., None, None]
    return values.reshape(*codes.shape[:-2], -1)
