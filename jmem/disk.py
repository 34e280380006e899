"""Files that are whole or not there, and that say so when they are read back.

    write_atomically(path, seal({"bytes": 1}))   # with a digest of the values
    open_sealed(path.read_text(), str(path))     # {"bytes": 1}, or DamagedError

What a process that is killed, a full disk or a power cut leaves of a file is the one
before it. What a flipped bit leaves is refused by whoever reads it.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Mapping
from io import FileIO
from typing import Any

DIGEST = "sha256"
"""Key of the digest in a sealed object."""


class DamagedError(ValueError):
    """A file that is not what was written."""


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a whole file or nothing: beside `path`, synced, and renamed over it.

    What is there and no regular file (a pipe, /dev/stdout) is written as it is.

    Raises:
      OSError: it cannot be written; `path` is as before.
    """
    path = pathlib.Path(path)
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")  # names may be any bytes
    if path.exists() and not path.is_file():  # asked first: a pipe has no real path
        path.write_bytes(content)
        return
    path = pathlib.Path(os.path.realpath(path))  # a link goes on leading there
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Wait until the names in a folder are on the disk itself, where it can be told."""
    with contextlib.suppress(OSError):
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def append(file: FileIO, line: bytes) -> None:
    """Write a whole line at the end of an unbuffered file, or nothing.

    Raises:
      OSError: it cannot be written.
    """
    before, left = os.fstat(file.fileno()).st_size, memoryview(line)
    try:
        while left:
            left = left[file.write(left) or 0 :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), before)
        raise


def parse_json(raw: str | bytes, where: str) -> Any:
    """The value of a JSON text; a number that JSON does not know (NaN) is read as well.

    Raises:
      DamagedError: anything else; begins with `where`.
    """
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not JSON: {error}.") from None


def compute_digest(value: Any) -> str:
    """64 hexadecimal digits of a JSON value, whatever the order of its keys."""
    plain = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def seal(values: Mapping[str, Any], **how: Any) -> str:
    """A JSON object as text, with the digest of all else in it; `how` as `json.dumps`.

    >>> open_sealed(seal({"bytes": 1}), "here")
    {'bytes': 1}
    """
    plain = json.loads(json.dumps(values))  # keys and tuples as they will be read
    return json.dumps(plain | {DIGEST: compute_digest(plain)}, **how)


def open_sealed(raw: str | bytes, where: str, *, bare: bool = True) -> dict[str, Any]:
    """The values that were sealed.

    An object without a digest, as older versions wrote, is taken as it is if `bare`.

    Raises:
      DamagedError: no JSON object, or other values than were sealed.
    """
    values = parse_json(raw, where)
    if not isinstance(values, dict):
        raise DamagedError(f"{where}: a JSON {type(values).__name__}, not an object.")
    told = values.pop(DIGEST, None)
    if told != compute_digest(values) and not (bare and told is None):
        raise DamagedError(f"{where}: its values are not those that were written.")
    return values
