"""The A's, B's and magnitudes of a PEFT file to the tree that LoRA trains, and back."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmem.checkpoints import fused, layout
from jmem.checkpoints.files import CheckpointError, LazyTensor
from jmem.checkpoints.modules import Module
from jmem.program import by_key

_DTYPES = ", ".join(map(str, layout.WEIGHT_DTYPES))

Found = Mapping[Module, Mapping[str, list[LazyTensor]]]
"""The tensors of "lora_a", "lora_b" and, of DoRA, "magnitude" of each module, layer by
layer."""


def match(
    ranks: Mapping[Module, int],
    tensors: Mapping[str, LazyTensor],
    where: str,
    base: str | None,
    dora: bool = False,
) -> Found:
    """The tensors of adapters of these ranks; nothing may be left over.

    Raises:
      CheckpointError: a tensor is missing, has another shape or dtype, or no place.
    """
    trained_on = f" It was trained on {base!r:.200}." if base else ""
    found: dict[Module, dict[str, list[LazyTensor]]] = {one: {} for one in ranks}
    used = set()
    parts = [(one, *part) for one in ranks for part in one.parts(ranks[one], dora)]
    for one, half, shape, names in parts:
        for name in names:
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != shape:
                given = "is missing" if tensor is None else f"has shape {tensor.shape}"
                raise CheckpointError(
                    f"{where}: tensor {name!r} {given}; r={ranks[one]} and this base "
                    f"need shape {shape}. It is not whole, or the adapter of another "
                    "base." + trained_on
                )
            if tensor.dtype not in layout.WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{where}: tensor {name!r} has dtype {tensor.dtype}; adapters are "
                    f"{_DTYPES}."
                )
        found[one][half] = [tensors[name] for name in names]
        used.update(names)
    for name in tensors:
        if name not in used:
            raise CheckpointError(
                f"{where}: tensor {name!r} has no place among the adapted maps of this "
                "base: trained embeddings, biases, heads and further layers are not "
                "supported. Merge the adapter into its base with PEFT "
                f"(merge_and_unload) and load the result.{trained_on}"
            )
    return found


def assemble(found: Found, rank: int) -> tuple[dict, int]:
    """The tree of adapters, and the one rank of all: `rank`, or the highest found."""
    dtypes = {part: _widest(found, part) for part in ("lora", "magnitude")}
    tree: dict = {}
    # A module of several maps goes first: it may raise the rank of all.
    for one in sorted(found, key=lambda one: len(one.paths), reverse=True):
        pair = {
            half: np.stack([tensor.read().T.astype(dtype) for tensor in members])
            for half, members in found[one].items()
            for dtype in [dtypes[half.partition("_")[0]]]
        }
        parts = dict(zip(one.paths, fused.cut(pair, len(one.paths), rank)))
        rank = max(rank, *(part["lora_a"].shape[-1] for part in parts.values() if part))
        for path, part in parts.items():
            for half, value in fused.padded(part, rank).items() if part else ():
                # Copied: q, k and v may share A, but are trained, and donated, apart.
                layout.insert(tree, f"{path}/{half}", jnp.array(value))
    return tree, rank


def _widest(found: Found, part: str) -> np.dtype:
    """Of the products, or of the magnitudes, which are stored in more digits."""
    return layout.widest(
        tensor
        for halves in found.values()
        for half, members in halves.items()
        for tensor in members
        if half.startswith(part)
    )


def disassemble(
    adapters: Mapping, known: Iterable[Module], layers: int
) -> tuple[int, dict[Module, int], list[LazyTensor], bool]:
    """The tree's rank, that of each adapted module, PEFT's tensors, and whether DoRA's.

    They are copied to the host when read, those of a module of several maps at once.

    Raises:
      CheckpointError: not a tree of adapters of one rank for such modules.
    """
    given = by_key(adapters)
    rank = next((v.shape[-1] for k, v in given.items() if k.endswith("/lora_a")), None)
    dora = any(path.endswith("/magnitude") for path in given)
    ranks, tensors = {}, []
    for one in known:
        pairs = [
            _taken(given, path, one.shape, rank, layers, dora) for path in one.paths
        ]
        if not any(pairs):
            continue
        pair = _joined(one, pairs)
        ranks[one] = pair["lora_a"].shape[-1]
        for half, shape, names in one.parts(ranks[one], dora):
            for layer, name in enumerate(names):
                read = functools.partial(_row, pair[half], layer)
                dtype = np.dtype(pair[half].dtype)
                tensors.append(LazyTensor(name, shape, dtype, read, "adapters"))
    if given or rank is None:
        raise CheckpointError(
            f"save_adapter: {next(iter(given), 'adapters')!r} is no adapter of a "
            "linear map of config's blocks; give the tree that Lora trains "
            "(state['lora'])."
        )
    return rank, ranks, tensors, dora


def _taken(
    given: dict[str, Any],
    path: str,
    shape: tuple[int, ...],
    rank: int | None,
    layers: int,
    dora: bool,
) -> dict[str, Any]:
    """The parts of the map at `path`, which leave `given`; empty if it has none."""
    needed: dict[str, tuple] = {
        "lora_a": (layers, shape[0], rank),
        "lora_b": (layers, rank, shape[1]),
    }
    if dora:
        needed["magnitude"] = (layers, shape[1])
    pair = {half: given.pop(f"{path}/{half}", None) for half in needed}
    if all(value is None for value in pair.values()):
        return {}
    for half, value in pair.items():
        if value is None or value.shape != needed[half]:
            raise CheckpointError(
                f"save_adapter: {path}/{half} "
                + ("is missing" if value is None else f"has shape {value.shape}")
                + f"; config, and one rank and kind for all maps, need {needed[half]}."
            )
        if value.dtype not in layout.WEIGHT_DTYPES:
            raise CheckpointError(
                f"save_adapter: {path}/{half} has dtype {value.dtype}; adapters are "
                f"{_DTYPES}."
            )
    return pair


def _joined(one: Module, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The adapter of a module: that of its map, or of its maps, then on the host."""
    if len(pairs) == 1:
        return pairs[0]
    if any("magnitude" in pair for pair in pairs) and not all(pairs):
        bare = [path for path, pair in zip(one.paths, pairs) if not pair]
        raise CheckpointError(
            f"save_adapter: {', '.join(bare)} has no adapter, but is computed by one "
            f"module with others, {one.short_name}, whose DoRA needs the magnitude of "
            "all. Train it with maps that name all of them, or save the merged weights."
        )
    dtypes = {
        str(value.dtype)
        for pair in pairs
        for name, value in pair.items()
        if name != "magnitude"
    }
    if len(dtypes) > 1:
        raise CheckpointError(
            f"save_adapter: adapters of {', '.join(one.paths)} have dtypes "
            f"{', '.join(sorted(dtypes))}, but are one of {one.short_name} in PEFT. "
            "Cast them to one."
        )
    return fused.joined([jax.tree.map(np.asarray, pair) or None for pair in pairs])


def _row(stacked: jax.Array | np.ndarray, layer: int) -> np.ndarray:
    """One layer as torch has it; the stack is fetched once, and kept by JAX."""
    return np.asarray(stacked)[layer].T
