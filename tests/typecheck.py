"""The run-time type checker of the test suite: an int is a fine float (PEP 484)."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """`function`, whose annotations are checked at each call.

    Where they say nothing, it stays as it is: so most of the functions that another
    makes whenever it runs, which are thousands.
    """
    told = getattr(function, "__annotations__", {}).values()
    return function if all(kind is Any for kind in told) else _check(function)
