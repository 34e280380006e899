"""Safetensors: single files and sharded folders, in lazily and out atomically.

Format   8 bytes little-endian length, a JSON header {name: {dtype, shape,
         data_offsets}}, then the data, back to back. https://github.com/huggingface/safetensors
Checks   Header length, JSON, unique names, dtype, shape * itemsize == extent; extents
         cover the data exactly: no overlap, no gap, nothing beyond the end.
Memory   Reading costs the header; each tensor is read when asked for. Writing holds one
         tensor at a time (the package's own writer wants all of them at once).
Differs  The package reads through mmap and has no bfloat16 in NumPy; here values are
         read into memory of their own, and bfloat16 is ml_dtypes'. Tests open our files
         with the package and the package's files with this module.
"""

import functools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jmem.checkpoints import files
from jmem.checkpoints.files import CheckpointError, LazyTensor, read_span

STEM = "model"
"""What the names of a checkpoint's files begin with."""
SINGLE = f"{STEM}.safetensors"
INDEX = f"{SINGLE}.index.json"

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The format's names for NumPy dtypes (all of whole bytes)."""

_HEADER_LIMIT = 100_000_000
"""Longest header in bytes; the package's own limit."""
_RANK_LIMIT = 32


def read_file(path: Path) -> dict[str, LazyTensor]:
    """Tensors of one file by name, in the order of their data; no values are read.

    Raises:
      CheckpointError: any rule of the format is broken; names file, tensor and value.
    """
    file, size = files.open_file(path)
    with file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(
                f"{path}: header length {length} does not fit: the file has {size} "
                f"bytes and a header at most {_HEADER_LIMIT}. It is truncated, or not "
                "a safetensors file."
            )
        header = files.parse_json(file.read(length), f"{path}: header")
    data_start, data_bytes = 8 + length, size - 8 - length

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings.")

    entries = sorted(
        (_parse_entry(path, name, value, data_bytes) for name, value in header.items()),
        key=lambda entry: entry[1:3],
    )
    position, previous = 0, "the header"
    tensors = {}
    for name, begin, end, dtype, shape in entries:
        if begin != position:
            what = "overlaps" if begin < position else "leaves a gap after"
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {begin} of the data and "
                f"{what} {previous!r}, which ends at {position}; tensors lie back to "
                "back. The file is damaged."
            )
        position, previous = end, name
        stored = path, data_start + begin, dtype, shape
        tensors[name] = LazyTensor(
            name,
            shape,
            dtype,
            functools.partial(_read, *stored),
            str(path),
            read_rows=functools.partial(_read_rows, *stored),
        )
    if position != data_bytes:
        raise CheckpointError(
            f"{path}: {data_bytes - position} bytes follow the last tensor, "
            f"{previous!r}, which ends at byte {position} of {data_bytes}. The file "
            "is damaged or carries something else."
        )
    return tensors


def _parse_entry(
    path: Path, name: str, value: Any, data_bytes: int
) -> tuple[str, int, int, np.dtype, tuple[int, ...]]:
    """(name, begin, end, dtype, shape) of one header entry, each checked by itself."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or value.keys() != {
        "dtype",
        "shape",
        "data_offsets",
    }:
        raise CheckpointError(f"{where}: needs exactly dtype, shape and data_offsets.")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: dtype {value['dtype']!r} is not one of {', '.join(DTYPES)}."
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _RANK_LIMIT:
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of sizes.")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} is not [begin, end].")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise CheckpointError(
            f"{where}: data_offsets [{begin}, {end}] lie outside the file's "
            f"{data_bytes} data bytes. It is truncated or damaged; copy it again."
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        raise CheckpointError(
            f"{where}: {value['dtype']} of shape {shape} takes {nbytes} bytes, but "
            f"data_offsets [{begin}, {end}] span {end - begin}."
        )
    return name, begin, end, dtype, tuple(shape)


def _are_sizes(value: Any) -> bool:
    """A list of integers that a file offset can hold (bool is no integer here)."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _read(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]):
    nbytes = math.prod(shape) * dtype.itemsize
    return read_span(path, offset, nbytes).view(dtype).reshape(shape)


