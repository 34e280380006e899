"""Windowed attention: its definition, the kernel interpreted, what it refuses."""

import dataclasses
import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.kernels.windowed_attention import (
    check,
    choose,
    out_of_range,
    windowed_attention,
)
from jmem.kernels.windowed_attention.mosaic_gpu import Tile
from jmem.kernels.windowed_attention.reference import merge
from jmem.targets import resolve


@dataclasses.dataclass(frozen=True)
class Case:
    """Random arguments; all that is not valid is NaN."""

    lengths: tuple[tuple[int, int, int], ...]
    """length, tail_start and tail_length of each row."""
    window: int = 24
    windows: int = 5
    max_tail: int = 80
    kv_heads: int = 2
    groups: int = 3
    head_dim: int = 64
    slots: int = 320
    dtype: str = "bfloat16"
    shared: bool = False
    """One cache for all rows; then nothing is poisoned."""
    seed: int = 0

    @functools.cached_property
    def arrays(self):
        """All arguments; windows are drawn where they don't meet the tail."""
        random = np.random.default_rng(self.seed)
        batch, dim = len(self.lengths), self.head_dim
        length, tail_start, tail_length = np.asarray(self.lengths, np.int32).T
        free = [
            [
                start
                for start in range(0, self.slots - self.window + 1, self.window)
                if start + self.window <= at or start >= at + many
            ]
            for at, many in zip(tail_start, tail_length, strict=True)
        ]
        starts = np.asarray(
            [random.choice(row, self.windows, replace=False) for row in free], np.int32
        ).reshape(batch, self.windows)
        pools = 1 if self.shared else batch
        shape = (pools, self.kv_heads, self.slots, dim)
        keys, values = random.standard_normal((2, *shape))
        q = random.standard_normal((batch, self.kv_heads * self.groups, dim))
        if not self.shared:
            for row in range(batch):
                hidden = np.ones(self.slots, bool)
                hidden[self.slots_of(row, starts)] = False
                keys[row, :, hidden] = values[row, :, hidden] = np.nan
        table = (starts, length, tail_start, tail_length)
        wide = [jnp.asarray(x.astype(self.dtype)) for x in (q, keys, values)]
        return (*wide, *map(jnp.asarray, table))

    def slots_of(self, row, starts):
        """Valid slots of a row in table order, tail last."""
        length, tail_start, tail_length = self.lengths[row]
        inside = [
            starts[row, t // self.window] + t % self.window for t in range(length)
        ]
        return [*inside, *range(tail_start, tail_start + tail_length)]

    def oracle(self):
        """Output and log-sum-exp by NumPy, float64."""
        q, keys, values, starts, *_ = (np.asarray(x, np.float64) for x in self.arrays)
        out = np.zeros_like(q)
        lse = np.full(q.shape[:2], -np.inf)
        for row, head in np.ndindex(*q.shape[:2]):
            at = np.asarray(self.slots_of(row, starts.astype(int)), int)
            if not len(at):
                continue
            pool = 0 if self.shared else row
            k, v = (x[pool, head // self.groups, at] for x in (keys, values))
            scores = k @ q[row, head] * self.head_dim**-0.5
            lse[row, head] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
            out[row, head] = np.exp(scores - lse[row, head]) @ v
        return out, lse

    def run(self, **how):
        """Output and log-sum-exp of `windowed_attention`."""
        call = functools.partial(
            windowed_attention,
            window=self.window,
            max_tail=self.max_tail,
            return_lse=True,
            **how,
        )
        return jax.jit(call)(*self.arrays)

    def compare(self, found):
        """Within rounding: weights and result in 16 bits, or all in float32."""
        out, lse = found
        expected_out, expected_lse = self.oracle()
        assert out.dtype == self.dtype
        assert lse.dtype == jnp.float32
        unit = {"bfloat16": 2.0**-9, "float16": 2.0**-11, "float32": 2.0**-22}
        largest = np.nanmax(np.abs(np.asarray(self.arrays[2], np.float64)))
        out = np.asarray(out, np.float64)
        atol = 2 * unit[self.dtype] * largest
        np.testing.assert_allclose(out, expected_out, rtol=0, atol=atol)
        np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-6)


def same(found, expected, atol):
    """Within `atol`, in whatever dtype."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


CASES = {
    # one row empty, one without windows, one without a tail, one that ends the cache
    "ragged": Case(((97, 5, 71), (0, 0, 0), (0, 301, 19), (120, 0, 0))),
    # every query head its own keys; windows in pieces of 8
    "ungrouped": Case(((50, 203, 80),), window=8, windows=7, groups=1, kv_heads=1),
    # no table at all: a contiguous cache, a head dim of 96, one cache for two rows
    "contiguous": Case(
        ((0, 3, 200), (0, 121, 130)),
        *(8, 0, 200),
        head_dim=96,
        dtype="float16",
        shared=True,
    ),
    # windows longer than a step, and no tail
    "windows": Case(
        ((100, 0, 0), (256, 0, 0)),
        *(128, 2, 0),
        head_dim=128,
        groups=9,
        kv_heads=1,
        slots=384,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_formula(name):
    case = dataclasses.replace(CASES[name], dtype="float32")
    with jax.numpy_dtype_promotion("strict"):
        case.compare(case.run())


class TestInterpreted:
    """In the interpreter, which detects races: fewer ring slots than steps."""

    @pytest.fixture(autouse=True)
    def watched(self, interpreter):
        pass

    @staticmethod
    def run(case, **tile):
        tile = Tile(stages=2, swizzle=64, **tile)
        return case.run(implementation="mosaic_gpu", tile=tile, interpret=True)

    @pytest.mark.compat
    @pytest.mark.parametrize(
        "name, splits, keys",
        [
            ("ragged", 2, 64),
            ("ungrouped", 1, 64),
            ("contiguous", 3, 128),
            ("windows", 1, 64),
        ],
    )
    def test_it_is_the_formula_and_nothing_leaks(self, name, splits, keys):
        case = CASES[name]
        with jax.numpy_dtype_promotion("strict"):
            case.compare(self.run(case, splits=splits, keys=keys))

    def test_splits_and_the_order_of_windows_change_nothing(self):
        case = dataclasses.replace(CASES["ungrouped"], lengths=((56, 203, 80),))
        out, lse = self.run(case, splits=1)
        q, keys, values, starts, *lengths = case.arrays
        turned = dataclasses.replace(case)
        backwards = np.asarray(starts)[:, ::-1]
        turned.__dict__["arrays"] = (q, keys, values, backwards, *lengths)
        for other in (self.run(case, splits=3), self.run(turned, splits=1)):
            np.testing.assert_allclose(lse, other[1], rtol=1e-6)
            unit = 2.0**-8  # the result in bfloat16, from weights in bfloat16
            same(out, other[0], unit)

    def test_it_reads_a_layer_s_row_and_clamps_as_the_definition_does(self):
        case = Case(((41, 8, 30), (0, 0, 80)), shared=True, groups=1)
        (q, keys, values), table = case.arrays[:3], map(np.asarray, case.arrays[3:])
        off = (20, 99, np.array([-20, 300]), 99)  # of places, lengths and tails
        tables = [
            np.stack([x, x + at]).astype(np.int32)
            for x, at in zip(table, off, strict=True)
        ]
        sizes = {"window": case.window, "max_tail": case.max_tail, "return_lse": True}
        kernel = {"implementation": "mosaic_gpu", "tile": Tile(), "interpret": True}

        def run(layer, **how):
            call = functools.partial(windowed_attention, **sizes, **how)
            return jax.jit(call)(q, keys, values, *tables, layer=layer)

        for how in ({}, kernel):
            case.compare(run(0, **how))
        for found, expected in zip(run(1, **kernel), run(1), strict=True):
            same(found, expected, 2.0**-6)

    def test_vmap_adds_an_axis_of_the_grid(self):
        case = CASES["ungrouped"]
        q, *rest = case.arrays
        twice = np.stack([q, -np.asarray(q)])

        def call(q, **how):
            sizes = {"window": case.window, "max_tail": case.max_tail}
            return windowed_attention(q, *rest, **sizes, **how)

        kernel = functools.partial(
            call, implementation="mosaic_gpu", tile=Tile(), interpret=True
        )
        found, expected = (jax.jit(jax.vmap(run))(twice) for run in (kernel, call))
        same(found, expected, 2.0**-6)


def test_importing_a_kernel_brings_no_pallas():
    kernels = "jmem.kernels.windowed_attention, jmem.kernels.spmm"
    code = f"import sys, {kernels}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    loaded = done.stdout.split()
    assert {*kernels.split(", ")} <= {*loaded}
    assert not [name for name in loaded if "pallas" in name]


def test_results_of_two_caches_merge():
    case = dataclasses.replace(CASES["ragged"], dtype="float32")
    q, keys, values, starts, length, tail_start, tail_length = case.arrays
    none = np.zeros_like(length)
    halves = (length, tail_start, none), (none, tail_start, tail_length)
    sizes = {"window": case.window, "max_tail": case.max_tail, "return_lse": True}
    attend = jax.jit(functools.partial(windowed_attention, **sizes))
    parts = [attend(q, keys, values, starts, *lengths) for lengths in halves]
    outs, lses = (np.stack(part) for part in zip(*parts, strict=True))
    case.compare(jax.jit(merge)(outs, lses))


# Refusals -----------------------------------------------------------------------------

SIZES: dict[str, Any] = {"slots": 64, "window": 16, "max_tail": 8}
GOOD = {
    "starts": [[0, 48, -7], [8, 40, 24]],  # the first row's third is not valid
    "length": [17, 48],
    "tail_start": [56, 3],
    "tail_length": [8, 2],
}
BAD = [
    ("length", (0,), 49, r"at \[0\], length=49; need 0 to 48"),
    ("length", (1,), -1, r"at \[1\], length=-1; need 0 to 48"),
    (
        "starts",
        (0, 1),
        56,
        r"at \[0, 1\], starts=56; need a multiple of 8 from 0 to 48",
    ),
    ("starts", (1, 2), 12, r"at \[1, 2\], starts=12; need a multiple of 8"),
    ("starts", (1, 0), -8, r"starts=-8"),
    ("tail_length", (1,), 9, r"tail_length=9; need 0 to max_tail=8"),
    ("tail_start", (0,), 57, r"tail_start=57; need 0 to 64 less tail_length"),
    ("tail_start", (1,), -1, r"tail_start=-1"),
]
flags = jax.jit(functools.partial(out_of_range, **SIZES))
attend = functools.partial(windowed_attention, window=16, max_tail=8)
attend_compiled = jax.jit(attend)


@pytest.mark.parametrize("name, at, value, words", BAD)
def test_a_table_out_of_range_is_refused_or_clamped_and_flagged(name, at, value, words):
    table = {key: np.asarray(rows, np.int32) for key, rows in GOOD.items()}
    check(**table, **SIZES)
    assert not flags(*table.values()).any()
    if (name, value) == ("length", 49):
        table["starts"][0, 2] = 0  # valid now; the length alone is at fault
    table[name][at] = value
    with pytest.raises(ValueError, match=words):
        check(**table, **SIZES)
    np.testing.assert_array_equal(flags(*table.values()), np.arange(2) == at[0])

    q = jnp.ones((2, 2, 16))
    cache = jnp.ones((2, 1, 64, 16))
    given = (q, cache, cache, *table.values())
    with pytest.raises(ValueError, match=words):
        attend(*given)
    np.testing.assert_allclose(attend_compiled(*given), 1.0, rtol=1e-6)


def call_with(q=(2, 4, 64), cache=(2, 2, 64, 64), dtypes="bbb", **sizes):
    names = {"b": jnp.bfloat16, "f": jnp.float32}
    args: list[Any] = [
        jnp.asarray(np.zeros(shape, names[dtype]))
        for shape, dtype in zip((q, cache, cache), dtypes, strict=True)
    ]
    rows = jnp.zeros(2, jnp.int32)
    args += [jnp.zeros((2, 2), jnp.int32), rows, rows, rows]
    return windowed_attention(*args, **{"window": 8, "max_tail": 8, **sizes})


MOSAIC = {"implementation": "mosaic_gpu"}
REFUSED = [
    ({"dtypes": "bbf"}, "dtypes bfloat16, bfloat16, float32 differ"),
    ({"cache": (3, 2, 64, 64)}, "keys hold 3 caches for 2 rows; need 2, or 1"),
    ({"cache": (2, 3, 64, 64)}, "4 query heads do not divide among 3"),
    ({"cache": (2, 2, 60, 64)}, "60 slots; round up to a multiple of 8"),
    ({"cache": (2, 2, 64, 32)}, "end in q's head dim, 64"),
    ({"window": 12}, "window=12; need a multiple of 8 up to the cache's 64 slots"),
    ({"window": 72}, "window=72"),
    ({"max_tail": -1}, "max_tail=-1"),
    ({"implementation": "triton"}, "implementation='triton'"),
    ({"interpret": True}, "interpret=True with implementation=None"),
    ({"dtypes": "fff", **MOSAIC}, "dtype=float32 is not bfloat16 or float16"),
    ({"q": (2, 4, 40), "cache": (2, 2, 64, 40), **MOSAIC}, "head_dim=40 is not a mult"),
    ({"q": (2, 4, 144), "cache": (2, 2, 64, 144), **MOSAIC}, "head_dim=144"),
    ({"q": (2, 4, 48), "cache": (2, 2, 64, 48), **MOSAIC}, "head_dim=48 is .* 64 to"),
    ({"q": (2, 65, 64), "cache": (2, 1, 64, 64), **MOSAIC}, "65 query heads to a key"),
    ({"tile": Tile(stages=16), **MOSAIC}, "stages=16 need .* bytes of shared memory"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given, words", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(given, words):
    with pytest.raises(ValueError, match=words):
        call_with(**given)


LAYERS = [
    ({"layer": 0}, (), r"layer=0 with .* of \(2, 1, 1, 1\) axes"),
    ({}, (3,), r"layer=None with .* of \(3, 2, 2, 2\) axes"),
    ({"layer": 3}, (3,), "layer=3; need 0 to 2"),
    ({"layer": -1}, (3,), "layer=-1; need 0 to 2"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given, layers, words", LAYERS)
def test_a_layer_and_its_table_must_agree(given, layers, words):
    q, cache = jnp.zeros((2, 4, 64)), jnp.zeros((2, 2, 64, 64))
    starts, rows = (np.zeros((*layers, *own), np.int32) for own in ((2, 2), (2,)))
    table = (starts, rows, rows, rows)
    with pytest.raises(ValueError, match=words):
        windowed_attention(q, cache, cache, *table, window=8, max_tail=8, **given)
    if layers:
        wrong = (starts[:2], rows, rows, rows)
        with pytest.raises(ValueError, match=r"have \[2, 3\] layers"):
            windowed_attention(
                *(q, cache, cache, *wrong), window=8, max_tail=8, layer=0
            )


def test_a_bad_value_names_its_layer():
    table = [np.stack([rows, rows]) for rows in GOOD.values()]
    table[1][1, 0] = 49
    with pytest.raises(ValueError, match=r"at \[1, 0\], length=49"):
        check(*table, **SIZES)
    np.testing.assert_array_equal(flags(*table), [[False, False], [True, False]])


@pytest.mark.parametrize("fields", [{"keys": 32}, {"swizzle": 16}, {"stages": 0}])
def test_a_tile_no_tensor_core_takes_is_refused(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Tile(**fields)


CHOICES = [
    (None, "bfloat16", 128, 32, "xla"),
    ("h200", "bfloat16", 128, 32, "mosaic_gpu"),
    ("h100", "float16", 80, 8, "mosaic_gpu"),
    ("a100-80", "bfloat16", 128, 32, "xla"),
    ("b200", "bfloat16", 128, 32, "xla"),
    ("h200", "float32", 128, 32, "xla"),
    ("h200", "bfloat16", 256, 32, "xla"),
    ("h200", "bfloat16", 48, 32, "xla"),
    ("h200", "bfloat16", 128, 12, "xla"),
]


@pytest.mark.parametrize("target, dtype, head_dim, window, expected", CHOICES)
def test_the_choice_follows_the_target(target, dtype, head_dim, window, expected):
    card = None if target is None else resolve(target)
    assert choose(card, dtype, head_dim, window) == expected
