"""Where each parameter of the decoder lies in a checkpoint, and the way there and back.

A checkpoint holds one tensor a layer, linear maps as torch does, [out, in]; the decoder
holds kernels [in, out] stacked on axis 0. `names` says which tensor is which leaf.

Memory   `assemble` fills one stacked leaf at a time, in place on the device: the peak
         is the result and one tensor.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jmem.checkpoints.files import (
    CheckpointError,
    CheckpointWarning,
    LazyTensor,
    read_finite,
)
from jmem.checkpoints.names import Leaf, Naming, find_family, list_leaves
from jmem.models.config import DecoderConfig
from jmem.nn import pruned, quantised
from jmem.nn.joined import find_joined
from jmem.nn.maps import insert
from jmem.program import by_key

WEIGHT_DTYPES = tuple(np.dtype(d) for d in ("float32", ml_dtypes.bfloat16, "float16"))
"""What weights may be stored, returned and exported as."""

_NOT_PARAMETERS = re.compile(
    r".*rotary_emb\.inv_freq|rope_freqs\.weight|"
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
)
"""Tables that some exporters store beside the weights; they follow from the config."""

Packer = Callable[[str, Callable[[int], np.ndarray], int], dict[str, Any]]
"""From a map's name, its kernels [in, out] by layer, and how many there are, what
stands in the place of "kernel": {"sparse": ...}, as JAX arrays."""

COMPARED_BYTES = 1 << 25
"""Bytes of two tables that are compared at a time."""


def _strip_root(name: str) -> str:
    """The tensor's name in a file of the model without its language-model head."""
    return re.sub(r"^(model|transformer)\.", "", name)


def take(
    tensors: Mapping[str, LazyTensor],
    name: str,
    shape: tuple[int, ...],
    where: str,
    needs: str,
    otherwise: str,
    kind: str = "weights",
) -> LazyTensor:
    """The tensor of this name and shape, of a dtype that weights have.

    `where` is the file that should hold it. Of the message, `needs` says what demands
    the shape ("; r=4 needs shape"), and `otherwise` what a file without it may be.

    Raises:
      CheckpointError: there is none, or it has another shape or dtype.
    """
    tensor = tensors.get(name)
    where = f"{tensor.origin if tensor else where}: tensor {name!r}"
    if tensor is None or tensor.shape != shape:
        given = "is missing" if tensor is None else f"has shape {tensor.shape}"
        raise CheckpointError(f"{where} {given}{needs} {shape}. {otherwise}")
    check_dtype(where, tensor.dtype, kind)
    return tensor


def check_dtype(what: str, dtype: np.dtype, kind: str = "weights") -> None:
    """Refuses a dtype that weights do not have; `what` has it."""
    if dtype not in WEIGHT_DTYPES:
        known = _list_dtypes(WEIGHT_DTYPES)
        raise CheckpointError(f"{what} has dtype {dtype}; {kind} are {known}.")


def settle_head(
    config: DecoderConfig, tensors: Mapping[str, LazyTensor], naming: Naming
) -> tuple[DecoderConfig, Mapping[str, LazyTensor]]:
    """The decoder that the file holds, where its configuration says that it is tied.

    A head that differs from the embedding is one of its own: the decoder is not tied,
    and both are kept (adapters of heads, merged, leave such files). A head alone is the
    embedding too. Reads both tables, some rows at a time, where both are stored.
    """
    if not config.tied:
        return config, tensors
    untied = dataclasses.replace(config, tied=False)
    paths = {leaf.path: getattr(leaf, naming) for leaf in list_leaves(untied)}
    embedding, head = paths["embed/embedding"], paths["head/kernel"]
    if head not in tensors:
        return config, tensors
    names = [n for n in (embedding, _strip_root(embedding)) if n in tensors]
    if not names:
        rest = {name: tensor for name, tensor in tensors.items() if name != head}
        return config, rest | {embedding: tensors[head]}
    if _are_equal(tensors[names[0]], tensors[head]):
        return config, tensors
    warnings.warn(
        f"{tensors[head].origin}: {head!r} differs from {names[0]!r}, though the "
        "configuration says that they are one (tie_word_embeddings). Both are kept, "
        "as a head of its own.",
        CheckpointWarning,
        stacklevel=2,
    )
    return untied, tensors


