"""Folders of sparse models: what `jmem.sparse.flash_llm` packed, kept packed on disk.

    config.json, tokenizer.json ...   as in a Hugging Face folder
    sparse.safetensors                every array of the decoder's tree under its path,
                                      as "blocks/mlp/up/sparse/masks"
    sparse.json                       version, each map's format and sizes, and a digest
                                      of every array, of stacked ones one a layer

The weights' file has a name of its own, so that no other program takes the folder for
one whose linear maps are missing.

Checks   Files are whole (`safetensors`) and the manifest is what was written (sealed);
         it names every array, and the arrays are those of the configuration. As a layer
         is read, its bytes are those that were written, and its matrix one that a
         packer makes.
Memory   A layer's arrays are read at a time.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jmem import disk
from jmem.checkpoints import files, safetensors
from jmem.checkpoints.files import CheckpointError, LazyTensor
from jmem.checkpoints.layout import WEIGHT_DTYPES, check_leaf
from jmem.checkpoints.names import Leaf, list_leaves
from jmem.models.config import DecoderConfig
from jmem.nn import pruned
from jmem.nn.maps import find_maps
from jmem.nn.quantised import find_unpacked_dtype
from jmem.program import by_key

MANIFEST = "sparse.json"
STEM = "sparse"
"""Of the weights' file or files."""
VERSION = 1
_LIMIT = 1 << 26
"""Longest manifest in bytes."""
_DTYPES = {str(dtype): dtype for dtype in WEIGHT_DTYPES}


def is_sparse(params: Mapping) -> bool:
    """Whether a tree of parameters has a sparse leaf."""
    return any("/sparse/" in path for path in by_key(params))


def collect(
    config: DecoderConfig, params: Mapping
) -> tuple[list[LazyTensor], dict[str, Any], dict[str, list[str]]]:
    """The arrays to write, what the manifest says of maps, and the digests.

    These are filled as the arrays are read.

    Raises:
      CheckpointError: the tree is not that of `Decoder(config)`; names the leaf.
    """
    given, maps = by_key(params), {}
    tensors: list[LazyTensor] = []
    digests: dict[str, list[str]] = {}
    leaves = find_maps(params["blocks"])
    dtype = str(find_unpacked_dtype(params["blocks"]))
    for leaf in list_leaves(config):
        module, _, name = leaf.path.rpartition("/")
        own = leaves.get(module.removeprefix("blocks/"), {}).get("sparse")
        if name != "kernel" or own is None:
            shape = (config.layers, *leaf.shape) if leaf.stacked else leaf.shape
            value = given.pop(leaf.path, None)
            check_leaf(f"save: parameter {leaf.path!r}", value, shape, "config needs")
            tensors.append(_digest(leaf.path, value, leaf.stacked, digests))
            continue
        found, kind = pruned.find_format(own), type(own).__name__
        shape = (config.layers, *leaf.shape)
        if pruned.find_shape(own) != shape:
            raise CheckpointError(
                f"save: parameter '{module}/sparse' stands for a kernel of shape "
                f"{pruned.find_shape(own)}, but config needs {shape}."
            )
        sizes = {size: getattr(own, size) for size in found.sizes}
        values = str(getattr(own, found.arrays[0]).dtype)
        stands = values if values in _DTYPES else sizes.get("dtype", dtype)
        maps[module] = {"format": kind, "dtype": stands, "sizes": sizes}
        for array in found.arrays:
            path = f"{module}/sparse/{array}"
            if (value := given.pop(path, None)) is not None:
                tensors.append(_digest(path, value, True, digests))
    if given:
        raise CheckpointError(
            f"save: parameter {next(iter(given))!r} has no place in config. Merge "
            "adapters first (`finetuner.merged(state)`)."
        )
    return tensors, maps, digests


def _digest(
    name: str, value: Any, stacked: bool, digests: dict[str, list[str]]
) -> LazyTensor:
    def read() -> np.ndarray:
        array = np.asarray(value)
        digests[name] = [_hash(row) for row in (array if stacked else array[None])]
        return array

    return LazyTensor(name, value.shape, np.dtype(value.dtype), read, "params")


