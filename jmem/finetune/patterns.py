"""Patterns on the paths of a parameter tree: what is trained, and how fast.

    blocks/attention      everything below that path
    blocks/*/bias         a star is any characters, slashes among them
    *norm                 every norm, of the blocks and the last

Paths are those of `jmem.program.by_key`. Blocks are stacked, so a pattern means a part
of every layer, never one layer.
"""

from collections.abc import Iterable
from typing import Any

import jax

from jmem.nn.maps import is_match
from jmem.program import by_key, format_path
from jmem.targets import suggest


def find_matching(pattern: str, paths: Iterable[str], name: str) -> set[str]:
    """Those of `paths` that `pattern` means.

    Raises:
      ValueError: it means none of them; `name`, the setting that holds the pattern,
        begins the message.
    """
    paths = list(paths)
    found = {path for path in paths if is_match(pattern, path)}
    if not found:
        known = {p.rsplit("/", n)[0] for p in paths for n in range(p.count("/") + 1)}
        raise ValueError(
            f"{name}: {pattern!r} matches no parameter{suggest(pattern, known)}"
        )
    return found


def split(tree: Any, patterns: tuple[str, ...], name: str) -> tuple[Any, Any]:
    """`tree` twice: with None for what no pattern means, and for what one does.

    No patterns mean everything. To JAX None is an empty tree: it has no gradient and no
    moments. Nothing is copied; `join` puts the two together again.

    Raises:
      ValueError: as `find_matching`.
    """
    paths = by_key(tree).keys()
    meant = set().union(*(find_matching(p, paths, name) for p in patterns)) or set(
        paths
    )

    def part(chosen: bool) -> Any:
        return jax.tree.map_with_path(
            lambda path, leaf: leaf if (format_path(path) in meant) is chosen else None,
            tree,
        )

    return part(True), part(False)


def join(first: Any, second: Any) -> Any:
    """The tree that was split: the leaves of `first`, those of `second` where None."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
    )
