"""Reading files that come from outside, and writing: bounded, strict and atomic.

A checkpoint comes from somebody else. Every reader here checks a length against the
file before it allocates, and reads with `read`, not `mmap`: a file that is truncated
while mapped kills the process with SIGBUS, a short read is an error with a name.
"""

import contextlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written whole; nothing partial is left."""


class CheckpointWarning(UserWarning):
    """A checkpoint that contradicts itself, and how it is read all the same."""


@dataclass(frozen=True)
class LazyTensor:
    """A named array whose values cost nothing until `read()` is called."""

    name: str
    shape: tuple[int, ...]
    """Row-major, as in torch: a linear map is [out, in]."""
    dtype: np.dtype
    """Dtype of what `read` returns."""
    read: Callable[[], np.ndarray]
    origin: str = ""
    """The file it lies in, for error messages."""
    kind: str = ""
    """llama.cpp's name of the type it is stored in; empty in other formats."""
    read_packed: Callable[[], np.ndarray] | None = None
    """The stored bytes, uint8 [..., bytes of a row]; None in other formats."""
    read_rows: Callable[[int, int], np.ndarray] | None = None
    """Rows [start, stop) of axis 0; None where a part cannot be read alone."""
    read_sparse: Callable[[], Any] | None = None
    """The matrix of a sparse map's layer (`jmem.nn.pruned`), as NumPy arrays."""
    native: bool = False
    """It lies as the decoder's leaf does: a kernel is [in, out]."""

    @property
    def nbytes(self) -> int:
        """Bytes that the values take."""
        return math.prod(self.shape) * self.dtype.itemsize


_EXPONENTS = {
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
}
"""Bits that are all one in an infinity and in NaN, and in no other number."""
_CHUNK = 2**16
"""Values looked at together: they stay in the processor's cache."""


def read_finite(tensor: LazyTensor) -> np.ndarray:
    """The values of a tensor of weights.

    Looks at 3 GB a second, where `np.isfinite` of bfloat16 reads a quarter of that.

    Raises:
      CheckpointError: one is infinite or NaN; names the tensor.
    """
    values = tensor.read()
    if exponent := _EXPONENTS.get(values.dtype):
        bits = np.ravel(values).view(f"u{values.itemsize}")
        for start in range(0, bits.size, _CHUNK):
            if (bits[start : start + _CHUNK] & exponent).max() == exponent:
                raise CheckpointError(
                    f"{tensor.origin}: tensor {tensor.name!r} holds values that are "
                    "not finite. Take an earlier save, or copy the file again."
                )
    return values


def open_file(path: Path) -> tuple[BufferedReader, int]:
    """Opens a regular file for reading; returns it with its size in bytes.

    Raises:
      CheckpointError: absent, unreadable, or not a regular file (a pipe would hang).
    """
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            # The caller closes it.
            file = open(path, "rb")  # noqa: SIM115
            return file, os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    raise CheckpointError(f"{path}: not a regular file.")


def read_span(path: Path, offset: int, length: int) -> np.ndarray:
    """`length` bytes from `offset`, as uint8 in memory of their own.

    Raises:
      CheckpointError: the file has become shorter since its header was checked.
    """
    file, size = open_file(path)
    with file:
        if offset + length > size:
            raise CheckpointError(
                f"{path}: bytes {offset} to {offset + length} lie outside its {size} "
                "bytes; the file changed after it was checked. Copy it again."
            )
        data = np.empty(length, np.uint8)
        file.seek(offset)
        if file.readinto(memoryview(data)) != length:
            raise CheckpointError(f"{path}: ends while being read. Copy it again.")
    return data


def read_whole(path: Path, limit: int) -> bytes:
    """The content of a small file.

    Raises:
      CheckpointError: longer than `limit` bytes, or not readable.
    """
    file, size = open_file(path)
    with file:
        if size > limit:
            raise CheckpointError(
                f"{path}: {size} bytes; such a file has at most {limit}."
            )
        return file.read(limit)


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8 whose keys are unique.

    Raises:
      CheckpointError: anything else; the message starts with `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise CheckpointError(f"{where}: key {twice!r} appears twice.")
        return table

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: holds a JSON {type(value).__name__}, not an object."
        )
    return value


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes (`parse_json`)."""
    return parse_json(read_whole(path, limit), str(path))


def check_free(folder: Path) -> None:
    """Passes if a new folder may take this place: nothing is there, or an empty one.

    Raises:
      CheckpointError: anything else is; it is not overwritten.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(
            f"{folder}: exists and is not an empty folder. Choose another, or "
            "remove it."
        )


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 and waits until it is on disk."""
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def stage_write(path: Path, nbytes: int) -> Iterator[Path]:
    """A sibling of `path`, to be filled, that takes its place if the block succeeds.

    The block makes a file or a folder there. If it fails, or is interrupted, what it
    made is removed and `path` is as before. `nbytes` is what it will need on disk.

    Raises:
      CheckpointError: the parent folder is missing, read-only or too full.
    """
    parent = path.parent
    stage = parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise CheckpointError(
                f"{path}: needs {nbytes} bytes, but {parent} has {free} free. "
                "Free some space or choose another folder."
            )
        yield stage
        os.replace(stage, path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}). "
            "Choose a folder that exists, is writable and has room."
        ) from error
    finally:
        if os.path.isdir(stage):
            shutil.rmtree(stage, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                stage.unlink(missing_ok=True)
