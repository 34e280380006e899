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

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import jaxlib.version

from jmem.memory import worker
from jmem.memory.card import NoGPUError, attached, gpu
from jmem.memory.live import LiveReport, live, plan_sums, time_runs
from jmem.memory.measure import ATTACHED, measure
from jmem.memory.report import MemoryReport, sized
from jmem.program import Program

FRACTION = 0.95
"""Share of the GPU's memory that JAX takes when one of these processes starts."""
NO_GPU = 3
"""Exit status of a process that found no GPU."""


class StageError(RuntimeError):
    """One of the processes ("stages") failed: which, and the end of what it wrote."""


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
    request = {"builder": worker.dotted(builder), "arguments": arguments}
    with _folder(cache) as folder, futures.ThreadPoolExecutor(1) as beside:
        predicted = beside.submit(run_stage, "predict", request, target)
        try:
            planned = json.loads(run_stage("plan", request, folder, share))
            more = {"sums": planned["sums"], "runs": runs, "trace": trace}
            ran = run_stage("run", request | more, folder, share)
        except StageError as error:
            raise StageError(f"{_explain(predicted)}{error}") from error
        ahead = MemoryReport.from_json(predicted.result())
    plan = MemoryReport.from_json(planned["report"])
    return LiveReport.from_json(ran).compared(ahead, plan)


def _explain(prediction: futures.Future[str]) -> str:
    """A line on why a program failed, if it was predicted not to fit; else ""."""
    if prediction.exception() is None:
        ahead = MemoryReport.from_json(prediction.result())
        if not ahead.fits(0):
            return f"does not fit: {sized(ahead.interval[0])} are predicted\n"
    return ""


def call(function: Callable, *arguments: Any, environment: dict[str, str]) -> Any:
    """What a function returns in a process of its own; all of it as JSON can hold it.

    Raises:
      StageError: the process failed; the end of what it wrote.
    """
    name = worker.dotted(function)
    answer = ask(
        *("jmem.memory.protocol", "call"),
        request=[name, arguments],
        environment=environment,
        what=f"{name} of {' '.join(map(str, arguments))}",
    )
    return json.loads(answer)


def probe() -> dict[str, Any]:
    """`{"device": ..., "versions": {...}}` of the attached GPU, from another process.

    Raises:
      NoGPUError: there is none.
    """
    return json.loads(run_stage("probe", {}, ""))


# Stages: each runs in a process of its own and answers with one line of JSON ----------


def _predict(program: Program, request: dict) -> str:
    return measure(program, target=request["where"], cache=False).to_json()


def _plan(program: Program, request: dict) -> str:
    del request  # JAX knows its cache from its environment, and keeps the program there
    sums = plan_sums(program.compile())
    report = measure(program, target=ATTACHED).to_json()
    return json.dumps({"sums": sums, "report": report})


def _run(program: Program, request: dict) -> str:
    report = live(program, key=None, predict=False, sums=request["sums"])
    if runs := request["runs"]:
        seconds = time_runs(program, runs, request["trace"])
        report = dataclasses.replace(report, seconds=seconds)
    return report.to_json()


STAGES: dict[str, Callable[[Program, dict], str]] = {
    "predict": _predict,
    "plan": _plan,
    "run": _run,
}


def environment(stage: str, cache: str, share: float = 1.0) -> dict[str, str]:
    """Environment variables of a stage's process, which gets `share` of the GPU."""
    kept = {
        name: value
        for name, value in worker.environment().items()
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


def run_stage(stage: str, request: dict, where: str, share: float = 1.0) -> str:
    """Runs a stage in a fresh process that gets `share` of the GPU; returns its answer.

    `where` is the target of "predict", and the folder of JAX's cache for the others.

    Raises:
      NoGPUError: it needs a GPU and found none.
      StageError: the process failed; the end of what it wrote is the message.
    """
    asked = [request.get("builder", ""), *request.get("arguments", ())]
    said = " ".join(map(str, asked))
    return ask(
        "jmem.memory.protocol",
        request=request | {"stage": stage, "where": where},
        environment=environment(stage, where, share),
        what=f"stage {stage!r} of {said}",
    )


def ask(
    module: str, *flags: str, request: Any, environment: dict[str, str], what: str
) -> str:
    """Starts `module` as a process with a request on stdin; returns its last line.

    Raises:
      NoGPUError: it ended with `NO_GPU`.
      StageError: it failed: `what`, and the end of what it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *flags],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        timeout=worker.TIMEOUT_S,
    )
    if done.returncode == NO_GPU:
        raise NoGPUError(done.stdout.strip())
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise StageError(f"{what} failed:\n{tail}")
    return done.stdout.splitlines()[-1]


def answer(request: dict) -> str:
    """Runs the stage that a request names, in this process; returns JSON."""
    if request["stage"] == "probe":
        versions = {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
        return json.dumps({"device": attached().name, "versions": versions})
    if request["stage"] != "predict":
        gpu()  # before anything is built
    program = worker.imported(request["builder"])(*request["arguments"])
    return STAGES[request["stage"]](program, request)


def main() -> int:
    """Answers the request on stdin; exit status `NO_GPU` where there is none."""
    request = json.load(sys.stdin)
    try:
        if sys.argv[1:] == ["call"]:
            function, arguments = request
            print(json.dumps(worker.imported(function)(*arguments)))
        else:
            print(answer(request))
    except NoGPUError as error:
        print(error)
        return NO_GPU
    return 0


@contextlib.contextmanager
def _folder(path: str | None) -> Iterator[str]:
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="jmem-protocol-") as folder:
        yield folder


if __name__ == "__main__":
    sys.exit(main())
