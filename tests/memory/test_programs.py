"""The programs of `jmem.finetune.samples`, tiny: accounted for to the byte, no GPU."""

import dataclasses

import jax
import pytest
from tiny_decoder import TINY

from jmem.finetune.samples import SAMPLES, Sizes, build, plan_cache
from jmem.memory import kinds
from jmem.memory.live import make_arguments
from jmem.memory.measure import NO_TRITON, measure
from jmem.models import zoo
from jmem.models.decoder import Decoder

SMALL = dataclasses.replace(TINY, layers=2)
LEARNED = dataclasses.replace(
    SMALL,
    kv_heads=SMALL.heads,
    positions="learned",
    norm="layer",
    gated=False,
    tied=True,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
)
SIZES = Sizes(
    model="small",
    gpt2="learned",
    batch=4,
    seq_len=32,
    accumulate=2,
    decode_batch=4,
    slots=4096,
    width=256,
)
OLDEST = ("decode", "rebuilt", "offloaded", "nnx", "mosaic")
"""Cases that the oldest supported JAX is tested with as well."""
CUBLAS = ("unremat", "accumulated", "lora", "lisa", "gpt2")
"""Cases whose products are library calls with scratch, as an autotuner may choose."""


@pytest.fixture(
    params=[
        pytest.param(case, id=case, marks=[pytest.mark.compat] * (case in OLDEST))
        for case in SAMPLES
    ]
)
def case(request, monkeypatch):
    monkeypatch.setitem(zoo.MODELS, "small", SMALL)
    monkeypatch.setitem(zoo.MODELS, "learned", LEARNED)
    return request.param


def test_every_byte_is_accounted_for(case):
    program = build(case, "h200", SIZES)
    leaves = [leaf for *_, leaf in program.list_leaves()]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert [like(leaf) for leaf in jax.tree.leaves(make_arguments(program, None))] == [
        like(leaf) for leaf in leaves
    ]
    options = NO_TRITON if case in CUBLAS else {}
    report = measure(program, bounds=False, cache=False, options=options)
    assert sum(report.by_kind.values()) == report.device_bytes
    assert report.timeline.max() + report.fragmentation == report.device_bytes
    assert sum(row.total_bytes for row in report.rows) == report.timeline.max()
    assert report.by_kind[kinds.PARAMETERS] >= report.by_label["weights"] > 0
    if "backward" in report.timeline.phases:
        assert report.by_kind.get(kinds.OTHER, 0) < 0.02 * report.device_bytes
    if case in CUBLAS:
        assert max(report.timeline.by_kind[kinds.WORKSPACE]) >= 4 * 2**20
    PROMISES.get(case, nothing_on_the_host)(report)


def like(leaf):
    return leaf.shape, leaf.dtype


def nothing_on_the_host(report):
    assert report.host_bytes == 0


def one_cache(report):
    """A carried cache exists once."""
    nothing_on_the_host(report)
    assert report.by_label["kv cache"] == CACHE
    assert report.by_kind[kinds.KV_CACHE] == CACHE
    assert {advice.rule for advice in report.advice} <= {"split scratch"}  # cuBLAS's


def two_caches(report):
    """One that is scanned over exists twice, and the report says so."""
    nothing_on_the_host(report)
    starts = 4 * SIZES.decode_batch  # each layer's cache has its own
    assert report.alias_bytes == CACHE + (SMALL.layers - 1) * starts
    assert report.by_kind[kinds.KV_CACHE] >= 2 * CACHE
    (advice,) = [a for a in report.advice if a.rule == "rebuilt cache"]
    assert advice.text.startswith("'cache' is donated, but built anew at")
    assert CACHE // 2 <= advice.saves_bytes <= CACHE


def moments_on_the_host(report):
    assert report.host_by_label["optimizer"] == report.host_bytes > 0


def nnx_state(report):
    """As its user wrote it: state by path, the rest by operation and line."""
    nothing_on_the_host(report)
    weights = 4 * (2 * 4 * SIZES.width**2 + 5 * SIZES.width)
    assert report.by_label["weights"] == weights
    assert report.alias_bytes >= 3 * weights
    assert report.by_kind[kinds.OPTIMIZER] >= 2 * weights
    explained = sum(
        row.total_bytes
        for row in report.rows
        if row.kind != kinds.OTHER and (row.name or (row.op and row.source))
    )
    assert explained > 0.98 * report.timeline.max()


def kernel_calls(report):
    nothing_on_the_host(report)
    assert any("mosaic_gpu" in call for call in report.calls)


CACHE = plan_cache(Decoder(SMALL, dtype="bfloat16"), SIZES).bytes()
PROMISES = {
    "decode": one_cache,
    "rebuilt": two_caches,
    "offloaded": moments_on_the_host,
    "nnx": nnx_state,
    "mosaic": kernel_calls,
}
"""What must hold of a program besides."""
