"""From the A's, B's and magnitudes of an adapter's file to our tree, and back.

Experts lie side by side: where a layer has several adapters of a map, the first owns
the first `rank` columns of A and rows of B, and so on. Such maps have no magnitudes.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jmem.checkpoints import fused, layout
from jmem.checkpoints.files import CheckpointError, LazyTensor, read_finite
from jmem.checkpoints.modules import Module, Stack
from jmem.nn.maps import insert
from jmem.program import by_key


def check(
    stacks: Iterable[Stack],
    tensors: Mapping[str, LazyTensor],
    where: str,
    base: str | None,
    no_place: str,
) -> None:
    """Passes if the tensors are those of `stacks`, and no others.

    Args:
      stacks: what must be there, drawn one at a time.
      tensors: by name.
      where: the file.
      base: what the adapter was trained on.
      no_place: what a tensor too many may be, and the way out.

    Raises:
      CheckpointError: a tensor is missing, has another shape or dtype, or no place.
    """
    trained_on = f" It was trained on {base!r:.200}." if base else ""
    used = set()
    for stack in stacks:
        for name in stack.names:
            layout.take(
                *(tensors, name, stack.shape, where),
                f"; {stack.because} and this base need shape",
                f"It is not whole, or the adapter of another base.{trained_on}",
                "adapters",
            )
        used.update(stack.names)
    for name in tensors:
        if name not in used:
            raise CheckpointError(
                f"{where}: tensor {name!r} has no place among the adapted maps of this "
                f"base: {no_place}{trained_on}"
            )


def assemble(
    ranks: Mapping[Module, int],
    tensors: Mapping[str, LazyTensor],
    rank: int,
    dora: bool = False,
) -> tuple[dict, int]:
    """The tree of adapters, and the one rank of all: `rank`, or the highest found."""
    stacks = {one: list(one.list_stacks(own, dora)) for one, own in ranks.items()}
    dtypes = _find_dtypes([stack for own in stacks.values() for stack in own], tensors)
    tree: dict = {}
    # A module of several maps goes first: it may raise the rank of all.
    for one in sorted(stacks, key=lambda one: len(one.paths), reverse=True):
        pair = {
            stack.leaf: stack_tensors(stack, tensors, dtypes[stack.leaf])
            for stack in stacks[one]
        }
        parts = dict(zip(one.paths, fused.cut(pair, len(one.paths), rank)))
        rank = max(rank, *(part["lora_a"].shape[-1] for part in parts.values() if part))
        for path, part in parts.items():
            for half, value in fused.pad(part, rank).items() if part else ():
                beside = _put_beside(value, half, one.experts)
                # Copied: q, k and v may share A, but are trained, and donated, apart.
                insert(tree, f"{path}/{half}", jnp.array(beside))
    return tree, rank


def _find_dtypes(
    stacks: Sequence[Stack], tensors: Mapping[str, LazyTensor]
) -> dict[str, np.dtype]:
    """The dtype of each leaf: one for A's and B's, one for magnitudes (more digits)."""
    found = {}
    for leaves in (("lora_a", "lora_b"), ("magnitude",)):
        alike = [stack for stack in stacks if stack.leaf in leaves]
        dtype = layout.find_widest(
            tensors[name] for stack in alike for name in stack.names
        )
        found |= dict.fromkeys(leaves, dtype)
    return found


def stack_tensors(
    stack: Stack, tensors: Mapping[str, LazyTensor], dtype: np.dtype
) -> Shaped[np.ndarray, "LE ..."]:
    """The tensors of a stack in one array [layers * experts, ...], in our layout."""
    return np.stack(
        [read_finite(tensors[name]).T.astype(dtype) for name in stack.names]
    )


def _put_beside(
    value: Shaped[np.ndarray, "LE ..."], half: str, experts: int
) -> Shaped[np.ndarray, "L ..."]:
    """Puts the experts of each layer side by side along their rank."""
    if experts == 1:
        return value
    each = [value[expert::experts] for expert in range(experts)]
    return np.concatenate(each, axis=2 if half == "lora_a" else 1)


def disassemble(
    adapters: Mapping,
    known: Iterable[Module],
    layers: int,
    who: str,
    dora: bool = False,
) -> tuple[int, dict[Module, int], list[LazyTensor]]:
    """The tree's rank, the rank of each adapted module, and the file's tensors.

    Tensors are copied to the host when read, those of a module of several maps at
    once. `who` is the name of the function called, for error messages.

    Raises:
      CheckpointError: not a tree of adapters of one rank for such modules.
    """
    given = by_key(adapters)
    experts = {f"{path}/lora_a": one.experts for one in known for path in one.paths}
    rank = next(
        (v.shape[-1] // experts[k] for k, v in given.items() if k in experts), None
    )
    ranks, tensors = {}, []
    needed: dict[str, tuple[int, ...]]
    for one in known:
        (inputs, outputs), width = one.shape, one.experts * (rank or 0)
        needed = {"lora_a": (layers, inputs, width), "lora_b": (layers, width, outputs)}
        if dora:
            needed["magnitude"] = (layers, outputs)
        pairs = [_take(given, path, needed, who) for path in one.paths]
        if not any(pairs):
            continue
        pair = _join(one, pairs, who)
        ranks[one] = pair["lora_a"].shape[-1] // one.experts
        for stack in one.list_stacks(ranks[one], dora):
            tensors += cut_stack(stack, pair[stack.leaf], one.experts)
    if given or rank is None:
        raise CheckpointError(
            f"{who}: {next(iter(given), 'adapters')!r} is no adapter of a linear map "
            "of config's blocks; give the tree that is trained (state['lora'])."
        )
    return rank, ranks, tensors


def _take(
    given: dict[str, Any], path: str, needed: Mapping[str, tuple[int, ...]], who: str
) -> dict[str, Any]:
    """Takes the leaves that are `needed` of the map at `path` out of `given`.

    {} if it has none of them, and so no adapter.
    """
    pair = {half: given.pop(f"{path}/{half}", None) for half in needed}
    if all(value is None for value in pair.values()):
        return {}
    needs = "config, and one rank and kind for all maps, need"
    for half, value in pair.items():
        layout.check_leaf(
            *(f"{who}: {path}/{half}", value, needed[half], needs, "adapters")
        )
    return pair


def _join(one: Module, pairs: Sequence[dict[str, Any]], who: str) -> dict[str, Any]:
    """One adapter for a module: its map's, or its several maps' joined on the host."""
    if len(pairs) == 1:
        return pairs[0]
    if any("magnitude" in pair for pair in pairs) and not all(pairs):
        bare = [path for path, pair in zip(one.paths, pairs) if not pair]
        raise CheckpointError(
            f"{who}: {', '.join(bare)} has no adapter, but is computed by one module "
            f"with others, {one.short_name}, whose DoRA needs the magnitude of all. "
            "Train it with maps that name all of them, or save the merged weights."
        )
    dtypes = {
        str(value.dtype)
        for pair in pairs
        for leaf, value in pair.items()
        if leaf != "magnitude"
    }
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{who}: adapters of {', '.join(one.paths)} have dtypes "
            f"{', '.join(sorted(dtypes))}, but are one of {one.short_name} in PEFT. "
            "Cast them to one."
        )
    return fused.join([jax.tree.map(np.asarray, pair) or None for pair in pairs])


def cut_stack(
    stack: Stack, value: jax.Array | np.ndarray, experts: int = 1
) -> list[LazyTensor]:
    """The tensors of a stack, each copied to the host when read.

    Experts are cut apart along the rank of A or B; of one, a layer is whole.
    """
    dtype = np.dtype(value.dtype)
    is_b = stack.leaf == "lora_b"
    rank = stack.shape[1 if is_b else 0]
    tensors = []
    for number, name in enumerate(stack.names):
        layer, expert = divmod(number, experts)
        own = slice(expert * rank, (expert + 1) * rank)
        read = functools.partial(
            _read_row, value, (layer, own) if is_b else (layer, ..., own)
        )
        tensors.append(LazyTensor(name, stack.shape, dtype, read, "adapters"))
    return tensors


def _read_row(stacked: jax.Array | np.ndarray, place: tuple) -> np.ndarray:
    """A layer's or expert's matrix as torch stores it; JAX keeps the fetched stack."""
    return np.asarray(stacked)[place].T
