"""Work in parts: told while it goes on, and kept so that a stopped run goes on."""

import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from experiments.harness.run import Run
from jmem.train.progress import clock


class Journal:
    """Results by name in `results.jsonl`: a stopped run goes on where it was."""

    def __init__(self, folder: pathlib.Path, *, resume: bool):
        path = folder / "results.jsonl"
        lines = path.read_bytes().splitlines(True) if resume and path.exists() else []
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


def told[Part](
    run: Run,
    parts: Sequence[Part],
    *,
    name: Callable[[Part], str],
    size: Callable[[Part], int],
) -> Iterator[Part]:
    """The parts, one by one, while it is told which it is and how long is left.

    Time goes with `size`, as the number of tokens.
    """
    total = sum(map(size, parts))
    done, began = 0, time.monotonic()
    with run.console.status("") as status:
        for number, part in enumerate(parts, 1):
            words = f"{name(part)}: {number} of {len(parts)}"
            if done:
                left = (time.monotonic() - began) * (total - done) / done
                words += f", {clock(left)} left"
            if run.console.is_terminal:
                status.update(words)
            else:
                run.console.print(words, highlight=False)
            yield part
            done += size(part)
