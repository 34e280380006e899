"""Refusals that the settings of policies and of filters share."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin


def check_settings(
    settings: Any,
    *,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    odd: Sequence[str] = (),
) -> None:
    """Refuses fields out of range, and values that a field's `Literal` does not list.

    `settings` is a dataclass, and the others name fields of it that hold whole numbers.

    Raises:
      ValueError: names the class, the field, its value and the rule.
    """
    for field in dataclasses.fields(settings):
        name, value, allowed = field.name, getattr(settings, field.name), ()
        if get_origin(field.type) is Literal:
            allowed = get_args(field.type)
        if name in positive and value < 1:
            rule = "must be at least 1."
        elif name in not_negative and value < 0:
            rule = "must not be negative."
        elif name in odd and (value < 1 or value % 2 == 0):
            rule = "must be odd, so that a token lies in the middle of its neighbours."
        elif allowed and value not in allowed:
            rule = f"is not one of {', '.join(allowed)}."
        else:
            continue
        raise ValueError(f"{type(settings).__name__}: {name}={value!r} {rule}")
