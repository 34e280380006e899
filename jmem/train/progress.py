"""How a run's progress is told: a live bar on a terminal, plain lines elsewhere.

What cannot be told, as nobody reads it any more, is not told, and the run goes on.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from jmem.terminal import Forgiving


class Progress:
    """What the loop tells how far it is. This one says nothing; the others do."""

    def update(self, step: int, loss: float, rate: float) -> None:
        """After a step: how many are done, its loss, and what is computed a second."""

    def note(self, text: str) -> None:
        """A line of text in between."""

    def close(self) -> None:
        """Once, at the end."""


def choose(
    name: str,
    steps: int,
    *,
    start: int = 0,
    unit: str = "tokens",
    silent: bool = False,
    stream: Any = None,
) -> Progress:
    """`Bar` when `stream` (standard output by default) is a terminal, else `Lines`.

    `unit` is the word for what a rate counts a second of. `silent` is neither.
    """
    if silent:
        return Progress()
    stream = Forgiving(sys.stdout if stream is None else stream)
    kind = Bar if stream.isatty() else Lines
    return kind(name, steps, start=start, unit=unit, stream=stream)


def format_time(seconds: float) -> str:
    """Seconds as text: minutes and seconds, with hours from the first hour on.

    >>> format_time(75.4), format_time(3 * 3600 + 65)
    ('1:15', '3:01:05')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Lines(Progress):
    """A line for the first step, the last, and one every `every` seconds.

    The time left is reckoned from the mean time of the steps done here.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        *,
        start: int = 0,
        unit: str,
        stream: Any,
        every: float = 10.0,
        now: Callable[[], float] = time.monotonic,
    ):
        self.name, self.steps, self.stream, self.every = name, steps, stream, every
        self._unit, self._first, self._now = unit, start, now
        self._began = self._next = now()

    def update(self, step: int, loss: float, rate: float) -> None:
        now = self._now()
        if now < self._next and step < self.steps:
            return
        self._next = now + self.every
        mean = (now - self._began) / max(step - self._first, 1)
        self.note(
            f"step {step}/{self.steps}  loss {loss:.4f}  "
            f"{rate:,.0f} {self._unit}/s  {format_time((self.steps - step) * mean)} "
            "left"
        )

    def note(self, text: str) -> None:
        print(f"{self.name}  {text}", file=self.stream, flush=True)

    def close(self) -> None:
        self.stream.flush()


class Bar(Progress):
    """A rich progress bar with loss, rate and time left."""

    def __init__(
        self, name: str, steps: int, *, start: int = 0, unit: str, stream: Any
    ):
        from rich import console, progress

        self.name = name
        self._bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn(
                f"loss {{task.fields[loss]}}  {{task.fields[rate]}} {unit}/s "
            ),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("left"),
            console=console.Console(file=stream),
        )
        self._task: Any = self._bar.add_task(
            name, total=steps, completed=start, loss="-", rate="-"
        )
        self._bar.start()

    def update(self, step: int, loss: float, rate: float) -> None:
        self._bar.update(
            self._task, completed=step, loss=f"{loss:.4f}", rate=f"{rate:,.0f}"
        )

    def note(self, text: str) -> None:
        self._bar.console.print(f"{self.name}  {text}", markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()
