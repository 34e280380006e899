"""The report of a check that only a GPU can make: one JSON file, as rows come.

    {"experiment", "status", "started", "device", "versions", "config", and its parts}

`python -m experiments.claims --from-run FILE` takes it up when it is complete.
"""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from experiments.harness.run import write_atomically


def write(
    path: pathlib.Path,
    experiment: str,
    probed: Mapping[str, Any],
    config: Mapping[str, Any],
    complete: bool,
    **parts: Any,
) -> None:
    """Writes the whole report anew; its folder is made.

    Args:
      path: the file.
      experiment: module of `experiments` that measured.
      probed: `jmem.memory.protocol.probe()`: the device, and versions.
      config: the module's `settings()`, or what this run had in their place.
      complete: whether all was measured that was asked for.
      **parts: what was found, by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "experiment": experiment,
        "status": "complete" if complete else "running",
        "started": time.strftime("%Y-%m-%d"),
        **probed,
        "config": config,
    }
    write_atomically(path, json.dumps(head | parts, indent=1) + "\n")
