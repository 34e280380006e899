"""A tile in a tensor core's registers: PTX that decodes it there, and what that means.

A warpgroup multiplies A [64, 64] from registers. Lane l of its warp w holds rows
16 w + l div 4 and eight further, and of each the columns 8 j + 2 (l mod 4) and the next
one, j from 0 to 7: 16 bits of one mask word, whose numbers lie side by side. So a lane
needs to know where its first number lies, and then goes on by the number of bits.

    place   prefix of the row, and the bits of its mask before the lane's own 16: two
            words, one wholly or half before them
    counts  bits of each pair, four pairs to a word of bytes, of both rows at once; the
            dot product of four bytes then moves a place on in one instruction
    load    the first of a pair at its place, the second just before the next pair's;
            both predicated, the first into a zero

Integers of 8 bits become floats by their bits: 128 + b is 0x4300 | b in bfloat16, and
1024 + b is 0x6400 | b in float16. Of 4-bit integers all 16 that a lane can need fit in
three words, out of which they are shifted.
"""

import jax.numpy as jnp
from jax import lax

from jmem.kernels import _mgpu
from jmem.kernels.spmm.fragbitmap import SIDE

COUNTS = (
    "shr.u32 odd, m, 1; and.b32 t, odd, 0x55555555; sub.u32 n0, m, t;",
    "shr.u32 n1, n0, 2; shr.u32 n2, n0, 4; shr.u32 n3, n0, 6;",
    *(f"and.b32 n{i}, n{i}, 0x03030303;" for i in range(4)),
)
"""Of the bits m: how many a pair has, that of pair j in a byte of register j mod 4."""
ONES = {"bfloat16": 0x43004300, "float16": 0x64006400}
"""Twice the float, 128 or 1024, whose last bits count by one."""
PACKED = {"bfloat16": "bf16x2", "float16": "f16x2"}


