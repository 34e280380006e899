"""Zeros in the linear maps of a decoder's blocks, after one look at calibration data.

    params = prune(model, params, Wanda(), 0.5, batches)

Idea     A layer at a time: what its maps read is summed over all batches, weights go by
         that, and what the pruned layer gives is what the next one reads. Maps that
         read the same input (q, k and v; gate and up) share its sums.
Memory   Device: one layer's weights, the sums and what the criterion takes of one map
         (`jmem.sparse.criteria`), and the activations [B, T, M] of all batches. Host:
         the pruned maps. Weights may be NumPy arrays, memory-mapped ones too, or JAX
         arrays on the device or the host: what comes back is of the same kind, but
         no file.
Counts   A token whose weight in the batch is 0 does not count, as padding; the others
         count once. Documents of a packed row do not see each other.
Follows  The official codes prune all maps of a layer by one run of it, as it was.
See      criteria.py (which weights go), tests/sparse/test_prune.py

The maps hold exact zeros afterwards, and nothing else says where: fine-tuners leave
them alone with `keep_zeros=True` (`jmem.finetune.zeros`).
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmem.models.next_token import find_positions
from jmem.nn.maps import find_dicts, replace_maps
from jmem.nn.stack import depth
from jmem.offload import fetch_row
from jmem.sparse.criteria import (
    CRITERIA,
    Criterion,
    Magnitude,
    SparseGPT,
    Wanda,
)

__all__ = ["CRITERIA", "Criterion", "Magnitude", "SparseGPT", "Wanda", "prune"]

Sources = tuple[tuple[str, ...], ...]
"""The maps that read the same input, the first of which gives its name to the sums."""


def prune(
    model: Any,
    params: dict,
    criterion: Criterion,
    sparsity: float,
    batches: Iterable[Any] | None = None,
) -> dict:
    """`params` whose blocks' linear maps hold exact zeros, `sparsity` of each row.

    Or of each map, of all, or of each block of columns, as the criterion says. Biases,
    norms, embedding and head stay. Every weight keeps its dtype; what is not removed
    keeps its value, but by `SparseGPT`. Sparsity 0 changes nothing.

    Args:
      model: a decoder, on one device.
      params: its parameters; they are not changed.
      criterion: which weights go, one of the kinds in `CRITERIA`.
      sparsity: the share that goes, from 0 up to, but not, 1. It has to be the
        pattern's own where `criterion.pattern` is given.
      batches: `jmem.data.batch.Batch`es to calibrate with, gone through once. Not read
        by `Magnitude`.

    Raises:
      TypeError: `criterion` is none.
      ValueError: a sparsity out of range or that is not the pattern's; rows that are no
        whole groups of the pattern; maps that are packed or have adapters; a weight or
        an activation that is not finite (names map and layer); no batches where the
        criterion needs them, fewer tokens than one row of them, or one that is not in
        the vocabulary; a model on a mesh, or whose maps are not read by `ops.linear`.
    """
    maps = _check_maps(params)
    _check_criterion(criterion, sparsity, maps)
    if getattr(model, "layout", None) is not None:
        raise ValueError(
            f"prune: the model has layout={model.layout}, and pruning runs on one "
            "device, a layer at a time. Use layout=None."
        )
    held = _check_batches(model, criterion, batches)
    blocks = params["blocks"]
    for layer in range(depth(blocks)):
        kernels = {n: leaf["kernel"] for n, leaf in maps.items()}
        _refuse(
            _are_finite(_take_layer(kernels, layer)),
            f"layer {layer} has weights that are not finite in map",
            "Load the checkpoint again, or train at a lower rate.",
        )
    if sparsity == 0:
        return params
    counts = _count(criterion, sparsity, maps)
    pruned = {
        name: np.empty(leaf["kernel"].shape, leaf["kernel"].dtype)
        for name, leaf in maps.items()
    }
    for layer, kernels in _walk(model, params, maps, criterion, counts, held):
        for name, kernel in kernels.items():
            pruned[name][layer] = kernel

    def place(kernel: np.ndarray, like: Any) -> Any:
        is_jax = isinstance(like, jax.Array)
        return jax.device_put(kernel, like.sharding) if is_jax else kernel

    done = {
        name: leaf | {"kernel": place(pruned.pop(name), leaf["kernel"])}
        for name, leaf in maps.items()
    }
    return params | {"blocks": replace_maps(blocks, done)}


def _walk(model, params, maps, criterion, counts, batches) -> Iterator[tuple]:
    """(layer, its pruned kernels by name), from the first layer to the last."""
    blocks, sources, hidden = params["blocks"], (), []
    if criterion.is_calibrated:
        model = dataclasses.replace(model, chunk=None)  # else maps are read in a loop
        others = {name: own for name, own in params.items() if name != "blocks"}
        hidden = [_embed(model, others, batch) for batch in batches]
        sources = _find_sources(model, _take_layer(blocks, 0), hidden[0], batches[0])
        _check_read(sources, maps)
    source_of = {name: group[0] for group in sources for name in group}
    last = depth(blocks) - 1
    for layer in range(last + 1):
        p, at = _take_layer(blocks, layer), jnp.int32(layer)
        own = {name: leaf["kernel"] for name, leaf in _find_maps(p).items()}
        seen = {group[0]: criterion.begin(own[group[0]].shape[0]) for group in sources}
        for x, batch in zip(hidden, batches):
            seen = _look(model, criterion, sources, p, x, batch, at, seen)
        finite = _are_finite(seen)
        _refuse(
            {group[0]: finite[group[0]] for group in sources},  # as they are read
            f"layer {layer} gives inputs that, or whose squares, are not finite to map",
            "Look at the weights before it, or at the dtype of activations.",
        )
        own = {
            name: _cut(
                criterion, kernel, seen.get(source_of.get(name)), counts[name][layer]
            )
            for name, kernel in own.items()
        }
        _refuse(
            _are_finite(own),
            f"layer {layer} has no finite weights that make up for those gone from map",
            "Raise damping, or calibrate with more tokens.",
        )
        yield layer, own
        if hidden and layer < last:
            leaves = {n: leaf | {"kernel": own[n]} for n, leaf in _find_maps(p).items()}
            p = replace_maps(p, leaves)
            hidden = [_advance(model, p, x, b, at) for x, b in zip(hidden, batches)]


# What is compiled, once for all layers ------------------------------------------------


@functools.partial(jax.jit, static_argnames="model")
def _embed(model, params, batch):
    return model.embed(params, batch.tokens, find_positions(batch))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="x")
def _advance(model, p, x, batch, layer):
    return model.block(p, x, find_positions(batch), layer, model.ops, None)[0]


@functools.partial(
    jax.jit, static_argnames=("model", "criterion", "sources"), donate_argnames="seen"
)
def _look(model, criterion, sources, p, x, batch, layer, seen):
    """The sums with what one batch's maps read in this layer."""
    read = _read_inputs(model, p, x, batch, layer)
    counted = (batch.weights != 0).reshape(-1, 1)
    for name, *_ in sources:
        for h in read[name]:
            h = h.reshape(-1, h.shape[-1]).astype(jnp.float32)
            own = criterion.look(seen[name], jnp.where(counted, h, 0))
            seen = seen | {name: own}
    return seen


