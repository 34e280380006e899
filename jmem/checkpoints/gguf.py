"""GGUF, llama.cpp's file of one model: metadata, tokenizer, quantised tensors; lazily.

Format   Magic, version, counts, key-value metadata, tensor infos, then the data, each
         tensor at the next multiple of the alignment.
         https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
Values   Dequantised to float32 by the `gguf` package (any type it knows), a few rows at
         a time: reading a tensor costs its float32 size and no more. Or the bytes as
         they are (`LazyTensor.read_packed`).
Checks   Every length against the file before it is used; names unique; tensors back to
         back, so no overlap, no gap, nothing beyond the end. The package's own reader
         checks none of it and takes 5 s for a vocabulary of 49,152.
"""

import functools
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from jmem.checkpoints.files import CheckpointError, LazyTensor, open_file, read_span

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"} | {
    10: "Q",
    11: "q",
    12: "d",
}
"""`struct` letter of each scalar value type."""
_STRING, _ARRAY = 8, 9
_HEADER_LIMIT = 1 << 26
"""Longest metadata and tensor infos, in bytes; a vocabulary of 262,144 takes 15 MB."""
_CHUNK_BYTES = 1 << 22
"""Float32 bytes dequantised at a time."""


@dataclass(frozen=True)
class Gguf:
    """The checked content of one file; tensors hold no values until read."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]


def read_file(path: Path) -> Gguf:
    """Metadata and tensors by name; no values are read.

    Raises:
      CheckpointError: any rule of the format is broken; names file, place and value.
    """
    file, size = open_file(path)
    with file:
        header = _Header(path, file, size)
        magic, version = header.take(4, "the magic"), header.read_number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise CheckpointError(
                f"{path}: magic {magic!r}, version {version}; supported is b'GGUF', "
                "version 2 or 3, little-endian."
            )
        tensor_count, field_count = header.read_number("Q"), header.read_number("Q")
        metadata = header.collect(_read_fields(header, field_count), "metadata key")
        infos = header.collect(_read_infos(header, tensor_count), "tensor")
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path}: is one of {metadata['split.count']} parts. Merge them first with "
            "`llama-gguf-split --merge`."
        )
    alignment = metadata.get("general.alignment", 32)
    if (
        type(alignment) is not int
        or not 0 < alignment <= 1 << 20
        or (alignment & (alignment - 1))
    ):
        raise CheckpointError(
            f"{path}: general.alignment {alignment!r} is not a power of two."
        )
    tensors = _place(path, infos, header.position, size, alignment)
    return Gguf(path, metadata, tensors)


class _Header:
    """Reads a file's header value by value, never beyond the file or a limit."""

    def __init__(self, path: Path, file: BufferedReader, size: int):
        self.path, self.file, self.position = path, file, 0
        self.end = min(size, _HEADER_LIMIT)

    def take(self, length: int, what: str) -> bytes:
        if length > self.end - self.position:
            raise CheckpointError(
                f"{self.path}: {what} at byte {self.position} takes {length} bytes, "
                f"but only {self.end - self.position} are left. The file is truncated "
                "or damaged; copy it again."
            )
        self.position += length
        data = self.file.read(length)
        if len(data) != length:
            raise CheckpointError(f"{self.path}: ends while being read.")
        return data

    def read_number(self, letter: str):
        layout = struct.Struct("<" + letter)
        return layout.unpack(self.take(layout.size, "a number"))[0]

    def read_string(self, what: str) -> str:
        start = self.position
        try:
            return self.take(self.read_number("Q"), what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: {what} at byte {start} is not UTF-8 ({error})."
            ) from error

    def read_value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.read_string(what)
        if kind == _ARRAY:
            kind, count = self.read_number("I"), self.read_number("Q")
            if kind == _STRING:
                # Each string takes 8 bytes at least: a count beyond that is a lie.
                self.check_count(count, 8, what)
                return [self.read_string(what) for _ in range(count)]
            dtype = np.dtype("<" + self.find_letter(kind, what))
            return np.frombuffer(
                self.take(count * dtype.itemsize, what), dtype
            ).tolist()
        letter = self.find_letter(kind, what)
        value = self.read_number(letter)
        # 1e-5 was stored as float32: its shortest decimal, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if letter == "f" else value

    def find_letter(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: {what} before byte {self.position} has value type "
                f"{kind}; supported are numbers, strings and flat arrays (0 to 12)."
            )
        return _SCALARS[kind]

    def check_count(self, count: int, least: int, what: str) -> None:
        if count * least > self.end - self.position:
            raise CheckpointError(
                f"{self.path}: {what} counts {count} items of at least {least} bytes, "
                f"but only {self.end - self.position} bytes are left. The file is "
                "truncated or damaged; copy it again."
            )

    def collect(self, pairs: Iterator[tuple[str, Any]], what: str) -> dict[str, Any]:
        """The pairs as a dict; refuses a name that appears twice."""
        found = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(f"{self.path}: {what} {name!r} appears twice.")
            found[name] = value
        return found


