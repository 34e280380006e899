"""Windowed attention compiled for an H200, with none at hand; its shapes and bench."""

import functools
import json
import pathlib
import re
import tomllib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jmem.kernels._resources import resources
from jmem.kernels.windowed_attention import bench, check, windowed_attention
from jmem.kernels.windowed_attention.mosaic_gpu import MIN_BLOCKS
from jmem.kernels.windowed_attention.shapes import SHAPES, Shape, kernel_calls
from jmem.program import Program
from jmem.targets import resolve

ROOT = pathlib.Path(__file__).parents[2]


def test_the_grid_fills_the_gpu_at_batch_one():
    shape = SHAPES["llama3-8b-32k-b1"]
    assert shape.kv_heads * bench.heuristic(shape).splits >= MIN_BLOCKS == 264


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_a_tile_that_fits_and_a_table_that_holds_it(name):
    shape = SHAPES[name]
    tile = bench.heuristic(shape)
    tile.check(shape.head_dim)
    assert tile.splits * tile.keys <= shape.tokens + 2 * tile.keys
    starts, length, tail_start, tail_length = shape.table()
    sizes = {**shape.sizes(), "slots": shape.tokens}
    check(starts, length, tail_start, tail_length, **sizes)
    assert (length + tail_length == shape.tokens).all()
    if shape.windows:
        assert (np.sort(starts, axis=1) == np.arange(0, length[0], shape.window)).all()


@pytest.mark.compat
def test_it_compiles_for_an_h200_within_its_budget():
    budgets = tomllib.loads(
        (ROOT / "kernels" / "windowed_attention" / "budget.toml").read_text()
    )
    found = resources("windowed_attention")
    assert set(found) == set(kernel_calls())
    for name, one in found.items():
        (head_dim,) = re.findall(r"_d(\d+)_", name)
        budget = budgets[head_dim]
        assert one.spill_bytes == 0, name
        assert one.registers <= budget["registers"], name
        assert one.shared_bytes <= budget["shared_bytes"], name
        assert one.blocks_per_core(threads=256) >= budget["blocks"], name
        shape = Shape(
            batch=1, heads=8, kv_heads=8, head_dim=int(head_dim), tokens=32768
        )
        tile = bench.heuristic(shape)
        assert one.shared_bytes == tile.shared_bytes(shape.head_dim)


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
        return {"mosaic_gpu": bench.Time(ms, ms, ms)}, tile

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "attached", lambda capability: "NVIDIA H200")
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 4e12)
    out = tmp_path / "bench.json"
    assert bench.main(["--only", "llama3-8b-8k-b1", "--out", str(out)]) == 0
    assert bench.main(["--only", *shares, "--out", str(out)]) == 1
    assert "8k-b1-w8 is below 65% of the bandwidth" in capsys.readouterr().out
    assert [row["shape"] for row in json.loads(out.read_text())] == list(shares)


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
