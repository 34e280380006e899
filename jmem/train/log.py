"""What a run leaves while it goes on: rows, progress and a profiler's trace."""

import collections
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from jmem.models.contract import Batch
from jmem.train.checkpoint import Checkpoints
from jmem.train.errors import DivergedError
from jmem.train.metrics import MetricsFile
from jmem.train.progress import Progress

WARM_STEPS = 2
"""Steps that run before a trace begins."""
RATE_STEPS = 20
"""Steps that the printed rate is the mean of; a row has its own step's."""


class Log:
    """Rows and progress, one step behind the device."""

    def __init__(self, file: MetricsFile, lines: Progress, checkpoints: Checkpoints):
        self._file, self._lines, self._checkpoints = file, lines, checkpoints
        self._waiting: tuple[int, Mapping[str, jax.Array], Batch] | None = None
        self._recent = collections.deque(maxlen=RATE_STEPS)
        self._mark = time.perf_counter()

    def step(self, step: int, metrics: Mapping[str, jax.Array], batch: Batch) -> None:
        """Take this step's metrics, and write those of the step before it."""
        self.flush()
        self._waiting = (step, metrics, batch)

    def flush(self) -> None:
        """Wait for the step taken last, and write its row."""
        if self._waiting is None:
            return
        (step, metrics, batch), self._waiting = self._waiting, None
        values = {name: v.tolist() for name, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._check(step, values)
        named = {name: values.pop(name) for name in _FIRST if name in values}
        count = batch.count()
        times = {"seconds": seconds, f"{batch.unit}_per_second": count / seconds}
        self._file.write({"step": step, **named, **values, **times})
        self._recent.append((count, seconds))
        recent_count, recent_seconds = map(sum, zip(*self._recent))
        self._lines.update(step, named["loss"], recent_count / recent_seconds)

    def write_held_out(self, step: int, loss: float) -> None:
        """Write the held-out loss after `step` updates."""
        self._check(step, {"held_out_loss": loss})
        self._file.write({"step": step, "held_out_loss": loss})
        self._lines.note(f"step {step}  held-out loss {loss:.4f}")

    def restart_clock(self) -> None:
        """The next step's seconds count from now: evaluations are not its time."""
        self._mark = time.perf_counter()

    def _check(self, step: int, values: Mapping[str, Any]) -> None:
        for name in ("loss", "grad_norm", "held_out_loss"):
            if not math.isfinite(values.get(name, 0.0)):
                kept = self._checkpoints.list_steps()
                raise DivergedError.after(step, f"{name}={values[name]}", kept)


_FIRST = ("loss", "lr", "grad_norm", "active")
"""Order of the columns every method may report; others follow."""


class Trace:
    """A profiler trace of `steps` steps, after the first two where there are more."""

    def __init__(self, folder: pathlib.Path, start: int, stop: int, steps: int):
        first = max(min(start + WARM_STEPS, stop - steps), start)
        self._folder, self._steps = folder, range(first, min(first + steps, stop))
        self._running = False

    def start_before(self, step: int) -> None:
        """Start the profiler if `step`, about to run, is the first that is traced."""
        if self._steps and step == self._steps.start:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True

    def is_over(self, done: int) -> bool:
        """Whether the last step to be traced is the one just done."""
        return self._running and done == self._steps.stop

    def stop(self) -> None:
        """Stop the profiler, if it runs, and write the trace."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
