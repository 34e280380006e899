"""Linear maps by name, and how a setting chooses among them.

A map's name is its path: inside a block "attention/q" or "mlp/gate", with
cross-attention also "cross/q"; outside the blocks "head". `ops.linear` is given that
name (`jmem.nn.ops`), and the map's parameters stand at that path of the tree.

A setting chooses maps of a block by patterns:

    attention/q           that map
    attention/*           a star is any characters, slashes among them
    q                     one of `MAPS`: every map whose path ends so

A pattern may begin with "blocks/", as the paths of a whole model do.
"""

import difflib
import fnmatch
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from jmem.targets import suggest

MAPS = ("q", "k", "v", "o", "gate", "up", "down")
"""Short names of a decoder block's maps. As a setting, the default: those of them that
a block has (an MLP that is not gated has no "gate")."""

_DECODER = (
    *("attention/q", "attention/k", "attention/v", "attention/o"),
    *("mlp/gate", "mlp/up", "mlp/down"),
)
_BLOCKS = "blocks/"


JOINED: Mapping[str, tuple[str, ...]] = {
    "attention/qkv": ("attention/q", "attention/k", "attention/v"),
    "mlp/gate_up": ("mlp/gate", "mlp/up"),
}
"""Maps side by side, for inference (`jmem.nn.joined`), and their parts in order."""


def is_match(pattern: str, path: str) -> bool:
    """Whether a pattern means the path: itself, or something that it lies below."""
    return any(fnmatch.fnmatchcase(path, p) for p in (pattern, f"{pattern}/*"))


def find_maps(blocks: Mapping[str, Any]) -> dict[str, dict]:
    """The linear maps of stacked blocks: their parameter dicts by name.

    They are the dicts that hold a kernel [L, in, out], or in its place packed rows or a
    sparse matrix.

    >>> import jax.numpy as jnp
    >>> leaf = {"kernel": jnp.ones((2, 8, 8))}
    >>> list(find_maps({"attention": {"q": leaf}, "cross": {"q": leaf}}))
    ['attention/q', 'cross/q']
    """

    def is_map(tree: Mapping[str, Any]) -> bool:
        packed = "packed" in tree or "sparse" in tree
        return packed or ("kernel" in tree and tree["kernel"].ndim == 3)

    return find_dicts(blocks, is_map)


def find_dicts(
    tree: Mapping[str, Any], wanted: Callable[[Mapping[str, Any]], bool]
) -> dict[str, dict]:
    """The dicts below `tree` that are wanted, by path; none lies in another."""
    flat = flatten_dict(tree, is_leaf=lambda path, d: bool(path) and wanted(d), sep="/")
    return {path: value for path, value in flat.items() if isinstance(value, dict)}


def replace_maps(blocks: Mapping[str, Any], maps: Mapping[str, dict]) -> dict:
    """`blocks` with other parameter dicts for the maps that `maps` names."""
    flat = flatten_dict(
        blocks,
        keep_empty_nodes=True,
        is_leaf=lambda path, _: "/".join(path) in maps,
        sep="/",
    )
    return unflatten_dict({n: maps.get(n, leaf) for n, leaf in flat.items()}, sep="/")


def check_maps(who: str, maps: tuple[str, ...]) -> None:
    """Refuses patterns that are wrong whatever the blocks are.

    Raises:
      ValueError: a short name that is none of `MAPS`, no pattern, or one twice.
    """
    for name in maps:
        if name not in MAPS and not set(name) & set("/*"):
            near = difflib.get_close_matches(name, MAPS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{who}: maps={maps} names {name!r}; a block has {MAPS}, and other "
                f"maps are named by their path, like 'cross/q'.{hint}"
            )
    if not maps or len(set(maps)) < len(maps):
        raise ValueError(f"{who}: maps={maps} must name at least one map, each once.")


def choose_maps(
    patterns: tuple[str, ...], names: Collection[str], setting: str
) -> tuple[str, ...]:
    """Those of `names` that a pattern means, in the order of `names`.

    Raises:
      ValueError: a pattern means none of them; `setting` begins the message.

    >>> choose_maps(("q", "mlp/*"), ["attention/q", "cross/q", "mlp/up"], "maps")
    ('attention/q', 'cross/q', 'mlp/up')
    >>> choose_maps(("cross/q",), ["attention/q", "cross/q", "mlp/up"], "maps")
    ('cross/q',)
    """

    def find(pattern: str) -> set[str]:
        pattern = pattern.removeprefix(_BLOCKS)
        ends = f"*/{pattern}" if pattern in MAPS else pattern
        return {
            name for name in names if is_match(pattern, name) or is_match(ends, name)
        }

    found = {pattern: find(pattern) for pattern in patterns}
    every = set().union(*found.values())
    missing = [pattern for pattern, own in found.items() if not own]
    gone = {
        part for name in names for part in JOINED.get(name, ()) if part not in names
    }
    if lost := [p for p in missing if any(part.endswith(f"/{p}") for part in gone)]:
        raise ValueError(
            f"{setting} names {lost}, which these blocks don't have apart, but side by "
            "side for inference. Load them apart (joined=False), or take "
            "jmem.nn.joined.split_maps."
        )
    if missing and (patterns != MAPS or not every):
        words = {part for name in names for part in (name, *name.split("/"))}
        raise ValueError(
            f"{setting} names {missing}, which these blocks don't have; choose among "
            f"{', '.join(names)}{suggest(missing[0].removeprefix(_BLOCKS), words)}"
        )
    return tuple(name for name in names if name in every)


def number_map(name: str) -> int:
    """The number (uint32) that a map's random draws are keyed by.

    It does not depend on what other maps a block has. For `jax.random.fold_in`: 0 to 6
    for a decoder's maps, in the order of `MAPS`.
    """
    if name in _DECODER:
        return _DECODER.index(name)
    return zlib.crc32(name.encode())


def insert(tree: dict, name: str, value: Any) -> None:
    """`value` at the path `name` of the tree, whose dicts are made as needed."""
    *above, last = name.split("/")
    for part in above:
        tree = tree.setdefault(part, {})
    tree[last] = value