def _read_fields(header: _Header, count: int) -> Iterator[tuple[str, Any]]:
    header.check_count(count, 8 + 4 + 1, "the metadata")
    for _ in range(count):
        key = header.read_string("a metadata key")
        yield key, header.read_value(header.read_number("I"), f"metadata {key!r}")


def _read_infos(header: _Header, count: int):
    """(name, (shape row-major, type, offset in the data)) of each tensor."""
    header.check_count(count, 8 + 4 + 8 + 4 + 8, "the list of tensors")
    for _ in range(count):
        name = header.read_string("a tensor name")
        rank = header.read_number("I")
        if not 1 <= rank <= 4:
            raise CheckpointError(
                f"{header.path}: tensor {name!r} has {rank} dimensions; 1 to 4 are "
                "possible."
            )
        sizes = [header.read_number("Q") for _ in range(rank)]
        if 0 in sizes:
            raise CheckpointError(f"{header.path}: tensor {name!r} has a size of 0.")
        yield (
            name,
            (tuple(sizes[::-1]), header.read_number("I"), header.read_number("Q")),
        )


def _place(path, infos, header_end: int, size: int, alignment: int):
    """Lazy tensors, after checks that types are known and extents fill the file."""

    def aligned(position: int) -> int:
        return -(-position // alignment) * alignment

    data_start = aligned(header_end)
    position, previous = 0, "the header"
    tensors = {}
    for name, (shape, kind, offset) in sorted(infos.items(), key=lambda i: i[1][2]):
        where = f"{path}: tensor {name!r}"
        block, block_bytes, type_name = _find_block(kind, where)
        if shape[-1] % block:
            raise CheckpointError(
                f"{where}: rows of {shape[-1]} values are not whole blocks of {block}. "
                "The file is damaged, or was not written by llama.cpp."
            )
        row_bytes = shape[-1] // block * block_bytes
        nbytes = math.prod(shape[:-1]) * row_bytes
        if offset != aligned(position):
            what = "overlaps" if offset < position else "does not follow"
            raise CheckpointError(
                f"{where} starts at byte {offset} of the data and {what} {previous!r}, "
                f"which ends at {position}; each starts at the next multiple of "
                f"{alignment}. The file is damaged."
            )
        if data_start + offset + nbytes > size:
            raise CheckpointError(
                f"{where}: its bytes {offset} to {offset + nbytes} lie outside the "
                f"file's {max(size - data_start, 0)} data bytes. It is truncated or "
                "damaged; copy it again."
            )
        stored = path, data_start + offset
        tensors[name] = LazyTensor(
            name,
            shape,
            np.dtype(np.float32),
            functools.partial(_dequantise, *stored, kind, shape, row_bytes),
            str(path),
            type_name,
            functools.partial(_read_packed, *stored, shape, row_bytes),
        )
        position, previous = offset + nbytes, name
    if tensors and size > data_start + aligned(position):
        raise CheckpointError(
            f"{path}: {size - data_start - position} bytes follow the last tensor, "
            f"{previous!r}. The file is damaged or carries something else."
        )
    return tensors


@functools.cache
def _list_dequantisable() -> Mapping[int, tuple[int, int, str]]:
    """(values and bytes of a block, name) of each type the package can dequantise."""
    import gguf

    known = {}
    for kind, (values, nbytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            with np.errstate(all="ignore"):
                gguf.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            continue
        known[int(kind)] = (values, nbytes, kind.name)
    return known


def _find_block(kind: int, where: str) -> tuple[int, int, str]:
    if kind not in _list_dequantisable():
        names = ", ".join(name for _, _, name in _list_dequantisable().values())
        raise CheckpointError(f"{where}: type {kind} is not one of {names}.")
    return _list_dequantisable()[kind]


def _read_packed(
    path: Path, offset: int, shape: tuple[int, ...], row_bytes: int
) -> np.ndarray:
    rows = read_span(path, offset, math.prod(shape[:-1]) * row_bytes)
    return rows.reshape(*shape[:-1], row_bytes)


def _dequantise(
    path: Path, offset: int, kind: int, shape: tuple[int, ...], row_bytes: int
) -> np.ndarray:
    import gguf

    rows, width = math.prod(shape[:-1]), shape[-1]
    step = max(1, _CHUNK_BYTES // (4 * width))
    values = np.empty((rows, width), np.float32)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        raw = read_span(path, offset + start * row_bytes, (stop - start) * row_bytes)
        with np.errstate(all="ignore"):  # scales in a damaged file may be anything
            values[start:stop] = gguf.dequantize(
                raw.reshape(stop - start, row_bytes), gguf.GGMLQuantizationType(kind)
            )
    return values.reshape(shape)
