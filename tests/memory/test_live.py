"""The live report, on a stand-in for a GPU's allocator where there is no GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmem.memory import card, kinds
from jmem.memory import live as module
from jmem.memory.card import NoGPUError, describe_attached, find_gpu
from jmem.memory.live import (
    ARGUMENTS,
    LOADED,
    OTHER_PLAN,
    ROUNDING,
    START,
    TERMS,
    UNEXPLAINED,
    LiveReport,
    compute_terms,
    live,
    read_sums,
    time_runs,
)
from jmem.memory.measure import measure
from jmem.program import HOST, Program

MiB = 2**20
spec = jax.ShapeDtypeStruct((8,), "f4")


class Allocator:
    """A device that counts as an allocator would: one record a question."""

    device_kind = "NVIDIA H200"

    def __init__(self, *records):
        self.records = list(records)

    def memory_stats(self):
        return self.records.pop(0) if len(self.records) > 1 else self.records[0]


@pytest.fixture
def device(monkeypatch):
    """`device((in use, peak), ...)`: at start, loaded, base and end."""

    def attach(*used):
        records = [
            {"bytes_in_use": now, "peak_bytes_in_use": peak, "bytes_limit": 1000}
            for now, peak in used
        ]
        for where in (module, card):
            monkeypatch.setattr(where, "find_gpu", lambda: Allocator(*records))

    return attach


def run(*args, **more):
    return live(*args, predict=False, **more)


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    def none(platform):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(card.jax, "devices", lambda *name: none(*name) if name else [])
    with pytest.raises(NoGPUError, match=r"no GPU is attached.*jmem\.measure"):
        find_gpu()
    with pytest.raises(NoGPUError):
        live(lambda x: x, jnp.ones(3))


class TestTerms:
    """32 bytes in and 32 out are 256 each to the allocator; nothing is temporary."""

    def test_each_is_what_its_moments_say(self, device):
        device((1000, 1000), (1500, 1500), (1756, 1800), (1756 + 256 + 100, 2200))
        report = run(lambda x: x + 1, spec)
        assert (report.planned_bytes, report.peak_bytes) == (64, 2200)
        assert report.terms == {
            START: 1000,
            ARGUMENTS: 0,
            ROUNDING: 2 * 224,
            LOADED: 500 + 100,
            UNEXPLAINED: 2200 - 1756 - 256 - 100,
        }
        assert (report.earlier_peak_bytes, report.limit_bytes) == (1800, 1000)
        assert report.own

    def test_a_result_in_a_donated_argument_s_place_is_no_new_one(self, device):
        device((0, 0), (0, 0), (256, 256), (256, 256))
        report = run(lambda x: x + 1, spec, donate=(0,))
        assert report.planned_bytes == 32
        assert report.terms == dict.fromkeys(TERMS, 0) | {ROUNDING: 224}
        assert not report.own  # a peak from before: autotuning, or making arguments

    def test_what_making_the_arguments_left_is_told_apart(self, device):
        device((0, 0), (0, 0), (256 + 4096, 8192), (256 + 4096 + 256, 9000))
        assert run(lambda x: x + 1, spec).terms[ARGUMENTS] == 4096

    def test_a_program_out_of_a_cache_is_planned_once_more(self, device, monkeypatch):
        planned = read_sums(jax.jit(lambda x: x + 1).lower(spec).compile())
        none = dict.fromkeys(planned, 0)
        answers = [none, planned]
        monkeypatch.setattr(module, "read_sums", lambda _: answers.pop(0))
        monkeypatch.setattr(
            module, "compile_and_dump", lambda lowered, options: (b"", None)
        )
        device((0, 0), (0, 0), (256, 256), (512, 512))
        assert run(lambda x: x + 1, spec).planned_bytes == 64
        device((0, 0), (0, 0), (256, 256), (512, 512))
        assert run(lambda x: x + 1, spec, sums=planned).planned_bytes == 64
        assert not answers

    @given(
        moments=st.lists(st.integers(0, 2**40), min_size=4, max_size=4),
        peak=st.integers(0, 2**40),
        sizes=st.lists(st.lists(st.integers(1, 2**40)), min_size=3, max_size=3),
        parts=st.lists(st.integers(0, 2**40), min_size=5, max_size=5),
    )
    def test_they_sum_to_peak_less_plan(self, moments, peak, sizes, parts):
        names = ("argument", "output", "alias", "temp")
        plan = {f"{name}_size_in_bytes": part for name, part in zip(names, parts)}
        plan |= {"total_allocation_bytes": parts[4]}
        arguments, results, freed = sizes
        found = compute_terms(
            *(plan, moments, peak),
            arguments=arguments,
            results=results,
            freed=freed,
        )
        assert set(found) == set(TERMS)
        assert sum(found.values()) == peak - parts[4]


REPORT = LiveReport(
    name="step",
    device="NVIDIA H200",
    versions={"jax": "0.12.0", "jaxlib": "0.12.0"},
    peak_bytes=1072 * MiB,
    earlier_peak_bytes=500 * MiB,
    limit_bytes=2048 * MiB,
    planned_bytes=1040 * MiB,
    terms={START: 0, ARGUMENTS: 0, ROUNDING: MiB, LOADED: 21 * MiB, UNEXPLAINED: MiB},
)


@pytest.fixture(scope="module")
def small():
    """Some report ahead of time, for its fields to be replaced."""
    return measure(lambda x: x + 1, spec, bounds=False)


@pytest.fixture
def compared(small):
    """A run whose GPU planned 40 MiB more than predicted, 30 of them workspace."""
    ahead = dataclasses.replace(
        small,
        target="h200",
        device_bytes=1000 * MiB,
        interval=(990 * MiB, 1000 * MiB),
        by_kind={kinds.PARAMETERS: 900 * MiB, kinds.GRADIENTS: 100 * MiB},
    )
    kinds_there = {
        kinds.PARAMETERS: 900 * MiB,
        kinds.GRADIENTS: 106 * MiB,
        kinds.WORKSPACE: 30 * MiB,
    }
    plan = dataclasses.replace(
        ahead, target="NVIDIA H200", device_bytes=1036 * MiB, by_kind=kinds_there
    )
    return REPORT.add_prediction(ahead, plan)


class TestCompared:
    def test_the_plan_s_difference_is_told_by_kind(self, compared):
        assert compared.plan_terms == {
            kinds.GRADIENTS: 6 * MiB,
            kinds.WORKSPACE: 30 * MiB,
            OTHER_PLAN: 4 * MiB,
        }
        assert sum(compared.plan_terms.values()) == 1040 * MiB - 1000 * MiB

    def test_named_terms_are_libraries_and_moments(self, compared):
        """Neither other buffers nor what is unexplained excuse a prediction."""
        assert compared.named_bytes == (1 + 21 + 30) * MiB
        assert compared.compute_error() == pytest.approx(0.072)
        assert compared.compute_error(named=True) == pytest.approx(0.020)

    def test_a_peak_inside_the_interval_is_not_off(self, compared):
        inside = dataclasses.replace(compared, peak_bytes=995 * MiB)
        assert inside.compute_error() == 0

    def test_without_a_prediction_there_is_no_distance(self):
        with pytest.raises(ValueError, match="step: no prediction was made"):
            REPORT.compute_error()

    def test_it_prints_what_it_holds(self, compared):
        text = str(compared)
        assert "step on NVIDIA H200, jax 0.12.0" in text
        assert "0.967 - 0.977 GiB   for h200, without a GPU" in text
        lines = [line.rsplit(maxsplit=1) for line in text.splitlines()]
        assert [ROUNDING, f"{MiB:+,}"] in lines
        assert [kinds.WORKSPACE, f"{30 * MiB:+,}"] in lines
        assert "not the run's own" not in text
        early = dataclasses.replace(compared, earlier_peak_bytes=1072 * MiB)
        assert "not the run's own: 1.05 GiB were in use before it" in str(early)

    def test_json_loses_nothing(self, compared, tmp_path):
        for report in (REPORT, compared):
            report.to_json(tmp_path / "live.json")
            assert LiveReport.from_json(tmp_path / "live.json") == report
        with pytest.raises(ValueError, match="not a LiveReport of schema 1"):
            LiveReport.from_json('{"schema": 0}')


def test_arguments_on_the_host_stay_there():
    """Zeros made by a program would be on the device first."""
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)
    waiting = jax.ShapeDtypeStruct((8,), "f4", sharding=host)

    def make(key):
        return jax.random.normal(key, (8,)), jnp.ones(8)

    program = Program(lambda x, y: x + y, (waiting, spec), make=make)
    for key in (None, 3):
        made = module.make_arguments(program, key)
        assert [array.sharding.memory_kind == HOST for array in made] == [True, False]
        assert [size for *_, size in module._list_buffers(made)] == [32]


def test_the_program_makes_its_own_arguments(device):
    device((0, 0), (0, 0), (0, 0), (0, 1))
    seen = []

    def make(key):
        return (jax.random.normal(key, (8,)),)

    def fn(x):
        jax.debug.callback(lambda total: seen.append(float(total)), x.sum())
        return x

    run(Program(fn, (spec,), make=make), key=3)
    jax.effects_barrier()
    assert seen == [pytest.approx(float(make(jax.random.key(3))[0].sum()))]


def test_a_timed_run_goes_on_from_the_one_before(monkeypatch):
    monkeypatch.setattr(module, "WARM_UP", 1)
    program = Program(
        lambda count, step: (count + step, step),
        (jax.ShapeDtypeStruct((), "i4"),) * 2,
        donate=(0,),
        make=lambda key: (jnp.int32(5), jnp.int32(2)),
    )
    seen = []
    compile_ = Program.compile

    def watch(self):
        compiled = compile_(self)

        def call(count, step):
            seen.append(int(count))
            return compiled(count, step)

        return call

    monkeypatch.setattr(Program, "compile", watch)
    seconds = time_runs(program, 2)
    assert seen == [5, 7, 9]
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_static_arguments_are_not_passed_again(device):
    device((0, 0), (0, 0), (0, 0), (0, 1))
    assert run(lambda x, n: x[:n], spec, 4, static=(1,)).peak_bytes == 1


def test_it_predicts_for_the_described_gpu_and_plans_for_the_attached(
    device, monkeypatch, small
):
    device((0, 0), (0, 0), (256, 256), (512, 512))
    asked = []

    def measured(program, *, target, **_):
        asked.append(target)
        return dataclasses.replace(small, target=target)

    monkeypatch.setattr(module, "measure", measured)
    assert live(lambda x: x + 1, spec).target == "h200"
    assert asked == ["attached", "h200"]


def test_an_attached_card_is_known_by_its_name(device):
    device((0, 0))
    found = describe_attached(2)
    assert found.name == "NVIDIA H200"
    assert found.compiler_bytes == 151397597184
    assert found.usable_bytes == 1000
    assert found.devices == 2


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU is attached")
def test_a_program_that_runs_holds_what_was_planned():
    """In a fresh process: the allocator's peak is the plan's, rounded to buffers."""
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    report = live(lambda x: jnp.tanh(x), x)
    assert report.own
    assert report.peak_bytes == pytest.approx(report.planned_bytes, rel=0.01)
    assert abs(report.compute_error()) < 0.03