def _read_rows(
    path: Path,
    offset: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    start: int,
    stop: int,
):
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    part = (min(stop, shape[0]) - start, *shape[1:])
    return _read(path, offset + start * row_bytes, dtype, part)


def read_folder(folder: Path, stem: str = STEM) -> dict[str, LazyTensor]:
    """Tensors of `<stem>.safetensors`, or of the shards its index names.

    Raises:
      CheckpointError: neither is there, a shard is missing, or index and shards
        disagree about where a tensor lies.
    """
    single = folder / f"{stem}.safetensors"
    if single.exists():
        return read_file(single)
    index = folder / f"{single.name}.index.json"
    if not index.exists():
        raise CheckpointError(
            f"{folder}: holds neither {single.name} nor {index.name}. Other formats "
            "(.bin, .pt) are pickles and are never opened; convert them to safetensors."
        )
    weight_map = files.read_json(index, _HEADER_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensors to shards.")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard and Path(shard).name == shard
        if not plain or not shard.isprintable():
            raise CheckpointError(
                f"{index}: tensor {name!r} lies in {shard!r}, which is not the plain "
                "name of a file in the same folder."
            )
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not os.path.exists(folder / shard):
            raise CheckpointError(
                f"{folder / shard}: shard is missing, though {index.name} places "
                f"{sum(value == shard for value in weight_map.values())} tensors in "
                "it. Copy the whole checkpoint."
            )
        held = read_file(folder / shard)
        for name in held:
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{folder / shard}: holds tensor {name!r}, which {index.name} "
                    f"places in {weight_map.get(name)!r}."
                )
        tensors |= held
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder / shard}: lacks tensor {name!r}, which {index.name} places "
                "there."
            )
    return tensors


def write_folder(
    folder: Path,
    tensors: Iterable[LazyTensor],
    max_shard_bytes: int | None = None,
    stem: str = STEM,
) -> None:
    """Fills a new folder: `<stem>.safetensors`, or shards and their index.

    Shards are named as Hugging Face names them, filled in the order of `tensors`, and
    hold at most `max_shard_bytes` of values (a larger tensor is a shard of its own).
    What fits one shard is written as one file without an index. Each file is atomic;
    the folder is the caller's, who stages it.

    Raises:
      CheckpointError: as `write`.
    """
    shards: list[list[LazyTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and max_shard_bytes and held + tensor.nbytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    if len(shards) == 1:
        return write(folder / f"{stem}.safetensors", shards[0])
    weight_map: dict[str, str] = {}
    names = [
        f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards):
        for tensor in shard:
            if tensor.name in weight_map:
                raise CheckpointError(
                    f"{folder}: tensor {tensor.name!r} is given twice; names are "
                    "unique."
                )
            weight_map[tensor.name] = name
    for name, shard in zip(names, shards):
        write(folder / name, shard)
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    files.write_text(folder / f"{stem}.safetensors.index.json", text)


def write(path: Path, tensors: Iterable[LazyTensor]) -> None:
    """Writes one file, atomically, holding one tensor in memory at a time.

    Tensors of wider dtypes come first, so that each lies at a multiple of its itemsize.

    Raises:
      CheckpointError: a dtype the format lacks, a name twice, a folder that cannot be
        written; `path` is then as it was before.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        if tensor.name in header or tensor.dtype not in names:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} of dtype {tensor.dtype} cannot be "
                f"written: names are unique and dtypes among {', '.join(DTYPES)}."
            )
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    nbytes = 8 + len(text) + position
    with files.stage_write(path, nbytes) as stage, open(stage, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            values = np.ascontiguousarray(tensor.read(), tensor.dtype)
            assert values.size == math.prod(tensor.shape), tensor
            file.write(values.reshape(-1).view(np.uint8))
        file.flush()
        os.fsync(file.fileno())
