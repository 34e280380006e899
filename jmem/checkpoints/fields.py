"""Fields of a description from outside (config.json, GGUF metadata), range-checked."""

from collections.abc import Container, Mapping
from typing import Any, TypeGuard

import numpy as np

from jmem.checkpoints.files import CheckpointError

_SIZE_LIMIT = 2**31 - 1
"""JAX's longest axis in its default 32-bit mode."""


def size(
    raw: Mapping[str, Any], field: str, where: str, default: int | None = None
) -> int:
    """The field as a positive integer; `default` if absent or null.

    Raises:
      CheckpointError: absent without a default, or anything else.
    """
    value = default if raw.get(field) is None else raw[field]
    if type(value) is not int or not 1 <= value <= _SIZE_LIMIT:
        raise unsupported(where, field, value, f"an integer of 1 to {_SIZE_LIMIT}")
    return value


def number(
    raw: Mapping[str, Any],
    field: str,
    where: str,
    default: float | None = None,
    *,
    or_zero: bool = False,
) -> float:
    """The field as a positive float32 number, or zero; `default` if absent or null.

    Raises:
      CheckpointError: absent without a default, or anything else.
    """
    value = default if raw.get(field) is None else raw[field]
    limit = float(np.finfo(np.float32).max)
    if _is_number(value) and (0 < value <= limit or (or_zero and value == 0)):
        return float(value)
    rule = "a finite number from 0" if or_zero else "a positive finite number"
    raise unsupported(where, field, value, rule)


def probability(
    raw: Mapping[str, Any], field: str, where: str, default: float | None = None
) -> float:
    """The field as a number from 0 to below 1; `default` if absent or null.

    Raises:
      CheckpointError: absent without a default, or anything else.
    """
    value = default if raw.get(field) is None else raw[field]
    if _is_number(value) and 0 <= value < 1:
        return float(value)
    raise unsupported(where, field, value, "a probability below 1")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flag(raw: Mapping[str, Any], field: str, where: str) -> bool:
    """The field as true or false; false if absent or null.

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
    """Refuses a field of `table` that is there and holds none of its harmless values.

    Raises:
      CheckpointError: a field holds anything else.
    """
    for field, allowed in table.items():
        value = raw.get(prefix + field, allowed[0])
        if value not in allowed:
            raise unsupported(where, prefix + field, value, repr(allowed[0]))


def nothing_more(
    raw: Mapping[str, Any], understood: Container[str], where: str, supported: str
) -> None:
    """Refuses fields unknown here, unless they are empty (null, false, [] ...).

    Raises:
      CheckpointError: one holds something.
    """
    for field in sorted(raw):
        if field not in understood and not is_empty(raw[field]):
            raise unsupported(where, field, raw[field], supported)


def is_empty(value: Any) -> bool:
    """Whether a field with this value says no more than an absent field."""
    # Not `not value`: layers_to_transform=0 is a layer.
    return value is None or value is False or value in ([], {}, "")


def unsupported(where: str, field: str, value: Any, supported: str) -> CheckpointError:
    """The error that names file, field, value and rule."""
    given = "is missing" if value is None else f"is {value!r:.200}"
    return CheckpointError(f"{where}: {field} {given}; supported: {supported}.")
