"""Moments in 16 or 8 bits, rounded so that small changes are not lost.

Idea     The second moment changes by a thousandth a step, which is below what 16 or 8
         bits resolve: rounded to the nearest it stands still. Rounded up or down at
         random, with the chances that make the mean exact, it follows.
Memory   8 bits: a byte a value, and a float32 scale for every `BLOCK` values of a row.
Format   float8 (e4m3: 4 bits of exponent, 3 of mantissa) of the value over its block's
         largest. Second moments are stored as their roots, so that they span twice the
         range. 8-bit optimizers are Dettmers et al., 2022, arXiv:2110.02861; there the
         values are a table's, and rounded to the nearest.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

BLOCK = 256
_FLOAT8 = jnp.float8_e4m3fn
_LARGEST = 448.0
"""Of float8_e4m3fn."""


def draw_noise(shape: tuple[int, ...], salt: jax.Array) -> UInt32[Array, "..."]:
    """A number for each place: murmur3's finaliser of the place and `salt` (uint32)."""
    size = math.prod(shape)
    place = jax.lax.iota(jnp.uint32, size).reshape(shape)
    return _mix(place ^ _mix(salt.astype(jnp.uint32)))


def _mix(x):
    x ^= x >> 16
    x *= jnp.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def round_randomly(
    x: Float[Array, "..."], bits: UInt32[Array, "..."], mantissa: int
) -> Float[Array, "..."]:
    """`x`, float32, up or down to a value of `mantissa` bits; its mean is `x`."""
    low = jnp.uint32((1 << (23 - mantissa)) - 1)
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type((raw + (bits & low)) & ~low, jnp.float32)


def pack(
    x: Float[Array, "*N M"], salt: jax.Array
) -> tuple[Float[Array, "*N M"], Float[Array, "*N S"]]:
    """`x` as float8 and the scales of its blocks."""
    blocks = _cut_blocks(x)
    largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
    small = round_randomly(blocks / scale, draw_noise(blocks.shape, salt), mantissa=3)
    small = jnp.clip(small, -_LARGEST, _LARGEST).astype(_FLOAT8)
    return small.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], scale[..., 0]


def unpack(
    small: Float[Array, "*N M"], scale: Float[Array, "*N S"]
) -> Float[Array, "*N M"]:
    """What `pack` packed, float32."""
    blocks = _cut_blocks(small.astype(jnp.float32)) * scale[..., None]
    return blocks.reshape(*small.shape[:-1], -1)[..., : small.shape[-1]]


def _cut_blocks(x):
    """[..., M] as [..., ceil(M / BLOCK), BLOCK]; one short block if M is less."""
    size = min(BLOCK, x.shape[-1])
    short = -x.shape[-1] % size
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, short),))
    return x.reshape(*x.shape[:-1], -1, size)