def _hash(array: np.ndarray) -> str:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(data).hexdigest()


def write_manifest(
    stage: Path, maps: Mapping[str, Any], digests: Mapping[str, list[str]]
) -> None:
    """Writes what the folder's weights are, once their digests are known."""
    values = {"version": VERSION, "maps": maps, "digests": digests}
    files.write_text(stage / MANIFEST, disk.seal(values, indent=1, sort_keys=True))


def read_folder(
    folder: Path, config: DecoderConfig
) -> dict[str, tuple[LazyTensor, ...]]:
    """The tensors of each leaf of the decoder, layer by layer; no values are read.

    Raises:
      CheckpointError: manifest, files and configuration do not fit together; names
        file, tensor and rule.
    """
    maps, digests = _read_manifest(folder / MANIFEST)
    tensors = safetensors.read_folder(folder, STEM)
    where = folder / MANIFEST
    for name in tensors.keys() ^ digests.keys():
        here = tensors[name].origin if name in tensors else where
        why = f"{MANIFEST} has no digest of it" if name in tensors else "no file has it"
        raise CheckpointError(f"{here}: tensor {name!r}: {why}. Copy the folder again.")
    read = _Reader(tensors, digests, config.layers)
    found = {}
    for leaf in list_leaves(config):
        module, _, name = leaf.path.rpartition("/")
        if name == "kernel" and module in maps:
            found[leaf.path] = _list_sparse(read, where, leaf, maps.pop(module))
        else:
            found[leaf.path] = tuple(read.list_rows(leaf))
    if left := [*maps, *(tensors.keys() - read.used)]:
        raise CheckpointError(
            f"{where}: {left[0]!r} has no place in the model of config.json. It is "
            "another model's."
        )
    return found


def _read_manifest(path: Path) -> tuple[dict[str, dict], dict[str, list[str]]]:
    raw, where = files.read_whole(path, _LIMIT), str(path)
    version = files.parse_json(raw, where).get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{where}: version {version!r:.40}; this jmem reads 1 to {VERSION}. A "
            "later one wrote it: update jmem."
        )
    try:
        values = disk.open_sealed(raw, where, bare=False)
    except disk.DamagedError as error:
        raise CheckpointError(f"{error} Copy the folder again.") from None
    maps, digests = values.get("maps"), values.get("digests")
    if (
        not isinstance(maps, dict)
        or not isinstance(digests, dict)
        or values.keys() != {"version", "maps", "digests"}
    ):
        raise CheckpointError(f"{where}: needs exactly version, maps and digests.")
    for name, own in digests.items():
        if not isinstance(own, list) or not all(isinstance(d, str) for d in own):
            raise CheckpointError(f"{where}: digests of {name!r} are no list of words.")
    for name, own in maps.items():
        fields = {"format", "dtype", "sizes"}
        if not isinstance(own, dict) or own.keys() != fields:
            raise CheckpointError(f"{where}: map {name!r} needs {sorted(fields)}.")
        for field, known in (("format", pruned.FORMATS), ("dtype", _DTYPES)):
            if not isinstance(own[field], str) or own[field] not in known:
                raise CheckpointError(
                    f"{where}: map {name!r} has {field} {own[field]!r:.40}; known are "
                    f"{', '.join(known)}."
                )
        sizes, known = own["sizes"], pruned.FORMATS[own["format"]].sizes
        if not isinstance(sizes, dict) or sizes.keys() != {*known}:
            raise CheckpointError(f"{where}: map {name!r} has no sizes {known}.")
        for size, value in sizes.items():
            halves = size == "dtype" and value in ("bfloat16", "float16")
            if not halves and (type(value) is not int or not 0 <= value < 2**31):
                raise CheckpointError(
                    f"{where}: map {name!r} has {size}={value!r:.40}, which none has."
                )
    return maps, digests