@functools.partial(jax.jit, static_argnames="criterion")
def _cut(criterion, kernel, seen, count):
    """A kernel [in, out] of one layer, pruned."""
    cut = criterion.cut(kernel.T.astype(jnp.float32), seen, count)
    return cut.T.astype(kernel.dtype)


@jax.jit
def _find_finite(tree):
    return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)


_fetch_row = jax.jit(fetch_row)


def _read_inputs(model, p, x, batch, layer) -> dict[str, list[jax.Array]]:
    """What each map of a block reads, by name, one entry a reading."""
    read: dict[str, list[jax.Array]] = {}

    def linear(name, leaf, h):
        read.setdefault(name, []).append(h)
        return model.ops.linear(name, leaf, h)

    ops = model.ops._replace(linear=linear)
    model.block(p, x, find_positions(batch), layer, ops, None)
    return read


def _find_sources(model, p, x, batch) -> Sources:
    """The block's maps, those together that read the very same inputs."""
    groups: dict[tuple[int, ...], list[str]] = {}

    def trace(p, x, batch, layer):
        for name, inputs in _read_inputs(model, p, x, batch, layer).items():
            groups.setdefault(tuple(map(id, inputs)), []).append(name)

    jax.eval_shape(trace, p, x, batch, jnp.int32(0))
    return tuple(map(tuple, groups.values()))


# A layer of the parameters ------------------------------------------------------------


def _find_maps(blocks: Mapping[str, Any]) -> dict[str, dict]:
    """The maps of one layer: dicts with a kernel [in, out]."""
    return find_dicts(blocks, lambda tree: "kernel" in tree)


def _take_layer(tree: Any, layer: int) -> Any:
    """One row of every leaf; of NumPy arrays nothing else is read."""
    leaves, structure = jax.tree.flatten(tree)
    here = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    rows = iter(_fetch_row(here, jnp.int32(layer)))
    taken = [next(rows) if isinstance(a, jax.Array) else a[layer] for a in leaves]
    return jax.tree.unflatten(structure, taken)


def _count(criterion, sparsity, maps) -> dict[str, np.ndarray]:
    """How many weights go, by the name of a map, a row for each layer."""

    def read(name: str, layer: int) -> np.ndarray:
        kernel = np.asarray(_take_layer(maps[name]["kernel"], layer))
        return np.ascontiguousarray(kernel.T, dtype=np.float32)

    shapes = {}
    for name, leaf in maps.items():
        layers, inputs, outputs = leaf["kernel"].shape
        shapes[name] = layers, outputs, inputs
    return criterion.count(sparsity, shapes, read)


