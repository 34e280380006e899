"""Stages in processes of their own; without a GPU, each up to where it needs one."""

import json

import jax
import pytest

from jmem.memory import card, protocol
from jmem.memory import live as live_module
from jmem.memory.card import NoGPUError
from jmem.memory.protocol import StageError, confirm, make_environment, run_stage
from jmem.program import Program


def increment(length: int) -> Program:
    return Program(lambda x: x + 1, (jax.ShapeDtypeStruct((length,), "f4"),))


PLANNED = {
    "total_allocation_bytes": 8192,
    "argument_size_in_bytes": 4096,
    "output_size_in_bytes": 4096,
    "alias_size_in_bytes": 0,
    "temp_size_in_bytes": 0,
}


class Allocator:
    device_kind = "NVIDIA H200"

    def __init__(self):
        self.moments = [(0, 0), (0, 0), (4096, 4096), (8192, 8192)]

    def memory_stats(self):
        now, peak = self.moments.pop(0)
        return {"bytes_in_use": now, "peak_bytes_in_use": peak, "bytes_limit": 9000}


@pytest.fixture
def attached(monkeypatch):
    """A stand-in for a GPU, and stages that run in this process."""
    for module in (card, live_module, protocol):
        monkeypatch.setattr(module, "find_gpu", Allocator)
    asked = []

    def run(stage, *given, cache="", share=1.0):
        asked.append(stage.__name__)
        builder, arguments, *more = json.loads(json.dumps(given))
        if (
            stage is protocol.plan_attached
        ):  # XLA plans for a GPU only with one attached
            report = protocol.predict(builder, arguments, "h200")
            return {"sums": PLANNED, "report": report}
        return stage(builder, arguments, *more)

    monkeypatch.setattr(protocol, "run_stage", run)
    return asked


def test_one_report_of_three_stages(attached):
    report = confirm(increment, 1024, target="h200")
    assert sorted(attached) == ["plan_attached", "predict", "run"]
    assert attached.index("plan_attached") < attached.index(
        "run"
    )  # which finds it compiled
    assert report.interval == (8192, 8192)
    assert report.target == "h200"
    assert report.peak_bytes == report.planned_bytes == 8192  # of stage "plan_attached"
    assert report.plan_terms == {}
    assert not any(report.terms.values())
    assert report.compute_error() == 0


def test_further_runs_are_timed(attached, monkeypatch):
    monkeypatch.setattr(
        protocol, "time_runs", lambda program, runs, trace: (0.5,) * runs
    )
    report = confirm(increment, 1024, target="h200", runs=3)
    assert report.seconds == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("predicted", "says"), [(200, "does not fit: 200.00 GiB"), (1, "stage 'plan'")]
)
def test_what_fails_is_told_with_whether_it_fits(monkeypatch, predicted, says):
    def run(stage, *given, cache="", share=1.0):
        if stage is protocol.predict:
            return json.dumps(predicted * 2**30)
        raise StageError("stage 'plan' failed: RESOURCE_EXHAUSTED")

    class Ahead:
        def __init__(self, text):
            self.interval = (int(text), int(text))

        def fits(self, reserve):
            return self.interval[0] < 139 * 2**30

    monkeypatch.setattr(protocol, "run_stage", run)
    monkeypatch.setattr(protocol.MemoryReport, "from_json", Ahead)
    with pytest.raises(StageError) as raised:
        confirm(increment, 8, target="h200")
    assert str(raised.value).startswith(says)
    assert "RESOURCE_EXHAUSTED" in str(raised.value)


class TestProcesses:
    """Real ones; JAX_PLATFORMS=cpu hides a GPU from them."""

    @pytest.fixture(autouse=True)
    def module(self, tmp_path, monkeypatch):
        (tmp_path / "elsewhere.py").write_text(
            "import jax, jmem\n"
            "def build(length):\n"
            "    x = jax.ShapeDtypeStruct((length,), 'f4')\n"
            "    return jmem.Program(lambda x: x + 1, (x,))\n"
            "def add(first, second):\n"
            "    return {'sum': first + second}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        import elsewhere  # pyright: ignore[reportMissingImports]

        return elsewhere

    def test_without_a_gpu_a_stage_says_so(self, module):
        with pytest.raises(NoGPUError, match="no GPU is attached"):
            confirm(module.build, 8, target="h200")

    def test_a_function_is_called_in_another_process(self, module):
        told = make_environment("predict", "")
        assert protocol.call(module.add, 1, 2, environment=told) == {"sum": 3}
        with pytest.raises(StageError, match=r"elsewhere:add of 1 x failed:"):
            protocol.call(module.add, 1, "x", environment=told)

    def test_a_stage_that_fails_is_named_with_its_last_lines(self):
        with pytest.raises(StageError) as raised:
            run_stage(protocol.predict, "elsewhere:build", ("long",), "h200")
        text = str(raised.value)
        assert text.startswith("stage 'predict' of elsewhere:build long failed:")
        assert "TypeError" in text


def test_each_stage_has_the_environment_it_needs(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    told = make_environment("run", "/cache")
    assert told["XLA_CLIENT_MEM_FRACTION"] == "0.95"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in told  # both are an error in JAX
    assert told["JAX_COMPILATION_CACHE_DIR"] == "/cache"
    told = make_environment("predict", "h200")
    assert told["JAX_PLATFORMS"] == "cpu"
    assert "JAX_COMPILATION_CACHE_DIR" not in told  # it holds what was tuned on a GPU