class _Reader:
    """Arrays of the files, some rows at a time, each compared with its digest."""

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        digests: Mapping[str, list[str]],
        layers: int,
    ):
        self.tensors, self.digests, self.layers = tensors, digests, layers
        self.used: set[str] = set()

    def take(self, where: str, name: str) -> LazyTensor:
        """The array of this name, marked as used."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{where}: tensor {name!r} is missing. Copy it again."
            )
        self.used.add(name)
        return self.tensors[name]

    def read(self, tensor: LazyTensor, layer: int | None) -> np.ndarray:
        """A layer of the array, or all of it; what was written, or an error."""
        if layer is None:
            value = tensor.read()
        else:
            assert tensor.read_rows is not None  # safetensors always has it
            value = tensor.read_rows(layer, layer + 1)[0]
        digests, at = self.digests[tensor.name], layer or 0
        if at >= len(digests) or digests[at] != _hash(value):
            place = "" if layer is None else f", layer {layer}"
            raise CheckpointError(
                f"{tensor.origin}: tensor {tensor.name!r}{place}: its bytes are not "
                "those that were written. Copy the file again."
            )
        return value

    def list_rows(self, leaf: Leaf) -> Iterator[LazyTensor]:
        """The tensors of a leaf that is no sparse map's kernel."""
        tensor = self.take("sparse", leaf.path)
        shape = (self.layers, *leaf.shape) if leaf.stacked else leaf.shape
        what = f"{tensor.origin}: tensor {leaf.path!r}"
        check_leaf(what, tensor, shape, "config.json needs shape")
        for layer in range(self.layers) if leaf.stacked else (None,):
            read = functools.partial(self.read, tensor, layer)
            yield LazyTensor(
                leaf.path, leaf.shape, tensor.dtype, read, tensor.origin, native=True
            )


def _list_sparse(
    reader: _Reader, where: Path, leaf: Leaf, own: Mapping[str, Any]
) -> tuple[LazyTensor, ...]:
    """The layers of a sparse map, each of which can be read as a kernel [in, out]."""
    module = leaf.path.removesuffix("/kernel")
    kind, sizes, dtype = (
        pruned.FORMATS[own["format"]],
        own["sizes"],
        _DTYPES[own["dtype"]],
    )
    arrays = {}
    for array in kind.arrays:
        name = f"{module}/sparse/{array}"
        if array == "scales" and name not in reader.tensors:
            continue
        tensor = arrays[array] = reader.take(str(where), name)
        if not tensor.shape or tensor.shape[0] != reader.layers:
            raise CheckpointError(
                f"{tensor.origin}: tensor {name!r} has shape {tensor.shape}, but "
                f"config.json has {reader.layers} layers."
            )
    if (sizes["inputs"], sizes["outputs"]) != leaf.shape:
        raise CheckpointError(
            f"{where}: map {module!r} is [{sizes['outputs']}, {sizes['inputs']}], but "
            f"config.json needs {[*leaf.shape[::-1]]}. It is another model's."
        )

    def read_sparse(layer: int) -> Any:
        held = {name: reader.read(tensor, layer) for name, tensor in arrays.items()}
        absent = dict.fromkeys(kind.arrays)
        try:
            matrix = kind.make(**(absent | held), **sizes)
            kind.check(matrix)
        except (TypeError, ValueError) as error:
            origin = next(iter(arrays.values())).origin
            raise CheckpointError(
                f"{origin}: tensor '{module}/sparse', layer {layer}: {error}"
            ) from None
        return matrix

    def read(layer: int) -> np.ndarray:
        return kind.unpack(read_sparse(layer)).astype(dtype, copy=False).T

    origin = next(iter(arrays.values())).origin
    return tuple(
        LazyTensor(
            f"{module}/sparse",
            leaf.shape,
            dtype,
            functools.partial(read, layer),
            origin,
            kind=own["format"],
            read_sparse=functools.partial(read_sparse, layer),
            native=True,
        )
        for layer in range(reader.layers)
    )
