"""Sparse products compiled for an H200, with none at hand; their shapes and bench."""

import pathlib
import re
import tomllib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jmem.kernels._resources import resources
from jmem.kernels.spmm import bench, check, mosaic_gpu, spmm
from jmem.kernels.spmm.shapes import SHAPES, Shape, kernel_calls
from jmem.program import Program
from jmem.targets import resolve

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.compat
def test_it_compiles_for_an_h200_within_its_budget():
    budgets = tomllib.loads((ROOT / "kernels" / "spmm" / "budget.toml").read_text())
    found = resources("spmm")
    assert set(found) == set(kernel_calls())
    for name, one in found.items():
        ((kind, rows),) = re.findall(r"spmm_(\w+)_r(\d)t\d", name)
        budget = budgets[kind]
        instructions, products = one.loop
        assert one.spill_bytes == 0, name
        assert one.registers <= budget["registers"], name
        assert one.shared_bytes <= budget["shared_bytes"], name
        assert one.blocks_per_core(128 * (int(rows) + 1)) >= budget["blocks"], name
        assert 4 * instructions <= budget["instructions"] * products, name


@pytest.mark.parametrize("kind", ["n8_bfloat16", "n32_bfloat16", "n8_int4_bfloat16"])
def test_the_tile_s_closed_forms_are_the_budget_s(kind):
    """Registers and shared memory by which the heuristic counts resident blocks."""
    budget = tomllib.loads((ROOT / "kernels" / "spmm" / "budget.toml").read_text())[
        kind
    ]
    columns, *_ = map(int, re.findall(r"n(\d+)_", kind))
    shape = SHAPES["opt-30b-o-n8-s80"]
    bits = 4 if "int4" in kind else 16
    sizes = {"tokens": columns, "down": 112, "across": 112, "cap": shape.cap}
    tile = mosaic_gpu.tile_for(**sizes, bits=bits, device="NVIDIA H200")
    assert tile.shared_bytes(columns, shape.cap, bits) == budget["shared_bytes"]
    assert tile.resident(columns, shape.cap, bits) >= budget["blocks"]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_a_tile_that_fits_and_fills_the_gpu(name):
    shape = SHAPES[name]
    down, across = shape.matrix(1).tiles
    blocks, columns = mosaic_gpu.columns_of(shape.tokens)
    tile = bench.heuristic(shape)
    tile.check(columns, shape.cap)
    assert tile.splits <= across // tile.tiles
    assert across % tile.tiles == 0
    resident = tile.resident(columns, shape.cap)
    grid = blocks * -(-down // tile.rows) * tile.splits
    assert grid >= resident * mosaic_gpu.PROCESSORS
    if shape.outputs == 7168 and shape.tokens <= 8 and shape.zeros >= 70:
        assert resident >= 3


def test_no_copy_of_a_weight_in_a_loop_over_layers():
    layers, size = 4, 512
    shape = Shape(outputs=size, inputs=size, tokens=8, zeros=80)

    def step(x, matrix):
        def layer(x, index):
            y = spmm(x, matrix, layer=index, implementation="mosaic_gpu")
            return y, None

        return lax.scan(layer, x, jnp.arange(layers, dtype=jnp.int32))[0]

    matrix = shape.matrix(layers)
    compiled: Any = Program(step, (shape.x(), matrix)).compile(resolve("h200"))
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert "spmm_n8" in text
    # What the splits add, and x: of the matrix nothing, packed or dense.
    assert memory.temp_size_in_bytes < 2 * size * size
    arrays = (matrix.values, matrix.masks, matrix.prefixes)
    whole = "|".join(re.escape(f"[{','.join(map(str, a.shape))}]") for a in arrays)
    assert not re.search(rf"= \w+({whole})\S* (copy|fusion|copy-start)\(", text)


# The bench ----------------------------------------------------------------------------


def test_the_bench_refuses_without_a_gpu(capsys):
    assert bench.main(["--only", "opt-30b-o-n8-s80"]) == 2
    assert "needs an attached GPU of compute capability 9.0" in capsys.readouterr().err


def test_what_the_bench_multiplies_is_a_matrix():
    shape = Shape(outputs=100, inputs=200, tokens=3, zeros=70)
    matrix = bench.draw(shape, layers=2)
    check(matrix)
    assert (matrix.outputs, matrix.inputs, matrix.layers) == (100, 200, (2,))
    stored = np.bitwise_count(np.asarray(matrix.masks)).sum()
    assert abs(stored / (2 * 8 * 4096) - 0.3) < 0.01
    described = shape.matrix(2)
    assert matrix.cap == described.cap
    assert abs(matrix.values.shape[1] / described.values.shape[1] - 1) < 0.1


def test_bounds_are_bytes_and_issue_slots():
    shape = SHAPES["opt-30b-o-n8-s80"]
    by_bytes, by_instructions = bench.bounds_ms(shape, bandwidth=4.8e12)
    tiles = 112 * 112
    packed = 2 * 0.2 * 4096 + 10 * 64 + 4 + 64
    np.testing.assert_allclose(by_bytes, 1e3 * tiles * packed / 4.8e12, rtol=1e-3)
    clock = resolve("h200").clock_ghz * 1e9
    expected = 1e3 * tiles / 132 * bench.INSTRUCTIONS / clock
    np.testing.assert_allclose(by_instructions, expected, rtol=1e-6)


def test_a_shape_slower_than_expected_fails(monkeypatch, capsys, tmp_path):
    def row(ms):
        return bench.Row(bench.Time(ms, ms, ms), launches=2)

    times = iter([0.01, 0.03])

    def measure(shape, device, tune):
        found = {"mosaic_gpu": row(next(times)), "cublas": row(0.03)}
        return found, bench.heuristic(shape)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "attached", lambda capability: "NVIDIA H200")
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 4e12)
    names = ["opt-30b-o-n8-s80", "opt-30b-o-n8-s60"]
    assert bench.main(["--only", *names, "--out", str(tmp_path / "b.json")]) == 1
    printed = capsys.readouterr().out
    assert "n8-s60 is 1.00 times as fast as cuBLAS, expected 1.5" in printed
    assert "n8-s80 is" not in printed
