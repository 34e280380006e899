"""Windowed attention compiled for an H200, with none at hand; its shapes and bench."""

import functools
import json
import pathlib
import re
import tomllib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jmem.kernels import _bench, _mgpu
from jmem.kernels._resources import resources
from jmem.kernels.windowed_attention import bench, check, windowed_attention
from jmem.kernels.windowed_attention.mosaic_gpu import Tile, predicted_us
from jmem.kernels.windowed_attention.shapes import SHAPES, Shape, kernel_calls
from jmem.program import Program
from jmem.targets import resolve

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name, blocks",
    [
        ("llama3-8b-32k-b1", 264),  # two a multiprocessor
        ("llama3-8b-8k-b32", 256),  # one a row and key-value head
        ("llama3-8b-128k-b6", 528),  # full waves
        ("qwen2.5-1.5b-32k-b1", 132),  # as many splits as merge in one launch
    ],
)
def test_the_grid_fills_the_gpu(name, blocks):
    shape = SHAPES[name]
    assert shape.batch * shape.kv_heads * bench.heuristic(shape).splits == blocks


def test_the_model_is_the_formula_it_was_fitted_as():
    """Two waves of one block a multiprocessor, and one wave of two."""
    sizes = {"pairs": 8, "steps": 528, "head_dim": 128, "launches": 7}
    alone, two = Tile(stages=6, splits=33), Tile(splits=33)
    assert [tile.resident(128) for tile in (alone, two)] == [1, 2]
    found = predicted_us(alone, **sizes), predicted_us(two, **sizes)
    start, small = 4.2, 1.5 * 7
    expected = 2 * (0.98 * 16 + start) + small, 0.98 * 2 * 16 + start + small
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_a_tile_that_fits_and_a_table_that_holds_it(name):
    shape = SHAPES[name]
    tile = bench.heuristic(shape)
    tile.check(shape.head_dim)
    assert tile.splits * tile.keys <= shape.tokens + 2 * tile.keys
    starts, length, tail_start, tail_length = shape.table(regions=2)
    sizes = {**shape.sizes(), "slots": 2 * shape.tokens}
    check(starts, length, tail_start, tail_length, **sizes)
    assert (length + tail_length == shape.tokens).all()
    if shape.windows:
        order = np.sort(starts, axis=-1)
        assert (order[0] == np.arange(0, length[0, 0], shape.window)).all()
        assert (order[1] == order[0] + shape.tokens).all()


@pytest.mark.compat
def test_it_compiles_for_an_h200_within_its_budget():
    budgets = tomllib.loads(
        (ROOT / "kernels" / "windowed_attention" / "budget.toml").read_text()
    )
    found = resources("windowed_attention")
    assert set(found) == set(kernel_calls())
    for name, one in found.items():
        ((head_dim, columns),) = re.findall(r"_d(\d+)_w\d+(_n\d+)?", name)
        budget = budgets[head_dim + columns]
        assert one.spill_bytes == 0, name
        assert one.registers <= budget["registers"], name
        assert one.shared_bytes <= budget["shared_bytes"], name
        assert one.blocks_per_core(threads=256) >= budget["blocks"], name
        sizes = int(head_dim), int(columns[2:] or 4)
        tile = Tile(swizzle=_mgpu.swizzle_of(sizes[0], "bfloat16"))
        assert one.shared_bytes == tile.shared_bytes(*sizes)
        assert one.blocks_per_core(threads=256) == tile.resident(*sizes)


