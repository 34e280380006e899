"""A folder that a long run may rely on: made, writable and with room."""

import os
import pathlib
import shutil
import tempfile


class FolderError(ValueError):
    """A folder that cannot take a run's files."""


def prepare(folder: str | os.PathLike) -> pathlib.Path:
    """Make `folder` if need be, and prove that a file can be written in it.

    Called before any long work: what would stop the run at its first checkpoint
    stops it here.

    Raises:
      FolderError: the folder cannot be made or written.
    """
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise FolderError(
            f"folder={str(folder)!r} cannot be written: {error.strerror}.\n"
            "Choose a folder on a writable disk with free space."
        ) from error
    return folder


def require_free(folder: pathlib.Path, needed_bytes: int, purpose: str) -> None:
    """Refuse a folder whose disk has less than `needed_bytes` free for `purpose`.

    Raises:
      FolderError: with what is free, and what is asked.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise FolderError(
            f"folder={str(folder)!r} has {free / 2**30:.2f} GiB free, and {purpose} "
            f"take {needed_bytes / 2**30:.2f} GiB.\n"
            "Free some space or choose a folder on another disk."
        )
