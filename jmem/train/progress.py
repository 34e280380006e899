"""How a run's progress is told: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Told after every step, and once at the end."""

    def update(self, step: int, loss: float, rate: float) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def choose(
    name: str,
    steps: int,
    *,
    start: int = 0,
    unit: str,
    silent: bool = False,
    stream: Any = None,
) -> Progress:
    """`Bar` when `stream` (standard output by default) is a terminal, else `Lines`.

    `unit` is the word for what a rate counts a second of.
    """
    if silent:
        return Silent()
    stream = sys.stdout if stream is None else stream
    kind = Bar if stream.isatty() else Lines
    return kind(name, steps, start=start, unit=unit, stream=stream)


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours from the first hour on.

    >>> clock(75.4), clock(3 * 3600 + 65)
    ('1:15', '3:01:05')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Rate:
    """Seconds left, from the mean time of the steps done since the first."""

    def __init__(self, steps: int, start: int, now: Callable[[], float]):
        self.steps, self.first, self.now = steps, start, now
        self.began = now()

    def left(self, step: int) -> float:
        done = max(step - self.first, 1)
        return (self.steps - step) * (self.now() - self.began) / done


class Lines:
    """A line for the first step, the last, and one every `every` seconds."""

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
        self._unit = unit
        self._rate = _Rate(steps, start, now)
        self._next = now()

    def update(self, step: int, loss: float, rate: float) -> None:
        now = self._rate.now()
        if now < self._next and step < self.steps:
            return
        self._next = now + self.every
        self.note(
            f"step {step}/{self.steps}  loss {loss:.4f}  "
            f"{rate:,.0f} {self._unit}/s  {clock(self._rate.left(step))} left"
        )

    def note(self, text: str) -> None:
        print(f"{self.name}  {text}", file=self.stream, flush=True)

    def close(self) -> None:
        self.stream.flush()


class Bar:
    """A rich progress bar with loss, rate and time left."""

    def __init__(
        self, name: str, steps: int, *, start: int = 0, unit: str, stream: Any
    ):
        from rich import console, progress

        self.name = name
        self._rate = _Rate(steps, start, time.monotonic)
        self._bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn(
                f"loss {{task.fields[loss]}}  {{task.fields[rate]}} {unit}/s  "
                "{task.fields[left]} left"
            ),
            console=console.Console(file=stream),
        )
        self._task: Any = self._bar.add_task(
            name, total=steps, completed=start, loss="-", rate="-", left="-:--"
        )
        self._bar.start()

    def update(self, step: int, loss: float, rate: float) -> None:
        self._bar.update(
            self._task,
            completed=step,
            loss=f"{loss:.4f}",
            rate=f"{rate:,.0f}",
            left=clock(self._rate.left(step)),
        )

    def note(self, text: str) -> None:
        self._bar.console.print(f"{self.name}  {text}", markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class Silent:
    """Says nothing."""

    def update(self, step: int, loss: float, rate: float) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...