def test_no_copy_of_the_cache_in_a_decoding_step():
    """All layers in one donated buffer, carried by the scan, updated in place."""
    layers, batch, heads, dim, capacity, tail = 4, 2, 2, 128, 1024, 256
    region = capacity + tail
    cache = jax.ShapeDtypeStruct((batch, heads, layers * region, dim), jnp.bfloat16)

    def step(keys, values, q, starts, length, decoded):
        def layer(carry, index):
            q, keys, values = carry
            base = index * region
            new = q[:, ::4, None]
            rows, of = jnp.arange(batch)[:, None], jnp.arange(heads)[None]
            at = (rows, of, (base + capacity + decoded)[:, None])
            keys, values = (x.at[at].set(new[:, :, 0]) for x in (keys, values))
            q = windowed_attention(
                *(q, keys, values, starts + base, length),
                jnp.full(batch, base + capacity),
                decoded + 1,
                window=32,
                max_tail=tail,
                implementation="mosaic_gpu",
            )
            return (q, keys, values), None

        every = jnp.arange(layers, dtype=jnp.int32)
        (q, keys, values), _ = lax.scan(layer, (q, keys, values), every)
        return keys, values, q

    q = jax.ShapeDtypeStruct((batch, 4 * heads, dim), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    starts = jax.ShapeDtypeStruct((batch, capacity // 32), jnp.int32)
    args = (cache, cache, q, starts, rows, rows)
    compiled: Any = Program(step, args, donate=(0, 1)).compile(resolve("h200"))
    text, memory = compiled.as_text(), compiled.memory_analysis()
    cache_bytes = np.prod(cache.shape) * 2
    assert "windowed_attention" in text
    assert memory.alias_size_in_bytes == 2 * cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4
    whole = re.escape(f"bf16[{','.join(map(str, cache.shape))}]")
    assert re.search(rf"= {whole}\S* fusion\(", text)  # the update, in place
    assert not re.search(rf"= \(?{whole}\S* (copy|transpose|copy-start)\(", text)


def test_shard_map_gives_each_gpu_its_key_value_heads():
    mesh = AbstractMesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    heads, whole = PartitionSpec(None, "heads"), PartitionSpec()

    def like(spec, *shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def attend(*args):
        call = functools.partial(
            windowed_attention, window=8, max_tail=64, implementation="mosaic_gpu"
        )
        return jax.shard_map(  # over the mesh in scope
            call,
            in_specs=(heads, heads, heads, *[whole] * 4),
            out_specs=heads,
            check_vma=False,
        )(*args)

    cache, rows = like(heads, 2, 8, 1024, 128), like(whole, 2, dtype="int32")
    table = (like(whole, 2, 16, dtype="int32"), rows, rows, rows)
    program = Program(attend, (like(heads, 2, 32, 128), cache, cache, *table))
    compiled: Any = program.compile(resolve("h200x2"))
    text = compiled.as_text()
    (kernel,) = re.findall(r".*custom_call_target=\"mosaic_gpu.*", text)
    assert kernel.count("bf16[2,4,1024,128]") == 2  # half the heads, of both
    assert not re.search(r"(all-gather|all-reduce|all-to-all|permute)(-start)?\(", text)


# The bench ----------------------------------------------------------------------------


def test_the_bench_refuses_without_a_gpu(capsys):
    assert bench.main(["--only", "llama3-8b-8k-b1"]) == 2
    assert "needs an attached GPU of compute capability 9.0" in capsys.readouterr().err


def test_a_shape_below_its_share_of_the_bandwidth_fails(monkeypatch, capsys, tmp_path):
    shares = {"llama3-8b-8k-b1": 0.81, "llama3-8b-8k-b1-w8": 0.64}
    tile = bench.heuristic(SHAPES["llama3-8b-8k-b1"])

    def measure(shape, device, tune):
        name = next(name for name, other in SHAPES.items() if other is shape)
        ms = 1e3 * shape.read_bytes / (shares[name] * 4e12)
        row = bench.Row(bench.Time(ms, ms, ms), launches=2, model_ms=0.01234)
        return {"mosaic_gpu": row}, tile

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "attached", lambda capability: "NVIDIA H200")
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 4e12)
    out = tmp_path / "bench.json"
    assert bench.main(["--only", "llama3-8b-8k-b1", "--out", str(out)]) == 0
    assert bench.main(["--only", *shares, "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "8k-b1-w8 is below 65% of the bandwidth" in printed
    assert printed.count("2.0   0.0123") == 3  # launches, and the model beside the time
    records = json.loads(out.read_text())
    assert [row["shape"] for row in records] == list(shares)
    assert [row["model_ms"] for row in records] == [0.01234] * 2


def test_a_call_of_the_bench_is_two_launches_as_written():
    """The kernel, and one that merges 33 splits and is the next call's query."""
    shape = SHAPES["llama3-8b-32k-b1"]
    regions = bench.regions(shape)
    table = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shape.table(regions)]
    run = bench.chain(shape, implementation="mosaic_gpu")
    program = Program(run, (*shape.arrays(regions), *table))
    compiled: Any = program.compile(resolve("h200"))
    # and one that pads the first query
    assert _bench.count_launches(compiled) == 2 * regions + 1


def test_launches_within_a_call_count_and_those_of_a_loop_cannot_be():
    @jax.jit
    def loop(x):
        return lax.fori_loop(0, x[0], lambda i, x: x * i, x)

    assert np.isnan(_bench.count_launches(loop.lower(jnp.ones(2, int)).compile()))
    text = """HloModule m

%graph (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %a.1 = f32[2]{0} fusion(%p), kind=kLoop, calls=%fused
  ROOT %b = (f32[2]{0}, /*index=1*/f32[2]{0}) custom-call(%a.1), custom_call_target="x"
}

ENTRY %main.2 (q: f32[2]) -> f32[2] {
  %q = f32[2]{0} parameter(0)
  %call.7 = f32[2]{0} call(%q), to_apply=%graph, metadata={op_name="jit(f)"}
  ROOT %c = f32[2]{0} copy(%call.7)
}
"""
    assert _bench.count_launches(types.SimpleNamespace(as_text=lambda: text)) == 3


def test_a_timed_chain_attends_every_region_once(monkeypatch):
    shape = Shape(batch=2, heads=2, kv_heads=1, head_dim=16, tokens=160, window=8)
    assert bench.regions(shape) * shape.read_bytes >= 4 * 50 * 2**20
    monkeypatch.setattr(bench, "regions", lambda shape: 2)
    q, keys, values, *table = bench.inputs(shape)
    found = jax.jit(bench.chain(shape))(q, keys, values, *table)
    for at in (0, shape.tokens):
        k, v = (x[:, :, at : at + shape.tokens] for x in (keys, values))
        scores = jnp.einsum("bhd,bksd->bhs", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / 4, axis=-1).astype(v.dtype)
        q = jnp.einsum("bhs,bksd->bhd", weights, v)
    np.testing.assert_allclose(
        np.asarray(found, np.float64),
        np.asarray(q, np.float64),
        atol=bench.TOLERANCE,
    )
