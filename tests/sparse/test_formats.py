"""Formats of sparse matrices: the official packers bit for bit, and nothing is lost."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.typing import DTypeLike

from jmem.kernels.spmm import decode
from jmem.nn import pruned
from jmem.nn.pruned import FORMATS, frag_bitmap, tca_bme, tiled_csl
from jmem.sparse.flash_llm import find_bytes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"FragBitmap": ("float32", BFLOAT16, "float16")}
"""That a format holds, where it is not 16 bits alone."""


def load(name):
    with np.load(GOLDEN / f"flash-llm__{name}.npz") as file:
        return dict(file)


def draw(shape, density, dtype: DTypeLike = np.float16, seed=0):
    random = np.random.default_rng(seed)
    kept = random.random(shape) < density
    return np.where(kept, random.standard_normal(shape), 0).astype(dtype)


def bits_of(values):
    """What is equal if every bit is, but for the sign of zeros."""
    bits = values.view(f"u{values.itemsize}")
    return np.where(values == 0, bits.dtype.type(0), bits)


@pytest.mark.parametrize("name", ["tiled_csl_1tile", "tiled_csl_multitile"])
def test_tiled_csl_is_the_official_packers_bit_for_bit(name):
    """One tile; and four of 1,641, 246, 4,096 and 2 non-zeros."""
    golden = load(name)
    w = golden["w"].astype(np.float16)
    for reorder, more, entries in ((True, "", "reordered"), (False, "_plain", "plain")):
        found = tiled_csl.pack(w, reorder=reorder)
        np.testing.assert_array_equal(found.entries, golden[f"nz_{entries}"])
        np.testing.assert_array_equal(found.offsets, golden[f"tile_offsets{more}"])
        np.testing.assert_array_equal(tiled_csl.unpack(found), w)
    images = golden["smem_image"]
    tile = np.repeat(np.arange(len(images)), np.diff(found.offsets[:-1]) * 4)
    image = np.zeros_like(images)
    place, value = found.entries >> 16, (found.entries & 0xFFFF).astype(np.uint16)
    image[tile, place] = value.view(np.float16)
    np.testing.assert_array_equal(image, images)
    y = w.astype(np.float32) @ golden["x"]
    np.testing.assert_allclose(y, golden["y"], rtol=1e-5, atol=1e-4)


def test_tca_bme_is_the_official_packer_s_bit_for_bit():
    """Six groups, the first of a single value."""
    golden = load("tcabme")
    w = golden["w"].astype(np.float16)
    found = tca_bme.pack(w)
    np.testing.assert_array_equal(found.values.astype(np.float32), golden["values"])
    words = np.stack([golden["bitmap_lo"], golden["bitmap_hi"]], -1)
    np.testing.assert_array_equal(found.bitmaps, words)
    ones = np.bitwise_count(found.bitmaps).sum(-1)
    np.testing.assert_array_equal(ones, golden["block_nnz"])
    for name in ("group_offsets", "median_offsets"):
        np.testing.assert_array_equal(getattr(found, name), golden[name])
    np.testing.assert_array_equal(tca_bme.unpack(found), w)


def pack_by_hand(tile):
    """The sheet's steps for one tile [128, 64], entry by entry."""
    banks, zeros = [[] for _ in range(32)], {}
    for r, row in enumerate(tile):
        for c, value in enumerate(row):
            column = c ^ (r % 8 * 8)
            place, bank = r * 64 + column, column // 2
            if value != 0:
                bits = int(np.asarray(value).view(np.uint16))
                banks[bank].append(bits | place << 16)
            else:
                zeros.setdefault(bank, place)
    for _ in range(-sum(map(len, banks)) % 4):
        bank = min(range(32), key=lambda b: len(banks[b]))
        banks[bank].append(zeros[bank] << 16)
    rounds, tail = divmod(sum(map(len, banks)) // 4, 32)
    lists = [[] for _ in range(32)], [[] for _ in range(32)]
    for which, count in [(0, tail)] * 4 + [(1, 32)] * (4 * rounds):
        for lane in range(count):
            bank = max(range(32), key=lambda b: len(banks[b]))
            lists[which][lane].append(banks[bank].pop())
    out = np.zeros((rounds * 32 + tail) * 4, np.uint32)
    for r in range(rounds):
        for v in range(4):
            for lane in range(32):
                out[r * 128 + lane * 4 + v] = lists[1][lane].pop()
    for v in range(4):
        for lane in range(tail):
            out[rounds * 128 + lane * 4 + v] = lists[0][lane].pop()
    return out


@pytest.mark.parametrize("density", [0.0, 0.0001, 0.003, 0.3, 0.7, 0.9996, 1.0])
def test_the_order_is_the_official_one_at_any_density(density):
    """Fewer than 128 entries, more than the official kernel holds, and a dense tile."""
    w = draw((128, 128), density, seed=int(1000 * density))
    w[3, 64:] = [np.nan, np.inf, -0.0, -np.inf] * 16
    w[:, :2] = 1  # a bank with no zero to pad with
    found = tiled_csl.pack(w)
    tiles = np.split(w, 2, axis=1)
    by_hand = [pack_by_hand(tile) for tile in tiles]
    np.testing.assert_array_equal(found.entries, np.concatenate(by_hand))
    ends = np.cumsum([0, *(len(entries) // 4 for entries in by_hand)])
    np.testing.assert_array_equal(found.offsets, [*ends, ends[-1]])


def test_plain_padding_is_the_first_zeros_with_their_sign():
    w = np.zeros((128, 64), np.float16)
    w[0, :4] = [-0.0, 5, 0.0, -0.0]
    found = tiled_csl.pack(w, reorder=False)
    places, values = found.entries >> 16, found.entries & 0xFFFF
    np.testing.assert_array_equal(places, [0, 1, 2, 3])
    five = int(np.float16(5).view(np.uint16))
    np.testing.assert_array_equal(values, [0x8000, five, 0, 0x8000])
    assert not np.signbit(tiled_csl.unpack(found)).any()  # -0.0 is a zero


KINDS = [(kind, d) for kind in FORMATS for d in DTYPES.get(kind, (BFLOAT16, "float16"))]


@st.composite
def matrices(draw_from, dtype):
    """Of any shape and density, with rows, columns and tiles that are full or empty."""
    shape = draw_from(st.tuples(st.integers(1, 200), st.integers(1, 200)))
    density = draw_from(st.sampled_from([0, 0.01, 0.5, 1]) | st.floats(0, 1))
    w = draw(shape, density, dtype, draw_from(st.integers(0, 99)))
    for value in draw_from(st.lists(st.sampled_from([0.0, 1.0]), max_size=3)):
        rows, columns = (
            slice(start := draw_from(st.integers(0, n - 1)), start + length)
            for n, length in zip(shape, draw_from(st.sampled_from(SPANS)), strict=True)
        )
        w[rows, columns] = value
    w.flat[draw_from(st.integers(0, w.size - 1))] = draw_from(st.sampled_from(ODD))
    return w


SPANS = [(1, 200), (200, 1), (64, 64), (128, 64), (1, 1)]
ODD = [1.0, -0.0, np.nan, np.inf, -np.inf, 6e-8, -1e-40]


@pytest.mark.parametrize("kind, dtype", KINDS, ids=str)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_is_packed_comes_back_bit_for_bit(kind, dtype, data):
    w = data.draw(matrices(np.dtype(dtype)))
    own = FORMATS[kind]
    found = own.pack(w)
    own.check(found)
    np.testing.assert_array_equal(bits_of(own.unpack(found)), bits_of(w))
    again = own.pack(own.unpack(found))
    jax.tree.map(
        np.testing.assert_array_equal, bits_of_tree(found), bits_of_tree(again)
    )


def bits_of_tree(matrix):
    return jax.tree.map(lambda x: x.view(f"u{x.itemsize}"), matrix)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("density", [0.0, 0.4])
def test_jax_decodes_what_numpy_does(kind, density):
    w = draw((130, 200), density, BFLOAT16)
    if density:
        w[5] = 0
        w[64:, :64] = 1
    found = jax.jit(pruned.decode)(FORMATS[kind].pack(w))
    np.testing.assert_array_equal(found, w)


def test_frag_bitmap_is_decoded_as_its_sheet_says():
    """Thread q of a row reads a run of its values, two counts of bits away."""
    w = draw((128, 64), 0.4, BFLOAT16)
    found = frag_bitmap.pack(w)
    for row in (0, 63, 64, 127):
        tile, r = divmod(row, 64)
        low, high = (int(found.masks[tile, r + 64 * half]) for half in range(2))
        mask = low | high << 32
        values = found.values.reshape(-1)[found.starts[tile] * 64 :]
        for q in range(4):
            own = mask >> 16 * q & 0xFFFF
            i = found.prefixes[tile, r] + (mask & 2 ** (16 * q) - 1).bit_count()
            for t in range(16):
                value = 0
                if own >> t & 1:
                    value, i = values[i], i + 1
                assert value == w[row, 8 * (t // 2) + 2 * q + t % 2]


class TestIntegers:
    @pytest.mark.parametrize("kind, most", [("int8", 127), ("int4", 7)])
    def test_each_row_has_the_scale_of_its_largest(self, kind, most):
        """Half to even, and what rounds to zero stays a stored zero."""
        w = np.zeros((70, 70), np.float32)
        w[0, :5] = most, 2.5, 3.5, -2.5, 0.2
        w[1, 3] = -most / 4
        w[69, 69] = 1e-30
        found = frag_bitmap.pack(w, kind)
        frag_bitmap.check(found)
        largest = np.abs(w).max(axis=1)
        np.testing.assert_array_equal(found.scales, largest / np.float32(most))
        back = frag_bitmap.unpack(found)
        np.testing.assert_array_equal(back[0, :5], [most, 2, 4, -2, 0])
        assert back[1, 3] == -most / 4
        assert frag_bitmap.count_nonzero(found).sum() == np.count_nonzero(w)
        np.testing.assert_array_equal(decode(found), back)

    @pytest.mark.parametrize("kind", ["int8", "int4"])
    def test_a_value_is_half_a_step_away_at_most(self, kind):
        w = draw((100, 150), 0.5, BFLOAT16).astype(np.float32)
        found = frag_bitmap.pack(w.astype(BFLOAT16), kind)
        # Of a quotient and a product, each within half a unit in the last place.
        most = found.scales[:, None] * (0.5 + 127 * 2**-23)
        assert (np.abs(frag_bitmap.unpack(found) - w) <= most).all()

    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_what_is_not_finite_is_refused(self, value):
        w = np.ones((5, 5), np.float32)
        w[3, 2] = value
        with pytest.raises(ValueError, match=r"row 3 of w holds .* not finite"):
            frag_bitmap.pack(w, "int4")
        with pytest.raises(
            ValueError, match=r"values='int3'; need int8, int4, or None"
        ):
            frag_bitmap.pack(w, "int3")


@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    densities=st.lists(st.floats(0, 1), min_size=1, max_size=3),
)
@settings(max_examples=20, deadline=None)
def test_bytes_are_those_of_the_formulas(shape, densities):
    """The sheet's section 4: 2 a value or 4 an entry, a bit and a fourth a value ..."""
    layers = [draw(shape, d, seed=i) for i, d in enumerate(densities)]
    packed = [frag_bitmap.pack(w) for w in layers]
    counts = np.stack([frag_bitmap.count_nonzero(one) for one in packed])
    tiles = counts[0].size
    (one, *_), rows = packed, -(-counts[0] // 64)
    nonzero, padding = counts[0].sum(), (rows * 64 - counts[0]).sum()
    places = tiles * 4096
    expected = 2 * (nonzero + padding + 64 * one.cap)
    expected += places // 8 + places // 32 + 4 * (tiles + 1)
    assert pruned.count_bytes(one) == expected
    csl = tiled_csl.pack(layers[0])
    assert pruned.count_bytes(csl) == 4 * csl.entries.size + 4 * csl.offsets.size
    assert nonzero <= csl.entries.size <= nonzero + 3 * (csl.offsets.size - 2)
    for kind, own in FORMATS.items():
        stacked = pruned.stack([own.pack(w) for w in layers])
        assert find_bytes(kind, counts, shape, 16) == pruned.count_bytes(stacked)
        for layer, w in enumerate(layers):
            found = pruned.take_layer(stacked, layer)
            own.check(found)
            np.testing.assert_array_equal(own.unpack(found), w)
    for kind, bits in (("int8", 8), ("int4", 4)):
        stacked = pruned.stack([frag_bitmap.pack(w, kind) for w in layers])
        found = find_bytes("FragBitmap", counts, shape, bits)
        assert found == pruned.count_bytes(stacked)


@pytest.mark.parametrize("kind", FORMATS)
def test_columns_may_be_exchanged_with_those_of_x(kind):
    """Small integers, whose sums are exact in any order."""
    random = np.random.default_rng(0)
    w = np.rint(3 * draw((70, 90), 0.4)).astype(np.float16)
    x = random.integers(-4, 5, (3, 90)).astype(np.float16)
    order = random.permutation(90)
    packed = [FORMATS[kind].pack(one) for one in (w, w[:, order])]
    stacked = jax.tree.map(jnp.asarray, pruned.stack(packed))
    multiply = jax.jit(functools.partial(pruned.multiply, "q"))
    for layer, columns in enumerate((np.arange(90), order)):
        found = multiply(x[:, columns], pruned.take_layer(stacked, layer))
        np.testing.assert_array_equal(found, x @ w.T)


class TestRefusals:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_what_is_no_matrix_of_floats(self, kind):
        pack = FORMATS[kind].pack
        with pytest.raises(ValueError, match=r"w has shape \(3,\); need a matrix"):
            pack(np.ones(3, np.float16))
        with pytest.raises(ValueError, match=r"w has shape \(0, 4\)"):
            pack(np.ones((0, 4), np.float16))
        with pytest.raises(TypeError, match=r"w is int32; need bfloat16, float16"):
            pack(np.ones((3, 3), np.int32))

    @pytest.mark.parametrize(
        "kind, array, at, value, message",
        [
            ("FragBitmap", "starts", 1, 0, "starts"),
            ("FragBitmap", "starts", -1, 10**6, "starts give it"),
            ("FragBitmap", "masks", (0, 5), 0, "prefixes are not"),
            ("FragBitmap", "prefixes", (3, 9), 4000, "prefixes are not"),
            ("FragBitmap", "masks", (3, 127), 2**31, "beyond the matrix's edge"),
            ("TiledCSL", "offsets", 1, -1, "offsets do not"),
            ("TiledCSL", "offsets", 1, 10**8, "offsets do not"),
            ("TiledCSL", "offsets", -1, 0, "offsets do not"),
            ("TiledCSL", "entries", 7, 8192 << 16, "beyond the 8192 of a tile"),
            ("TiledCSL", "entries", slice(0, 2), 0x10001, "a place of a tile twice"),
            ("TcaBme", "bitmaps", (0, 0), 0, "group_offsets do not|median"),
            ("TcaBme", "group_offsets", 1, 8, "group_offsets do not"),
            ("TcaBme", "median_offsets", 1, -5, "median_offsets do not"),
        ],
    )
    def test_arrays_that_no_packer_makes(self, kind, array, at, value, message):
        own = FORMATS[kind]
        found = own.pack(draw((100, 100), 0.3))
        changed = np.array(getattr(found, array))
        changed[at] = value
        broken = object.__new__(own.make)
        for field in dataclasses.fields(found):
            given = changed if field.name == array else getattr(found, field.name)
            object.__setattr__(broken, field.name, given)
        with pytest.raises(ValueError, match=message):
            own.check(broken)

    @pytest.mark.parametrize("kind", FORMATS)
    def test_values_that_are_cut_off(self, kind):
        own = FORMATS[kind]
        found = own.pack(draw((100, 100), 0.3))
        longest = own.arrays[0]
        broken = object.__new__(own.make)
        for field in dataclasses.fields(found):
            value = getattr(found, field.name)
            value = value[:-32] if field.name == longest else value
            object.__setattr__(broken, field.name, value)
        with pytest.raises(ValueError, match=r"end at"):
            own.check(broken)
