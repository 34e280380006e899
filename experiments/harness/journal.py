"""Comparisons in parts: progress is printed, and results are kept on the disk."""

import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.harness.run import Run
from jmem import disk
from jmem.evaluate.compare import Part
from jmem.train.folder import FolderError, Hold
from jmem.train.progress import format_time


class Journal:
    """Results by name in `results.jsonl`: a stopped run goes on where it was.

    A line is [name, {key: values}, digest of both]; older ones have no digest.

    Args:
      folder: of the run; it is this process's while the journal is there.
      resume: go on with the results that are there; else there must be none.

    Raises:
      DamagedError: a line is no result, or not the one that was written; says which.
      FolderError: another process holds the folder, or it holds results that are not
        to be gone on with.
    """

    def __init__(self, folder: pathlib.Path, *, resume: bool = True):
        self._hold = Hold(folder)
        self._path = folder / "results.jsonl"
        raw = self._path.read_bytes() if self._path.exists() else b""
        if raw and not resume:
            raise FolderError(
                f"{self._path}: results are there already.\n"
                "Resume the run, or choose another folder."
            )
        *whole, torn = raw.split(b"\n")
        self._known = dict(
            _read_line(line, f"{self._path}:{number}")
            for number, line in enumerate(whole, 1)
        )
        if torn:  # by a process that was killed
            os.truncate(self._path, len(raw) - len(torn))

    def __call__(
        self, name: str, make: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, list]:
        """What is known under a name; made now, and kept, if nothing is.

        Raises:
          FolderError: the disk is full, or gone; the results before are on it.
        """
        if name not in self._known:
            values = {key: value.tolist() for key, value in make().items()}
            line = [name, values, disk.compute_digest([name, values])]
            try:
                with self._path.open("ab", buffering=0) as file:
                    disk.append(file, json.dumps(line).encode() + b"\n")
                    os.fsync(file.fileno())
            except OSError as error:
                raise FolderError(
                    f"{self._path}: the result of {name!r} could not be written: "
                    f"{error.strerror}.\nMake room, and resume the run."
                ) from error
            self._known[name] = values
        return self._known[name]


def _read_line(line: bytes, where: str) -> tuple[str, dict[str, list]]:
    """The name and the values of a journal's line."""
    try:
        match disk.parse_json(line, where):
            case [str() as name, dict() as values, *told] if all(
                isinstance(value, list | float | int) for value in values.values()
            ):
                if told in ([], [disk.compute_digest([name, values])]):
                    return name, values
                raise disk.DamagedError(
                    f"{where}: the result of {name!r} is not the one that was written."
                )
        raise disk.DamagedError(f"{where}: not [name, {{key: values}}, digest].")
    except disk.DamagedError as error:
        raise disk.DamagedError(
            f"{error}\nTake the line out, and what it held is made again."
        ) from None


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