def _are_equal(one: LazyTensor, other: LazyTensor) -> bool:
    if one.shape != other.shape or len(one.shape) != 2:
        return one.shape == other.shape
    if one.read_rows is None or other.read_rows is None:
        return bool(np.array_equal(one.read(), other.read()))
    step = max(1, COMPARED_BYTES // (one.dtype.itemsize * one.shape[1] or 1))
    return all(
        np.array_equal(one.read_rows(at, at + step), other.read_rows(at, at + step))
        for at in range(0, one.shape[0], step)
    )


def match(
    config: DecoderConfig, tensors: Mapping[str, LazyTensor], naming: Naming, where: str
) -> dict[str, tuple[LazyTensor, ...]]:
    """The tensors of each leaf, layer by layer; `where` says which model is expected.

    Raises:
      CheckpointError: a tensor is missing, has another shape or dtype than the decoder
        needs, or belongs to no leaf (it would change what the model computes).
    """
    found: dict[str, tuple[LazyTensor, ...]] = {}
    used = set()
    origin = next(iter(tensors.values())).origin if tensors else where
    table = list_leaves(config)
    if naming == "gguf" and not table[0].gguf:
        raise CheckpointError(
            f"{origin}: {where} is a {find_family(config)}, whose GGUF files are not "
            "supported. Load its Hugging Face folder."
        )
    first = table[0].huggingface
    bare = first not in tensors and _strip_root(first) in tensors
    for leaf in table:
        members = []
        for name in leaf.list_names(naming, config.layers):
            name = _strip_root(name) if bare else name
            needs = f", but {where} needs"
            if name not in tensors:
                needs = f"; {where} needs it with shape"
            members.append(
                take(
                    *(tensors, name, leaf.stored_shape, origin, needs),
                    "It is the checkpoint of another model, or not whole.",
                )
            )
            used.add(name)
        found[leaf.path] = tuple(members)
    for name, tensor in tensors.items():
        # A tied model's copy of its embedding, as `settle_head` has found.
        tied_copy = config.tied and name == "lm_head.weight"
        if name not in used and not tied_copy and not _NOT_PARAMETERS.fullmatch(name):
            raise CheckpointError(
                f"{tensor.origin}: tensor {name!r} of shape {tensor.shape} has no "
                f"place in {where}. Supported are decoders with no other "
                "parameters; adapters must be merged first."
            )
    return found


def find_widest(tensors: Iterable[LazyTensor]) -> np.dtype:
    """The stored dtype if there is one, float32 if there are several."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def assemble(
    config: DecoderConfig,
    found: Mapping[str, tuple[LazyTensor, ...]],
    dtype: np.dtype,
    packed: "bool | str | Packer" = False,
    joined: bool = False,
) -> dict:
    """Reads the tensors that `match` found into the decoder's parameter tree.

    With `joined`, maps that read one input are side by side (`jmem.nn.joined`).

    With `packed`, a block's linear map whose layers are all of types that can stay so
    is the leaf of `jmem.nn.quantised`; with the name of a type all its linear maps are,
    each layer quantised as it is read. A `Packer` makes the leaves itself.

    Raises:
      CheckpointError: a file changed since it was checked, a value is not finite or
        overflows dtype, or nothing can stay packed.
      ValueError: rows are not whole blocks of the type.
    """
    params: dict = {}
    kind = packed if isinstance(packed, str) else None
    if kind is not None:
        _check_kind(config, kind)
    stay = {
        leaf.path
        for leaf in list_leaves(config)
        if packed is True and _can_stay(leaf, found)
    }
    if packed is True and not stay:
        tensors = [tensor for members in found.values() for tensor in members]
        kinds = sorted({t.kind or str(t.dtype) for t in tensors})
        raise CheckpointError(
            f"{tensors[0].origin}: no linear map can stay packed, as its tensors are "
            f"of the types {', '.join(kinds)}. Supported are "
            f"{', '.join(quantised.GGUF)} and sparse folders. Load it with "
            f"packed=False, or quantise it, "
            f"packed={next(iter(quantised.PACKERS))!r}."
        )

    def read(leaf):
        return (_read_leaf(leaf, tensor, dtype) for tensor in found[leaf.path])

    leaves = {leaf.path: leaf for leaf in list_leaves(config)}
    for path, parts in _find_joined(leaves).items() if joined else ():
        own = [leaves.pop(part) for part in parts]
        rows = (np.concatenate(row, axis=-1) for row in zip(*map(read, own)))
        width = sum(leaf.shape[-1] for leaf in own)
        shape = config.layers, *own[0].shape[:-1], width
        insert(params, path, _stack(rows, shape, dtype))
    for leaf in leaves.values():
        members, rows = found[leaf.path], read(leaf)
        module, _, name = leaf.path.rpartition("/")
        if leaf.path in stay and members[0].read_sparse is not None:
            parts = {"sparse": _read_sparse(members)}
        elif leaf.path in stay:
            parts = _read_packed(members)
        elif callable(packed) and _is_map(leaf):
            give = functools.partial(_read_row, leaf, members, dtype)
            module = module.removeprefix("blocks/")
            parts = packed(module, give, config.layers)
            module = f"blocks/{module}"
        elif kind is not None and _is_map(leaf):
            parts = _quantise_all(rows, (len(members), *leaf.shape), kind)
        elif leaf.stacked:
            parts = {name: _stack(rows, (len(members), *leaf.shape), dtype)}
        else:
            parts = {name: jnp.array(next(rows))}
        for name, value in parts.items():
            insert(params, f"{module}/{name}", jax.block_until_ready(value))
    return params


def _read_leaf(leaf: Leaf, tensor: LazyTensor, dtype: np.dtype) -> np.ndarray:
    """One layer's part of a leaf, in the decoder's layout."""
    values = _cast(tensor, dtype)
    return values if tensor.native else leaf.take_from(values)


def _read_row(leaf, members: tuple[LazyTensor, ...], dtype: np.dtype, layer: int):
    return _read_leaf(leaf, members[layer], dtype)


def _find_joined(paths: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The paths of joined kernels and biases, and those of their parts."""
    found = {
        key: find_joined(
            {
                path.removeprefix("blocks/").removesuffix(f"/{key}")
                for path in paths
                if path.endswith(f"/{key}")
            }
        )
        for key in ("kernel", "bias")
    }
    return {
        f"blocks/{name}/{key}": tuple(f"blocks/{part}/{key}" for part in parts)
        for key, maps in found.items()
        for name, parts in maps.items()
    }


def _can_stay(leaf: Leaf, found: Mapping[str, tuple[LazyTensor, ...]]) -> bool:
    return _is_map(leaf) and all(
        t.kind in quantised.GGUF or t.read_sparse is not None for t in found[leaf.path]
    )


def _is_map(leaf: Leaf) -> bool:
    return leaf.stacked and leaf.path.endswith("/kernel")


def _check_kind(config: DecoderConfig, kind: str) -> None:
    """Refuses a type that no kernel, or none of this model, can be packed to."""
    quantised.check_packer("params", "packed", kind)
    for leaf in filter(_is_map, list_leaves(config)):
        name = leaf.path.removeprefix("blocks/").removesuffix("/kernel")
        quantised.check_blocks("params", name, kind, leaf.shape[0])


def _quantise_all(
    kernels: Iterable[np.ndarray], shape: tuple[int, ...], kind: str
) -> dict[str, jax.Array]:
    """The leaf "packed" and its flag, of kernels [in, out] quantised one by one."""
    layers, inputs, outputs = shape
    rows = (_quantise(kind, kernel) for kernel in kernels)
    packed = layers, outputs, quantised.KINDS[kind].row_bytes(inputs)
    return {
        "packed": _stack(rows, packed, np.dtype(np.uint8)),
        f"kind/{kind}": jnp.ones((layers,), jnp.bool),
    }


@functools.partial(jax.jit, static_argnums=0)
def _quantise(kind: str, kernel: jax.Array) -> jax.Array:
    return quantised.pack_rows(kind, kernel.T)


def _read_packed(members: tuple[LazyTensor, ...]) -> dict[str, jax.Array]:
    """The leaf "packed" and its flags "kind/...", of tensors kept as their bytes."""
    outputs, inputs = members[0].shape
    kinds = [tensor.kind for tensor in members]
    width = max(quantised.KINDS[kind].row_bytes(inputs) for kind in kinds)

    def row(tensor: LazyTensor) -> np.ndarray:
        assert tensor.read_packed is not None  # it has a kind
        rows = tensor.read_packed()
        return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))

    shape = len(members), outputs, width
    flags = {f"kind/{k}": jnp.array([k == other for other in kinds]) for k in kinds}
    return {"packed": _stack(map(row, members), shape, np.dtype(np.uint8))} | flags


