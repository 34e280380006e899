"""Methods at their best of several learning rates, over several seeds.

    factors of a method's own rate, first seed    ->  the one of the least loss
    that one, all other seeds                     ->  mean and spread

The rate is chosen by one held-out loss and judged by another, of other text. Every
single run leaves `done.json` in a folder of its own, so that a sweep of hours that was
stopped goes on where it was, on this machine or on another; of a finished run only its
losses and its metrics stay, and what it tuned (`experiments.harness.exports`) of the
first seed at the best rate. A rate that diverges is not chosen.
"""

import dataclasses
import gc
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from experiments.harness.report import Column, loss, make_columns
from experiments.harness.run import Run, name_device
from jmem.disk import DamagedError, open_sealed, seal, write_atomically
from jmem.train.loop import DivergedError


@dataclasses.dataclass(frozen=True)
class Trial[Method: str]:
    """One run: a method, a factor of its learning rate, a seed."""

    method: Method
    factor: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-x{self.factor:g}-seed{self.seed}"


def parse_trial(name: str) -> Trial[str] | None:
    """The trial of this name; None if it is no trial's.

    >>> parse_trial("lora-x0.3-seed1")
    Trial(method='lora', factor=0.3, seed=1)
    """
    found = re.fullmatch(r"(\w+)-x([\d.e+-]+)-seed(\d+)", name)
    return Trial(found[1], float(found[2]), int(found[3])) if found else None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A method at its best rate."""

    factor: float
    edge: bool
    """The best factor is the least or the greatest tried: one beyond may be better."""
    losses: tuple[float, ...]
    """One a seed, of other text than the rate was chosen by."""
    more: tuple[dict[str, Any], ...]
    """All that `train` returned, one a seed."""
    places: frozenset[str]
    """Devices that it was trained on, at any rate, and the versions of JAX."""
    first: str
    """Name of the trial of the first seed."""

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)


def say_where(outcomes: Iterable[Outcome]) -> str:
    """A sentence: where the trials were trained."""
    places = frozenset().union(*(own.places for own in outcomes))
    return f"Trained on {' and '.join(sorted(places))}."


def search[Method: str](
    run: Run,
    methods: Iterable[Method],
    factors: tuple[float, ...],
    seeds: tuple[int, ...],
    train: Callable[[Trial[Method], pathlib.Path], dict[str, Any]],
) -> dict[Method, Outcome]:
    """Trains every method at every rate, and at its best one with every seed.

    `train(trial, folder)` gives {"choose": loss, "loss": loss} and what else JSON can
    hold, and continues what it finds in the folder. Its checkpoints are removed once it
    is done. `done.json` also holds the device and the version of JAX.

    Raises:
      DivergedError: a method diverges at every rate, or with another seed at its best.
      DamagedError: a `done.json` is not what was written.
    """

    def result(trial: Trial[Method]) -> dict[str, Any]:
        folder = run.folder_of(trial.name)
        done = folder / "done.json"
        if not done.exists():
            try:
                found = train(trial, folder)
                if not all(math.isfinite(found.get(name, 0)) for name in _LOSSES):
                    raise DivergedError(f"its held-out losses are {found}")
            except DivergedError as error:
                found = {"diverged": str(error)}
            found |= {"device": name_device(), "jax": jax.__version__}
            write_atomically(done, seal(found, indent=1) + "\n")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            gc.collect()
        return _read_done(done)

    outcomes = {}
    for method in methods:
        tried = {f: result(Trial(method, f, seeds[0])) for f in factors}
        able = [f for f in factors if "diverged" not in tried[f]]
        if not able:
            raise DivergedError(
                f"{method}, at every rate: {next(iter(tried.values()))['diverged']}"
            )
        best = min(able, key=lambda factor: tried[factor]["choose"])
        first = {f: Trial(method, f, seeds[0]).name for f in factors}
        if run.exports is not None:
            run.exports.choose(method, first[best], first.values())
        found = [result(Trial(method, best, seed)) for seed in seeds]
        for seed, one in zip(seeds, found):
            if "diverged" in one:
                raise DivergedError(f"{method}, seed {seed}: {one['diverged']}")
        outcomes[method] = Outcome(
            best,
            len(factors) > 1 and best in (min(factors), max(factors)),
            tuple(one["loss"] for one in found),
            tuple(found),
            frozenset(map(_name_place, (*tried.values(), *found))),
            first[best],
        )
    return outcomes


def tabulate[Method: str](
    run: Run,
    title: str,
    outcomes: Mapping[Method, Outcome],
    columns: Sequence[str | Column],
    cells: Callable[[Method, Outcome], Sequence[Any]],
    *,
    name: str = "loss",
    before: float | None = None,
) -> None:
    """A table of every method's losses at its best rate, over the seeds.

    Args:
      run: where it goes.
      title: of the table.
      outcomes: of `search`.
      columns: heads of further columns, before the losses.
      cells: its values in a method's row.
      name: of the mean loss.
      before: loss of what all started from; with it there is a column of the gain.
    """

    def line(method: Method, own: Outcome) -> tuple[Any, ...]:
        return (
            *(method, *cells(method, own)),
            *(own.mean, min(own.losses), max(own.losses)),
            *(() if before is None else (before - own.mean,)),
            *(len(own.losses), "at the edge" if own.edge else ""),
        )

    gain = () if before is None else ("gain",)
    losses = make_columns(loss, name, "least", "most", *gain)
    heads = ["method", *columns, *losses, "seeds", "of the rates"]
    run.table(title, heads, [line(*pair) for pair in outcomes.items()])


_LOSSES = ("choose", "loss")


def _read_done(path: pathlib.Path) -> dict[str, Any]:
    """What a trial found, or how it diverged."""
    found = open_sealed(path.read_bytes(), str(path))
    if "diverged" not in found:
        for name in _LOSSES:
            value = found.get(name)
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise DamagedError(
                    f"{path}: {name}={value!r} is no loss. Remove the file, and the "
                    "trial is trained again."
                )
    return found


def _name_place(done: dict[str, Any]) -> str:
    """In words, what a trial was trained on, from its `done.json`."""
    if "device" not in done:  # of a version that did not write it
        return "a device that was not noted"
    return f"{done['device']} with JAX {done.get('jax')}"
