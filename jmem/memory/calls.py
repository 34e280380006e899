"""A function with what it is called with, every array of it at a position of its own.

`jax.jit` is told by position what is donated and what is static. What a partial holds,
and what goes by name, is moved there.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Call:
    """A function that `jax.jit` can compile, and what it is called with."""

    fn: Callable
    args: tuple
    donate: tuple[int, ...]
    static: tuple[int, ...]
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Bound by a partial, and given to its function by name."""


def prepend(call: Call, fn: Callable, *args: Any) -> Call:
    """The call of `fn` with further arguments in front of the others."""
    donate, static = (
        tuple(n + len(args) for n in positions)
        for positions in (call.donate, call.static)
    )
    return Call(fn, (*args, *call.args), donate, static, call.keywords)


def bind(call: Call, keywords: Mapping[str, Any]) -> Call:
    """The call with keywords at their positions, as far as they have one."""
    keywords = {**keywords, **call.keywords}
    bound = inspect.signature(call.fn).bind_partial(*call.args, **keywords)
    return dataclasses.replace(call, args=bound.args, keywords=bound.kwargs)


def hold_static(call: Call, positions: Iterable[int]) -> Call:
    """The call with what is no array at these positions compiled in."""
    found = (
        n
        for n in positions
        if isinstance(call.args[n], Hashable) and not hold_descriptions(call.args[n])
    )
    return dataclasses.replace(call, static=(*call.static, *found))


def name_arrays(keywords: Mapping[str, Any]) -> list[str]:
    return [name for name, value in keywords.items() if hold_descriptions(value)]


def place(call: Call, names: list[str]) -> Call:
    """The call with these keywords as its last arguments, and the others bound."""
    if not call.keywords:
        return call
    fn, count = call.fn, len(call.args)
    bound = {n: value for n, value in call.keywords.items() if n not in names}

    @functools.wraps(fn)
    def placed(*args):
        return fn(*args[:count], **dict(zip(names, args[count:])), **bound)

    own = inspect.signature(fn).parameters.values()
    first = [
        p.name for p in own if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    first = (first + [f"argument_{n}" for n in range(len(first), count)])[:count]
    kind = inspect.Parameter.POSITIONAL_ONLY
    placed.__signature__ = inspect.Signature(  # pyright: ignore[reportAttributeAccessIssue]
        [inspect.Parameter(name, kind) for name in (*first, *names)]
    )
    args = (*call.args, *(call.keywords[name] for name in names))
    return Call(placed, args, call.donate, call.static)


def hold_descriptions(tree: Any) -> bool:
    return any(
        isinstance(leaf, jax.ShapeDtypeStruct | jax.Array | np.ndarray)
        for leaf in jax.tree.leaves(tree)
    )


def name_of(fn: Any) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
