"""Fields of a description from outside (config.json, GGUF metadata), range-checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jmem.checkpoints.files import CheckpointError

_SIZE_LIMIT = 2**31 - 1
"""JAX's longest axis in its default 32-bit mode."""


def size(
    raw: Mapping[str, Any], field: str, where: str, default: int | None = None
) -> int:
    """A positive integer; `default` if absent or null.

    Raises:
      CheckpointError: absent without a default, or anything else.
    """
    value = default if raw.get(field) is None else raw[field]
    if type(value) is not int or not 1 <= value <= _SIZE_LIMIT:
        raise unsupported(where, field, value, f"an integer of 1 to {_SIZE_LIMIT}")
    return value


def number(
    raw: Mapping[str, Any], field: str, where: str, default: float | None = None
) -> float:
    """A positive number that float32 can hold; `default` if absent or null.

    Raises:
      CheckpointError: absent without a default, or anything else.
    """
    value = default if raw.get(field) is None else raw[field]
    limit = float(np.finfo(np.float32).max)
    if isinstance(value, int | float) and value is not True and 0 < value <= limit:
        return float(value)
    raise unsupported(where, field, value, "a positive finite number")


def flag(raw: Mapping[str, Any], field: str, where: str) -> bool:
    """True or false; false if absent or null.

    Raises:
      CheckpointError: anything else.
    """
    value = raw.get(field)
    if not isinstance(value, bool | None):
        raise unsupported(where, field, value, "true or false")
    return bool(value)


def neutral(
    raw: Mapping[str, Any], table: Mapping[str, tuple], where: str, prefix: str = ""
) -> None:
    """Passes if every field of `table` is absent or holds one of its values.

    Raises:
      CheckpointError: a field holds anything else.
    """
    for field, allowed in table.items():
        value = raw.get(prefix + field, allowed[0])
        if value not in allowed:
            raise unsupported(where, prefix + field, value, repr(allowed[0]))


def unsupported(where: str, field: str, value: Any, supported: str) -> CheckpointError:
    """The error that names file, field, value and rule."""
    given = "is missing" if value is None else f"is {value!r:.200}"
    return CheckpointError(f"{where}: {field} {given}; supported: {supported}.")
