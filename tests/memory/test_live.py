"""The live report, on a stand-in for a GPU's allocator where there is no GPU."""

import jax
import jax.numpy as jnp
import pytest

from jmem.memory import live as module
from jmem.memory.live import NoGPUError, attached, gpu, live
from jmem.program import Program


class Allocator:
    """A device that counts as an allocator would: one record a question."""

    device_kind = "NVIDIA H200"

    def __init__(self, *records):
        self.records = list(records)

    def memory_stats(self):
        return self.records.pop(0) if len(self.records) > 1 else self.records[0]


@pytest.fixture
def device(monkeypatch):
    def attach(*used):
        records = [
            {"bytes_in_use": now, "peak_bytes_in_use": peak, "bytes_limit": 1000}
            for now, peak in used
        ]
        monkeypatch.setattr(module, "gpu", lambda: Allocator(*records))

    return attach


def test_without_a_gpu_it_says_what_to_do():
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("a GPU is attached")
    with pytest.raises(NoGPUError, match=r"no GPU is attached.*jmem\.measure"):
        gpu()
    with pytest.raises(NoGPUError):
        live(lambda x: x, jnp.ones(3))


def test_peak_and_base_are_the_allocator_s(device):
    device((100, 150), (120, 400))
    report = live(lambda x: x + 1, jax.ShapeDtypeStruct((8,), "f4"))
    assert (report.base_bytes, report.peak_bytes) == (100, 400)
    assert report.earlier_peak_bytes == 150
    assert report.limit_bytes == 1000
    assert report.own


def test_a_peak_from_before_is_not_the_run_s_own(device):
    """Autotuning raised it; the allocator never lowers it again."""
    device((100, 500), (120, 500))
    assert not live(lambda x: x + 1, jnp.ones(8)).own


def test_the_program_makes_its_own_arguments(device):
    device((0, 0), (0, 1))
    seen = []

    def make(key):
        return (jax.random.normal(key, (8,)),)

    def fn(x):
        jax.debug.callback(lambda total: seen.append(float(total)), x.sum())
        return x

    live(Program(fn, (jax.ShapeDtypeStruct((8,), "f4"),), make=make), key=3)
    jax.effects_barrier()
    assert seen == [pytest.approx(float(make(jax.random.key(3))[0].sum()))]


def test_static_arguments_are_not_passed_again(device):
    device((0, 0), (0, 1))
    spec = jax.ShapeDtypeStruct((8,), "f4")
    assert live(lambda x, n: x[:n], spec, 4, static=(1,)).peak_bytes == 1


def test_an_attached_card_is_known_by_its_name(device):
    device((0, 0))
    card = attached(2)
    assert card.name == "NVIDIA H200"
    assert card.compiler_bytes == 151397597184
    assert card.usable_bytes == 1000
    assert card.devices == 2


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU is attached")
def test_a_program_that_runs_holds_what_was_planned():
    """In a fresh process: the allocator's peak is the plan's, rounded to buffers."""
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    report = live(lambda x: jnp.tanh(x), x)
    assert report.own
    assert report.peak_bytes == pytest.approx(report.planned_bytes, rel=0.01)
