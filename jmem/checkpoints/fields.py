"""Fields of a description from outside (config.json, GGUF metadata), range-checked."""

import contextlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from jmem.checkpoints.files import CheckpointError

_SIZE_LIMIT = 2**31 - 1
"""JAX's longest axis in its default 32-bit mode."""


@dataclass(frozen=True)
class Fields:
    """The fields of one description; each reader raises CheckpointError if it cannot.

    `default` is what an absent field, or null, stands for. A field that has none must
    be there.
    """

    raw: Mapping[str, Any]
    where: str
    """The file, or the function called: error messages begin with it."""
    prefix: str = ""
    """What all names begin with, in `raw` and in messages ("llama.")."""

    def get(self, field: str, default: Any = None) -> Any:
        """The field as it is; `default` if absent, but not if null."""
        return self.raw.get(self.prefix + field, default)

    def _stated(self, field: str, default: Any) -> Any:
        value = self.get(field)
        return default if value is None else value

    def size(self, field: str, default: int | None = None) -> int:
        """The field as a positive integer."""
        value = self._stated(field, default)
        if type(value) is not int or not 1 <= value <= _SIZE_LIMIT:
            raise self.make_error(field, value, f"an integer of 1 to {_SIZE_LIMIT}")
        return value

    def number(
        self, field: str, default: float | None = None, *, or_zero: bool = False
    ) -> float:
        """The field as a positive float32 number, or zero."""
        value, limit = self._stated(field, default), float(np.finfo(np.float32).max)
        if _is_number(value) and (0 < value <= limit or (or_zero and value == 0)):
            return float(value)
        rule = "a finite number from 0" if or_zero else "a positive finite number"
        raise self.make_error(field, value, rule)

    def probability(self, field: str, default: float | None = None) -> float:
        """The field as a number from 0 to below 1."""
        value = self._stated(field, default)
        if _is_number(value) and 0 <= value < 1:
            return float(value)
        raise self.make_error(field, value, "a probability below 1")

    def flag(self, field: str, default: bool = False) -> bool:
        """The field as true or false."""
        value = self._stated(field, default)
        if type(value) is not bool:
            raise self.make_error(field, value, "true or false")
        return value

    def check_neutral(self, table: Mapping[str, tuple]) -> None:
        """Refuses a field of `table` that holds none of its harmless values there.

        An absent field holds the first of them.
        """
        for field, allowed in table.items():
            if (value := self.get(field, allowed[0])) not in allowed:
                raise self.make_error(field, value, repr(allowed[0]))

    def check_no_more(self, understood: Container[str], supported: str) -> None:
        """Refuses fields unknown here, unless they are empty (null, false, [] ...)."""
        for field in sorted(self.raw):
            if field not in understood and not is_empty(self.raw[field]):
                raise self.make_error(field, self.raw[field], supported)

    def make_error(self, field: str, value: Any, supported: str) -> CheckpointError:
        """The error that names file, field, value and rule."""
        given = "is missing" if value is None else f"is {value!r:.200}"
        where = f"{self.where}: {self.prefix}{field}"
        return CheckpointError(f"{where} {given}; supported: {supported}.")

    @contextlib.contextmanager
    def name_errors(self) -> Iterator[None]:
        """Raises every ValueError as a CheckpointError that begins with `where`.

        For values that are fields well, but that their own class refuses.
        """
        try:
            yield
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{self.where}: {error}") from error


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_empty(value: Any) -> bool:
    """Whether a field with this value says no more than an absent field."""
    # Not `not value`: layers_to_transform=0 is a layer.
    return value is None or value is False or value in ([], {}, "")
