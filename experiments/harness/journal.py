"""Comparisons in parts: progress is printed, and results are kept on the disk."""

import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.harness.run import Run
from jmem.evaluate.compare import Part
from jmem.train.progress import format_time


class Journal:
    """Results by name in `results.jsonl`: a stopped run goes on where it was."""

    def __init__(self, folder: pathlib.Path):
        path = folder / "results.jsonl"
        lines = path.read_bytes().splitlines(True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # the last may be torn
        self._known = dict(map(json.loads, whole))
        path.write_bytes(b"".join(whole))
        self._path = path

    def __call__(
        self, name: str, make: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, list]:
        """What is known under a name; made now, and kept, if nothing is."""
        if name not in self._known:
            values = {key: value.tolist() for key, value in make().items()}
            with self._path.open("ab") as file:
                file.write(json.dumps([name, values]).encode() + b"\n")
            self._known[name] = values
        return self._known[name]


def keep(run: Run, parts: Sequence[Part]) -> Iterator[tuple[Part, Mapping[str, Any]]]:
    """Every part of a comparison with its scores; what the journal has is not asked.

    Which part it is, and how long is left, is printed before each: on a terminal as one
    line that changes, elsewhere as a line a part. Time is taken to grow with the number
    of tokens.
    """
    journal = Journal(run.folder)
    total = sum(part.prompts.tokens.size for part in parts)
    done, began = 0, time.monotonic()
    with run.console.status("") as status:
        for number, part in enumerate(parts, 1):
            words = f"{part.name.rpartition(' ')[0]}: {number} of {len(parts)}"
            if done:
                left = (time.monotonic() - began) * (total - done) / done
                words += f", {format_time(left)} left"
            if run.console.is_terminal:
                status.update(words)
            else:
                run.console.print(words, highlight=False)
            yield part, journal(part.name, part.scores)
            done += part.prompts.tokens.size