def _read_sparse(members: tuple[LazyTensor, ...]) -> Any:
    """The sparse matrix of all layers, as JAX arrays."""
    layers = [tensor.read_sparse() for tensor in members if tensor.read_sparse]
    return jax.tree.map(jnp.asarray, pruned.stack(layers))


def _stack(
    rows: Iterable[np.ndarray | jax.Array], shape: tuple[int, ...], dtype: np.dtype
) -> jax.Array:
    """The rows as one array, filled in place: beside it there is one row."""
    value = jnp.zeros(shape, dtype)
    for layer, row in enumerate(rows):
        value = _write_row(value, row, layer).block_until_ready()
    return value


@functools.partial(jax.jit, donate_argnums=0)
def _write_row(stacked: jax.Array, row: jax.Array, layer: jax.Array) -> jax.Array:
    """`stacked[layer] = row` in the same buffer, which is donated."""
    return jax.lax.dynamic_update_index_in_dim(stacked, row, layer, 0)


def _cast(tensor: LazyTensor, dtype: np.dtype) -> np.ndarray:
    values = read_finite(tensor)
    if values.dtype == dtype:
        return values
    with np.errstate(all="ignore"):
        cast = values.astype(dtype)
    if np.isinf(cast).any():
        raise CheckpointError(
            f"{tensor.origin}: tensor {tensor.name!r} holds values beyond "
            f"{ml_dtypes.finfo(dtype).max}, the largest {dtype}. Take bfloat16 "
            "or float32."
        )
    return cast


