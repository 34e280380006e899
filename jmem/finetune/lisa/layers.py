"""Where anybody's parameters keep their layers: stacked on axis 0, or an entry each."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jmem.finetune.lisa.rows import put_rows, take_rows
from jmem.program import by_key, format_path
from jmem.targets import suggest
from jmem.train.checkpoint import find_difference

_NUMBERED = re.compile(r"(.*?)[_.]?(\d+)")
_SAYS_LAYER = re.compile(r"|.*(layer|block)s?", re.IGNORECASE)


class Layers(NamedTuple):
    """A tree, cut at its layers."""

    nodes: list[Any]
    """Layers (or all of them, stacked) and the leaves outside, as the tree has them."""
    order: list[int]
    """Where in `nodes` the layers are, the first one first."""
    structure: Any
    """Of the tree whose leaves `nodes` are."""
    stacked: bool

    @property
    def own(self) -> list[Any]:
        """The layers, in order; of stacked ones, the stack."""
        return [self.nodes[at] for at in self.order]

    @property
    def outside(self) -> Any:
        """The tree with None in the place of its layers."""
        return self.replace(self.nodes, [None] * len(self.order))

    @property
    def described(self) -> Any:
        """Shapes and dtypes of the layers, stacked: [L, ...]."""
        above = () if self.stacked else (len(self.order),)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*above, *leaf.shape), leaf.dtype),
            self.own[0],
        )

    def take(self, active: Int[Array, " S"]) -> Any:
        """The layers `active`, stacked: [S, ...]. No other layer is copied."""
        first, *_ = self.own
        if self.stacked:
            return take_rows(first, active)
        leaves = list(zip(*map(jax.tree.leaves, self.own)))
        choose = jax.vmap(lambda n: [jax.lax.select_n(n, *each) for each in leaves])
        return jax.tree.unflatten(jax.tree.structure(first), choose(active))

    def put(self, outside: Any, active: Int[Array, " S"], rows: Any) -> Any:
        """The tree again: `outside`, the layers `active` as `rows`, zeros else."""
        layers = jax.tree.map(jnp.zeros_like, self.own)
        if self.stacked:
            layers = [put_rows(layers[0], active, rows)]
        elif slots := active.shape[0]:
            slot_of = jnp.full((len(layers),), slots, jnp.int32)
            slot_of = slot_of.at[active].set(jnp.arange(slots, dtype=jnp.int32))
            layers = [
                _fill(layer, rows, slot_of[number])
                for number, layer in enumerate(layers)
            ]
        return self.replace(self.structure.flatten_up_to(outside), layers)

    def replace(self, nodes: list[Any], layers: list[Any]) -> Any:
        """The tree of `nodes` with these layers in their places."""
        moved = dict(zip(self.order, layers, strict=True))
        nodes = [moved.get(at, node) for at, node in enumerate(nodes)]
        return jax.tree.unflatten(self.structure, nodes)


def _fill(layer: Any, rows: Any, slot: jax.Array) -> Any:
    """Row `slot` of `rows` as a tree like `layer`; zeros where there is no such row."""
    found = [
        row.at[slot].get(mode="fill", fill_value=0).astype(like.dtype)
        for like, row in zip(jax.tree.leaves(layer), jax.tree.leaves(rows))
    ]
    return jax.tree.unflatten(jax.tree.structure(layer), found)


def cut(tree: Any, blocks: str | tuple[str, ...], stacked: bool | None) -> Layers:
    """`tree` cut at its layers, which are below the path `blocks`.

    Numbered entries are a layer each, in the order of their numbers; else leaves are
    stacked. `stacked` says which, where both could be meant.

    Raises:
      ValueError: there is no such path; entries could be read either way; stacked
        leaves disagree about the number of layers; layers are not alike.
    """
    path = blocks if isinstance(blocks, str) else "/".join(map(str, blocks))
    lead = f"{path}/" if path else ""
    paths = list(by_key(tree))
    below = {p.removeprefix(lead).split("/")[0] for p in paths if p.startswith(lead)}
    apart = rf"{re.escape(lead)}[^/]*?(\d+)"
    if not below and path not in paths:  # layers_0, layers_1 ... beside other entries
        apart, stacked = rf"{re.escape(path)}[_.]?(\d+)", bool(stacked)
    if stacked is None:
        stacked = _is_stacked(tree, path, below, apart)
    found = _cut(tree, re.escape(path) if stacked else apart, stacked)
    if not found.order:
        near = {p.rsplit("/", n)[0] for p in paths for n in range(p.count("/") + 1)}
        raise ValueError(
            f"lisa.transform: blocks={path!r} names no entry of the parameters, nor "
            f"does it with a number behind it{suggest(path, near)} Give the path of "
            "the layers, as 'params/layers'."
        )
    check = _check_depth if stacked else _check_alike
    check(found)
    return found


def _cut(tree: Any, pattern: str, stacked: bool) -> Layers:
    """`tree` cut at the nodes whose path matches, in the order of their numbers."""

    def match(path):
        return re.fullmatch(pattern, format_path(path))

    pairs, structure = jax.tree.flatten_with_path(
        tree,
        is_leaf=lambda path, _: match(path) is not None,
        is_leaf_takes_path=True,
    )
    numbers = {
        at: int("".join(found.groups()) or 0)
        for at, (path, _) in enumerate(pairs)
        if (found := match(path))
    }
    order = sorted(numbers, key=lambda at: numbers[at])
    return Layers([node for _, node in pairs], order, structure, stacked)


def _is_stacked(tree: Any, path: str, below: set[str], apart: str) -> bool:
    """Whether the entries `below` the path hold stacked leaves, rather than a layer."""
    found = [match for name in below if (match := _NUMBERED.fullmatch(name))]
    numbered = 0 < len(found) == len(below) and len({m[1] for m in found}) == 1
    says = any(_SAYS_LAYER.fullmatch(match[1]) for match in found)
    if numbered and says:
        return False
    if says:
        raise ValueError(
            f"lisa.transform: of the entries {sorted(below)} of blocks={path!r} some "
            "are numbered, as layers are, and others not. Say stacked=False if the "
            "numbered ones are a layer each and the others outside, or stacked=True."
        )
    if not numbered:
        return True
    layers = _cut(tree, apart, False).own  # as Dense_0 and Dense_1
    if any(find_difference(layers[0], layer) for layer in layers[1:]):
        return True
    depths = {leaf.shape[:1] for leaf in jax.tree.leaves(layers)}
    if len(depths) == 1 and depths != {()}:
        raise ValueError(
            f"lisa.transform: the entries {sorted(below)} of blocks={path!r} may be a "
            "layer each, or parts of stacked layers. Say which: stacked=False, or True."
        )
    return False


def _check_depth(layers: Layers) -> None:
    """Refuses stacked leaves that are not as many layers."""
    shapes = {path: leaf.shape for path, leaf in by_key(layers.own[0]).items()}
    depths = {shape[:1] for shape in shapes.values()}
    if len(depths) != 1 or () in depths:
        raise ValueError(
            "lisa.transform: stacked leaves disagree about the number of layers, the "
            f"length of their axis 0: {shapes}. Stack all of them, or give each layer "
            "an entry of its own in a list, or in a dict by number."
        )
    for path, leaf in by_key(layers.own[0]).items():
        spec = jax.typeof(leaf).sharding.spec
        if any(part is not None for part in spec):
            raise ValueError(
                f"lisa.transform: stacked leaf {path!r} is {spec} on a mesh whose axes "
                "are explicit, where rows cannot be chosen by data. Make the mesh with "
                "axis_types=(AxisType.Auto, ...), or give each layer an entry."
            )


def _check_alike(layers: Layers) -> None:
    """Refuses layers that could not take each other's place."""
    for number, layer in enumerate(layers.own):
        if changed := find_difference(layers.own[0], layer):
            name, before, after = changed
            raise ValueError(
                f"lisa.transform: layer {number} is not like layer 0: {name!r} is "
                f"{after}, and {before} there. Moments move from layer to layer, so "
                "all need the same leaves. Leave the others out of `blocks`."
            )


def count(layers: Layers) -> int:
    """How many layers there are."""
    return jax.tree.leaves(layers.described)[0].shape[0]
