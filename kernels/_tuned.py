"""Tables of measured tiles: `tuned.toml` in a kernel's folder, written by its bench.

An entry is one best tile, with what it was measured on and how fast it was:

    [[tile]]
    device = "NVIDIA H200"
    key = { batch = 1, head_dim = 128, tokens = 32768, window = 32 }
    tile = { keys = 64, stages = 4, swizzle = 128 }
    ms = ...

Devices of one compute capability stand in for each other.
"""

import json
import pathlib
import tomllib
from typing import Any

from jmem.disk import write_atomically

CAPABILITY = {
    "NVIDIA H200": "9.0",
    "NVIDIA H100 80GB HBM3": "9.0",
}
"""Of the devices that kernels are tuned on, by the driver's name."""

HEADER = """\
# The best tile of each GPU and size, written by `python -m {bench}`.
# Without an entry the kernel takes its heuristic's tile.
"""


def bucket(number: int) -> int:
    """The next power of two; sizes of one bucket share a tile.

    >>> [bucket(n) for n in (1, 3, 32768, 33792)]
    [1, 4, 32768, 65536]
    """
    return 1 << max(number - 1, 0).bit_length()


def lookup(path: pathlib.Path, device: str, key: dict[str, Any]) -> dict[str, Any]:
    """The tile's fields measured for `key`: on `device`, else on one as capable.

    Empty where nothing was measured.
    """
    same = [entry for entry in read(path) if entry["key"] == key]
    for entry in same:
        if entry["device"] == device:
            return entry["tile"]
    mine = CAPABILITY.get(device)
    for entry in same:
        if mine is not None and CAPABILITY.get(entry["device"]) == mine:
            return entry["tile"]
    return {}


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of a table, in its order.

    Raises:
      ValueError: an entry lacks its device, key or tile; the file and entry are named.
    """
    entries = tomllib.loads(path.read_text()).get("tile", [])
    for number, entry in enumerate(entries):
        missing = [name for name in ("device", "key", "tile") if name not in entry]
        if missing:
            raise ValueError(f"{path}: tile {number} has no {missing[0]!r}.")
    return entries


def write(path: pathlib.Path, bench: str, entries: list[dict[str, Any]]) -> None:
    """Writes a table anew; an entry replaces those of its device and key before it."""
    newest = {(e["device"], json.dumps(e["key"], sort_keys=True)): e for e in entries}
    parts = [HEADER.format(bench=bench)]
    for entry in newest.values():
        lines = (f"{name} = {_toml(value)}" for name, value in entry.items())
        parts.append("\n".join(["[[tile]]", *lines]) + "\n")
    write_atomically(path, "\n".join(parts))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items())
        return f"{{ {inner} }}"
    return json.dumps(value)