def convert(tensor: LazyTensor, dtype: np.dtype) -> LazyTensor:
    """The tensor in another dtype; a value beyond it is refused when it is read."""
    read = functools.partial(_cast, tensor, dtype)
    return dataclasses.replace(tensor, dtype=dtype, read=read)


def check_leaf(
    what: str, value: Any, shape: tuple[int, ...], needs: str, kind: str = "weights"
) -> None:
    """Refuses a leaf that is to be saved: missing, of another shape or dtype.

    `what` names it, `needs` says what demands the shape.
    """
    if value is None or value.shape != shape:
        given = "is missing" if value is None else f"has shape {value.shape}"
        raise CheckpointError(f"{what} {given}, but {needs} {shape}.")
    check_dtype(what, value.dtype, kind)


def disassemble(config: DecoderConfig, params: Mapping) -> list[LazyTensor]:
    """The tree's tensors under Hugging Face names, each copied to the host when read.

    Raises:
      CheckpointError: the tree is not that of `Decoder(config)`; names the leaf.
    """
    given = by_key(params)
    for path in given:
        if path.endswith("/packed"):
            raise CheckpointError(
                f"save: parameter {path!r} holds quantised bytes, which a Hugging Face "
                "folder cannot. Save what `params(packed=False)` gives, or a merged "
                "state."
            )
    stored: dict[str, list[tuple]] = {}  # several parts where a tensor is fused
    for leaf in list_leaves(config):
        shape = (config.layers, *leaf.shape) if leaf.stacked else leaf.shape
        value = given.pop(leaf.path, None)
        check_leaf(f"save: parameter {leaf.path!r}", value, shape, "config needs shape")
        for layer, name in enumerate(leaf.list_names("huggingface", config.layers)):
            stored.setdefault(name, []).append((leaf, value, layer))
    if given:
        raise CheckpointError(
            f"save: parameter {next(iter(given))!r} has no place in config. Merge "
            "adapters first (`finetuner.merged(state)`)."
        )
    return [_join(name, parts) for name, parts in stored.items()]


def _join(
    name: str, parts: list[tuple[Leaf, jax.Array | np.ndarray, int]]
) -> LazyTensor:
    """The stored tensor that holds one leaf, or several leaves side by side."""
    leaf = parts[0][0]
    dtypes = {np.dtype(value.dtype) for _, value, _ in parts}
    if len(dtypes) > 1:
        paths = ", ".join(part.path for part, _, _ in parts)
        raise CheckpointError(
            f"save: parameters {paths} have dtypes {_list_dtypes(dtypes)}, but are "
            f"stored in one tensor, {name!r}. Cast them to one."
        )

    def read() -> np.ndarray:
        values = [_fetch(*part) for part in parts]
        return values[0] if len(values) == 1 else np.concatenate(values, axis=-1)

    return LazyTensor(name, leaf.stored_shape, dtypes.pop(), read, "params")


def _fetch(leaf: Leaf, value: jax.Array | np.ndarray, layer: int) -> np.ndarray:
    if not leaf.stacked:
        return leaf.as_stored(np.asarray(value))
    if isinstance(value, np.ndarray):
        return leaf.as_stored(value[layer])
    # The layer is an operand: one compiled slice serves all of them.
    row = jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
    return leaf.as_stored(np.asarray(row))


def count_bytes(tensors: Iterable[LazyTensor]) -> int:
    """Bytes that the values take."""
    return sum(tensor.nbytes for tensor in tensors)


def _list_dtypes(dtypes: Iterable[np.dtype]) -> str:
    return ", ".join(map(str, dtypes))