# Refusals -----------------------------------------------------------------------------


def _are_finite(tree: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each tree of the mapping is, without a NaN or an infinity."""
    found = _find_finite(dict(tree))
    return {name: all(map(bool, jax.tree.leaves(own))) for name, own in found.items()}


def _refuse(finite: Mapping[str, bool], what: str, way_out: str) -> None:
    for name, is_finite in finite.items():
        if not is_finite:
            raise ValueError(f"prune: {what} {name!r}. {way_out}")


def _check_maps(params: Mapping[str, Any]) -> dict[str, dict]:
    """The blocks' maps by name, once each is a plain kernel."""
    words = {"packed": "packed rows", "sparse": "packed non-zeros"}

    def is_map(tree):
        held = tree.keys() & {"kernel", *words}
        return bool(held) or any(key.startswith("lora_") for key in tree)

    maps = dict(sorted(find_dicts(params["blocks"], is_map).items()))
    for name, leaf in maps.items():
        if found := words.keys() & leaf.keys():
            raise ValueError(
                f"prune: map {name!r} holds {words[min(found)]}, which have lost the "
                "kernel that weights are removed from. Prune first, then pack: load "
                "the checkpoint with packed=False."
            )
        if other := leaf.keys() - {"kernel", "bias"}:
            raise ValueError(
                f"prune: map {name!r} holds {sorted(other)} beside its kernel: an "
                "adapter, whose product would fill the zeros. Merge it first "
                "(finetuner.merged), or train it after pruning with keep_zeros=True."
            )
        if leaf["kernel"].ndim != 3:
            raise ValueError(
                f"prune: map {name!r} has a kernel of shape {leaf['kernel'].shape}; "
                "need a matrix for every layer, [layers, in, out]."
            )
    if not maps:
        raise ValueError("prune: params['blocks'] holds no linear map.")
    return maps


def _check_criterion(criterion, sparsity, maps) -> None:
    """Refuses a share that cannot be, and a pattern that the maps do not have."""
    if not isinstance(criterion, Criterion):
        raise TypeError(
            f"prune: criterion={criterion!r} is none; give Magnitude(), Wanda() or "
            "SparseGPT(), or one of jmem.sparse.prune.CRITERIA by its name."
        )
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"prune: sparsity={sparsity} must lie in [0, 1): it is the share of "
            "weights that go, and all of them would leave no map."
        )
    if criterion.pattern is None:
        return
    kept, of = criterion.pattern
    if abs(sparsity - (1 - kept / of)) > 1e-6:
        raise ValueError(
            f"prune: sparsity={sparsity} is not that of pattern={criterion.pattern}, "
            f"which keeps {kept} of {of} weights. Give {1 - kept / of:g}."
        )
    for name, leaf in maps.items():
        if (inputs := leaf["kernel"].shape[1]) % of:
            raise ValueError(
                f"prune: map {name!r} has rows of {inputs} weights, which "
                f"pattern={criterion.pattern} does not divide into groups of {of}. "
                "Choose another M, or leave the pattern out."
            )


def _check_batches(model, criterion, batches) -> list[Any]:
    """The batches to calibrate with; of a criterion that needs none, none."""
    if not criterion.is_calibrated:
        return []
    if hasattr(batches, "tokens"):  # one batch, which would be gone through by fields
        batches = [batches]
    held = list(batches or ())
    if not held:
        raise ValueError(
            f"prune: {criterion.name} goes by what the maps read, and batches="
            f"{batches!r:.40} holds none. Give some, as of jmem.data.text, or choose "
            "Magnitude."
        )
    counted = sum(int(np.count_nonzero(np.asarray(b.weights))) for b in held)
    row = max(batch.tokens.shape[1] for batch in held)
    if counted < max(row, 1):
        raise ValueError(
            f"prune: the batches hold {counted} tokens that count (whose weight is "
            f"not 0), fewer than one row of {row}. Calibrate with a longer text, or "
            "with shorter rows."
        )
    size = model.config.vocab_size
    for batch in held:
        tokens = np.asarray(batch.tokens)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            raise ValueError(
                f"prune: batches hold tokens from {tokens.min()} to {tokens.max()}, "
                f"but the model's vocabulary is of {size}. They are of another "
                "tokenizer."
            )
    return held


def _check_read(sources: Sources, maps: Mapping[str, dict]) -> None:
    read = {name for group in sources for name in group}
    if missed := sorted(maps.keys() - read):
        raise ValueError(
            f"prune: the block does not read {missed} by `ops.linear`, so what they "
            "read is not known. Prune with Magnitude, or with a model whose feed is "
            "its own (feed=None)."
        )
