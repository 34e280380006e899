"""Metrics of a run: JSON lines, one row a step, flushed as they are written."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jmem import disk
from jmem.train.folder import FolderError, Hold

Row = dict[str, Any]

NAME = "metrics.jsonl"
"""File name inside a method's folder."""
NUMBERS = ("loss", "grad_norm", "held_out_loss", "seconds")
"""Columns that hold one number; null is one that was not finite."""


class MetricsError(ValueError):
    """A metrics file that is not what this module writes."""


def read(path: str | os.PathLike) -> list[Row]:
    """Rows of a metrics file, or of the one inside a folder.

    Training rows hold `step, loss, lr, grad_norm, active, ...` as far as the method
    reports them; evaluation rows hold `step, held_out_loss`. `step` counts the updates
    done. A last line without its newline (the process was killed in the middle of a
    write) is left out.

    Raises:
      MetricsError: a complete line is no row: an object with an integer `step`, not
        below that of the row before, whose losses are numbers; says which line.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / NAME
    rows, last = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            rows.append(_read_row(line, f"{path}:{number}", last))
            last = rows[-1]["step"]
    return rows


def _read_row(line: bytes, where: str, last: int) -> Row:
    """The row of a line, which may not be of a step below `last`."""
    try:
        row = disk.parse_json(line, where)
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise disk.DamagedError(
                f"{where}: a row must be an object with an integer 'step'."
            )
        if row["step"] < last:
            raise disk.DamagedError(f"{where}: step={row['step']} follows step={last}.")
        for name in NUMBERS:
            if not isinstance(row.get(name), int | float | None):
                raise disk.DamagedError(f"{where}: {name}={row[name]!r} is no number.")
    except disk.DamagedError as error:
        raise MetricsError(f"{error}\nTake the line out: a run does without.") from None
    return row


class MetricsFile:
    """Appends rows to `folder/metrics.jsonl`, after dropping those past `step`.

    Raises:
      FolderError: another process holds the folder; nothing was touched.
      MetricsError: a row that is there is damaged.
    """

    def __init__(self, folder: pathlib.Path, *, step: int = 0):
        self.path = folder / NAME
        self._hold = Hold(folder)
        try:
            self._drop_rows(step)
            self._file = self.path.open("ab", buffering=0)
        except BaseException:
            self._hold.release()
            raise

    def _drop_rows(self, step: int) -> None:
        """Leaves the rows up to `step` and no torn line; does nothing if that is so."""
        there = self.path.read_bytes() if self.path.exists() else b""
        rows = read(self.path) if step and there else []
        lines = there.splitlines(True)[: sum(row["step"] <= step for row in rows)]
        if (kept := b"".join(lines)) != there:
            disk.write_atomically(self.path, kept)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row, unbuffered: it outlives this process, however that ends.

        Raises:
          FolderError: the disk is full, or gone.
        """
        try:
            disk.append(self._file, _write_line(row).encode())
        except OSError as error:
            raise FolderError(
                f"{self.path}: the row of step {row['step']} could not be written: "
                f"{error.strerror}.\nMake room, and resume from the last checkpoint."
            ) from error

    def sync(self) -> None:
        """Wait until the rows are on the disk itself, to outlive a power cut too."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._hold.release()


def _write_line(row: Mapping[str, Any]) -> str:
    return (
        json.dumps({name: _replace_non_finite(value) for name, value in row.items()})
        + "\n"
    )


def _replace_non_finite(value: Any) -> Any:
    """JSON knows no NaN: what is not finite is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
