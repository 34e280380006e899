"""Whether a state holds numbers: one small program that looks at each leaf in place."""

from typing import Any

import jax
import jax.numpy as jnp

from jmem.offload import fetch, fetch_row, is_on_host
from jmem.program import by_key


def find_not_finite(tree: Any) -> list[str]:
    """Key paths of the floating leaves that hold an infinity or NaN.

    Leaves are read where they are, those in host memory a row at a time; the result is
    a flag a leaf.
    """
    floating = {
        name: leaf
        for name, leaf in by_key(tree).items()
        if leaf.size and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    finite = jax.device_get(look([*floating.values()]))
    return [name for name, fine in zip(floating, finite) if not fine]


@jax.jit
def look(leaves: list[jax.Array]) -> list[jax.Array]:
    """A flag for each floating array: whether all of it is finite."""
    return [_is_finite(leaf) for leaf in leaves]


def _is_finite(leaf: jax.Array) -> jax.Array:
    if not is_on_host(leaf) or not leaf.ndim:
        return jnp.isfinite(fetch(leaf)).all()

    def row(number, fine):
        return fine & jnp.isfinite(fetch_row(leaf, number)).all()

    return jax.lax.fori_loop(0, leaf.shape[0], row, jnp.array(True))


def name_leaves(names: list[str]) -> str:
    """The first of some leaves, and how many more, as the subject of a sentence.

    >>> name_leaves(["params/head/kernel", "params/embed/table"])
    "leaf 'params/head/kernel' of the state (and 1 more)"
    """
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"leaf {names[0]!r} of the state{more}"
