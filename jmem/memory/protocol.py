"""Prediction, plan and peak of a program, each from a process of its own.

The allocator's peak cannot be reset and autotuning raises it, so one process compiles,
which fills a cache of JAX, and another finds the program there and runs it. Beside
them a third predicts, without the GPU and without the cache.

    def build(layers: int) -> Program: ...                     # in a module, by name

    report = jmem.memory.confirm(build, 24, target="h200")
    print(report)

This process must not hold the GPU itself: JAX takes most of it as soon as it starts.
Set JAX_PLATFORMS=cpu, or use JAX only after.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jaxlib.version

from jmem.memory import worker
from jmem.memory.card import describe_attached, find_gpu
from jmem.memory.live import LiveReport, live, read_sums, time_runs
from jmem.memory.measure import ATTACHED, measure
from jmem.memory.report import MemoryReport, format_size
from jmem.memory.worker import StageError, call
from jmem.program import Program

__all__ = ["StageError", "call", "confirm", "make_environment", "probe"]

FRACTION = 0.95
"""Share of the GPU's memory that JAX takes when one of these processes starts."""


def confirm(
    builder: Callable[..., Program],
    *arguments: Any,
    target: str,
    cache: str | None = None,
    share: float = 1.0,
    runs: int = 0,
    trace: str | None = None,
) -> LiveReport:
    """Predicts a program for `target`, plans it on the attached GPU, and runs it once.

    Args:
      builder: returns the program; a function that can be imported by name.
      *arguments: the builder's arguments, as JSON can hold them.
      target: the described GPU that the attached one is.
      cache: folder of JAX's compilation cache; by default one that goes afterwards.
      share: of the GPU's memory, what this program may take, where others are confirmed
        beside it.
      runs: further runs that are timed (`jmem.memory.live.time_runs`).
      trace: folder of a profile of two more.

    Raises:
      NoGPUError: there is no GPU.
      StageError: a stage failed; where the program is too large for the GPU, that is
        said first.
    """
    build = worker.write_name(builder), arguments
    own = tempfile.TemporaryDirectory(prefix="jmem-protocol-")
    with own as empty, futures.ThreadPoolExecutor(1) as beside:
        folder = empty if cache is None else cache
        predicted = beside.submit(run_stage, predict, *build, target)
        try:
            planned = run_stage(plan_attached, *build, cache=folder, share=share)
            given = *build, planned["sums"], runs, trace
            ran = run_stage(run, *given, cache=folder, share=share)
        except StageError as error:
            raise StageError(f"{_explain(predicted)}{error}") from error
        ahead = MemoryReport.from_json(predicted.result())
    report = MemoryReport.from_json(planned["report"])
    return LiveReport.from_json(ran).add_prediction(ahead, report)


def _explain(prediction: futures.Future[str]) -> str:
    """A line on why a program failed, if it was predicted not to fit; else ""."""
    if prediction.exception() is None:
        ahead = MemoryReport.from_json(prediction.result())
        if not ahead.fits(0):
            return f"does not fit: {format_size(ahead.interval[0])} are predicted\n"
    return ""


def probe() -> dict[str, Any]:
    """`{"device": ..., "versions": {...}}` of the attached GPU, from another process.

    Raises:
      NoGPUError: there is none.
    """
    return call(describe, environment=make_environment("probe", ""))


def describe() -> dict[str, Any]:
    """What `probe` returns, of the GPU that this process holds."""
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
    return {"device": describe_attached().name, "versions": versions}


# Stages: each in a process of its own, given the builder's name and arguments ---------


def predict(builder: str, arguments: list, target: str) -> str:
    """The report for a described GPU, as JSON."""
    program = worker.import_name(builder)(*arguments)
    return measure(program, target=target, cache=False).to_json()


def plan_attached(builder: str, arguments: list) -> dict[str, Any]:
    """XLA's sums of the program that JAX's cache now holds, and its report, as JSON."""
    find_gpu()  # before anything is built
    program = worker.import_name(builder)(*arguments)
    sums = read_sums(program.compile())
    return {"sums": sums, "report": measure(program, target=ATTACHED).to_json()}


def run(
    builder: str, arguments: list, sums: dict[str, int], runs: int, trace: str | None
) -> str:
    """The report of a run, as JSON; of `runs` more, if any, their seconds besides."""
    find_gpu()
    program = worker.import_name(builder)(*arguments)
    report = live(program, key=None, predict=False, sums=sums)
    if runs:
        seconds = time_runs(program, runs, trace)
        report = dataclasses.replace(report, seconds=seconds)
    return report.to_json()


def run_stage(
    stage: Callable,
    builder: str,
    arguments: tuple,
    *more: Any,
    cache: str = "",
    share: float = 1.0,
) -> Any:
    """What a stage returns in a fresh process that gets `share` of the GPU.

    `cache` is the folder of JAX's compilation cache.

    Raises:
      NoGPUError: it needs a GPU and found none.
      StageError: the process failed; the end of what it wrote is the message.
    """
    name = stage.__name__
    said = " ".join(map(str, (builder, *arguments)))
    given, told = [builder, arguments, *more], make_environment(name, cache, share)
    return worker.ask(stage, given, told, f"stage {name!r} of {said}")


def make_environment(stage: str, cache: str, share: float = 1.0) -> dict[str, str]:
    """Environment variables of a stage's process, which gets `share` of the GPU."""
    kept = {
        name: value
        for name, value in worker.make_environment().items()
        # Two spellings of one setting are an error in JAX.
        if name not in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR")
    }
    if stage == "predict":
        return kept | {"JAX_PLATFORMS": "cpu"}
    kept |= {
        "XLA_CLIENT_MEM_FRACTION": f"{FRACTION * share:.4g}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false" if stage == "probe" else "true",
    }
    if stage == "probe":
        return kept
    return kept | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