def lane_constants():
    """What differs between the threads of a warpgroup, six int32 arrays [128].

    Offsets in bytes of a thread's own word of a tile's masks, of the row's other word
    and of its prefix; which bits of both words lie before its own 16; and how `prmt`
    takes those of two words.
    """
    thread = _mgpu.lane_numbers()
    row, quad = thread // 32 * 16 + thread % 32 // 4, thread % 4
    own = 4 * (row + quad // 2 * SIDE)
    half, high = quad % 2, quad // 2
    return (
        own,
        own + 4 * SIDE * (1 - 2 * high),
        2 * row,
        half * 0xFFFF,
        -high,
        0x5410 + half * 0x2222,
    )


def decode_by_ptx(values: str, dtype: str, tiles: int, slot_bytes: int):
    """A function of packed arrays in shared memory and `lane_constants()`.

    It gives `tiles` tiles side by side, [64, 64 tiles] of `dtype`, as `wgmma` takes its
    first operand. `values` are of `dtype`, or "int8" or "int4"; those of a tile begin
    `slot_bytes` after those of the tile before.
    """
    text = write_ptx(values, dtype, tiles, slot_bytes)

    def decode(refs, lanes):
        return _mgpu.assemble(text, tiles * SIDE, dtype, refs, lanes)

    return decode


def decode_by_jax(values: str, dtype: str):
    """The same of one tile in jax.numpy, for the interpreter."""

    def decode(values_ref, masks_ref, prefixes_ref):
        masks, prefixes = masks_ref[...], prefixes_ref[...]
        masks = lax.bitcast_convert_type(masks, jnp.uint32)
        column = lax.broadcasted_iota(jnp.uint32, (SIDE, SIDE), 1)
        bit = column % 8 // 2 * 16 + column // 8 * 2 + column % 2
        low, high = (
            lax.broadcast_in_dim(half, (SIDE, SIDE), (0,))
            for half in (masks[:SIDE], masks[SIDE:])
        )
        word = jnp.where(bit < 32, low, high)
        before = lax.population_count(word & ((jnp.uint32(1) << bit % 32) - 1))
        before += jnp.where(bit < 32, 0, lax.population_count(low))
        before = before.astype(jnp.int32) + prefixes.astype(jnp.int32)[:, None]
        numbers = values_ref[...].reshape(-1)
        if values == "int4":
            pair = jnp.take(numbers, before // 2, mode="clip").astype(jnp.int32)
            pair = pair >> (before % 2 * 4) & 15
            found = (pair ^ 8) - 8
        else:
            found = jnp.take(numbers, before, mode="clip")
        kept = (word >> bit % 32 & 1) != 0
        return jnp.where(kept, found.astype(dtype), jnp.zeros((), dtype))

    return decode


def write_ptx(values: str, dtype: str, tiles: int, slot_bytes: int) -> str:
    """PTX whose outputs are a thread's registers of `tiles` tiles, 16 of each.

    `$2j` holds pair j of its first row, `$2j+1` of the other. The inputs follow: the
    addresses of values, masks and prefixes, and `lane_constants()`.
    """
    inputs = [f"${16 * tiles + i}" for i in range(9)]
    at, masks, prefixes, own, other, before, half, whole, taken = inputs
    lines = [
        ".reg .b32 own, other, before, m, odd, t, u, n<4>, p<2>, w<4>, y<4>;",
        ".reg .pred q<8>;",
        f"add.u32 own, {masks}, {own}; add.u32 other, {masks}, {other};",
        f"add.u32 before, {prefixes}, {before};",
    ]
    for tile in range(tiles):
        word, prefix = 8 * SIDE * tile, 2 * SIDE * tile
        for row in (0, 1):
            lines += [
                f"ld.shared.u32 w{row}, [own+{word + 32 * row}];",
                f"ld.shared.u32 w{2 + row}, [other+{word + 32 * row}];",
                f"ld.shared.u16 p{row}, [before+{prefix + 16 * row}];",
                f"and.b32 t, w{row}, {half}; popc.b32 t, t;",
                f"and.b32 u, w{2 + row}, {whole}; popc.b32 u, u;",
                f"add.u32 p{row}, p{row}, t; add.u32 p{row}, p{row}, u;",
            ]
        lines.append(f"prmt.b32 m, w0, w1, {taken};")
        outs = [f"${16 * tile + i}" for i in range(16)]
        take = _take_nibbles if values == "int4" else _take_numbers
        lines += take(values, dtype, outs, at, slot_bytes * tile)
    return "{\n" + "\n".join(lines) + "\n}"


def _test(word: str, bit: int, predicate: int) -> str:
    return f"and.b32 t, {word}, {1 << bit:#x}; setp.ne.u32 q{predicate}, t, 0;"


def _take_numbers(
    values: str, dtype: str, outs: list[str], at: str, offset: int
) -> list[str]:
    """Numbers of one or two bytes.

    Four pairs of a row at a time: the assembler then tests bits of a byte together. The
    second numbers are joined to the first by predicates of their own, tested again, for
    there are few.
    """
    size, kind = (1, "u8") if values == "int8" else (2, "u16")
    lines = [
        *COUNTS,
        *(f"mad.lo.u32 p{row}, p{row}, {size}, {at};" for row in (0, 1)),
    ]
    for first, row in ((0, 0), (0, 1), (4, 0), (4, 1)):
        four = [outs[2 * (first + i) + row] for i in range(4)]
        bit, place = 16 * row + 2 * first, f"p{row}"
        weight = size << bit // 8 * 8
        lines += [_test("m", bit + i, i) for i in range(8)]
        if row == 0:  # of both rows together: they are neighbours in registers
            lines += [f"mov.b32 {out}, 0;" for out in outs[2 * first :][:8]]
        for i, out in enumerate(four):
            lines += [
                f"@q{2 * i} ld.shared.{kind} {out}, [{place}+{offset}];",
                f"dp4a.u32.u32 {place}, n{i}, {weight:#x}, {place};",
                f"@q{2 * i + 1} ld.shared.{kind} y{i}, [{place}+{offset - size}];",
            ]
        lines += [_test("odd", bit + 2 * i, i) for i in range(4)]
        lines += [
            f"@q{i} prmt.b32 {out}, {out}, y{i}, 0x5410;" for i, out in enumerate(four)
        ]
        if values == "int8":
            lines += [line for out in four for line in _as_floats(out, dtype)]
    return lines


def _take_nibbles(
    values: str, dtype: str, outs: list[str], at: str, offset: int
) -> list[str]:
    """Numbers of half a byte: of each row three words, whence 16 are shifted out.

    A number's sign bit is turned over, so that 8 stands for 0 and for none.
    """
    one = ONES[dtype]
    lines = [*COUNTS]
    for row in (0, 1):
        lines += [
            f"shl.b32 t, p{row}, 2; shr.u32 u, p{row}, 3; mad.lo.u32 u, u, 4, {at};",
            *(f"ld.shared.u32 w{i}, [u+{offset + 4 * i}];" for i in range(3)),
            "shf.r.wrap.b32 w0, w0, w1, t; shf.r.wrap.b32 w1, w1, w2, t;",
            f"and.b32 t, m, {0xFF << 16 * row:#x}; popc.b32 t, t; shl.b32 t, t, 2;",
            "shf.r.clamp.b32 w1, w0, w1, t;",
        ]
        for half in (0, 1):
            first, weight = 4 * half, 4 << 8 * (half + 2 * row)
            lines += [
                f"xor.b32 w{half}, w{half}, 0x88888888;",
                f"shf.r.wrap.b32 u, w{half}, w{half}, 12; mov.b32 w2, 0;",
                *(_test("m", 16 * row + 2 * first + i, i) for i in range(8)),
            ]
            for i in range(4):
                out = outs[2 * (first + i) + row]
                lines += [
                    f"mov.b32 {out}, 8; mov.b32 y{i}, 0x80000;",
                    f"@q{2 * i} shr.u32 {out}, w{half}, w2;",
                    f"dp4a.u32.u32 w2, n{i}, {weight:#x}, w2;",
                    f"@q{2 * i + 1} shf.r.wrap.b32 y{i}, u, u, w2;",
                ]
            for i in range(4):
                out = outs[2 * (first + i) + row]
                lines += [
                    f"prmt.b32 {out}, {out}, y{i}, 0x7610;",
                    f"lop3.b32 {out}, {out}, 0x000f000f, {one:#x}, 0xea;",
                    f"mov.b32 w3, {one + 0x00080008:#x};",
                    f"sub.rn.{PACKED[dtype]} {out}, {out}, w3;",
                ]
    return lines


def _as_floats(out: str, dtype: str) -> list[str]:
    """Two integers of 8 bits, one in each half of a register, as two floats."""
    kind, one = PACKED[dtype], ONES[dtype]
    if dtype == "bfloat16":  # 7 bits fit, and a sign worth 128
        return [
            f"and.b32 t, {out}, 0x007f007f; or.b32 t, t, {one:#x};",
            f"and.b32 u, {out}, 0x00800080; or.b32 u, u, 0xc300c300;",
            f"add.rn.{kind} {out}, t, u;",
        ]
    return [
        f"xor.b32 t, {out}, 0x00800080; or.b32 t, t, {one:#x};",
        f"mov.b32 u, {one + 0x00800080:#x}; sub.rn.{kind} {out}, t, u;",
    ]
