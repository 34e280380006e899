"""Metrics of a run: JSON lines, one row a step, flushed as they are written."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jmem.train.folder import FolderError

Row = dict[str, Any]

NAME = "metrics.jsonl"
"""File name inside a method's folder."""


class MetricsError(ValueError):
    """A metrics file that is not what this module writes."""


def read(path: str | os.PathLike) -> list[Row]:
    """Rows of a metrics file, or of the one inside a folder.

    Training rows hold `step, loss, lr, grad_norm, active, ...` as far as the method
    reports them; evaluation rows hold `step, held_out_loss`. `step` counts the updates
    done. A last line without its newline (the process was killed in the middle of a
    write) is left out.

    Raises:
      MetricsError: a complete line is not a JSON object with an integer `step`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / NAME
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except ValueError as error:
                raise MetricsError(f"{path}:{number}: not JSON: {error}.") from None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise MetricsError(
                    f"{path}:{number}: a row must be an object with an integer 'step'."
                )
            rows.append(row)
    return rows


class MetricsFile:
    """Appends rows to `folder/metrics.jsonl`, after dropping those past `step`."""

    def __init__(self, folder: pathlib.Path, *, step: int = 0):
        self.path = folder / NAME
        kept = [r for r in read(folder) if r["step"] <= step] if step else []
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(map(_write_line, kept)))
        os.replace(partial, self.path)
        self._file = self.path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row, unbuffered: it outlives this process, however that ends.

        Raises:
          FolderError: the disk is full, or gone.
        """
        try:
            self._file.write(_write_line(row).encode())
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


def _write_line(row: Mapping[str, Any]) -> str:
    return (
        json.dumps({name: _replace_non_finite(value) for name, value in row.items()})
        + "\n"
    )


def _replace_non_finite(value: Any) -> Any:
    """JSON knows no NaN: what is not finite is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
