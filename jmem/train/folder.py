"""A folder that a long run may rely on: made, writable, with room, and its own."""

import fcntl
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import warnings
from typing import ClassVar


class FolderError(ValueError):
    """A folder that cannot take a run's files."""


class Hold:
    """A folder that is this process's alone until `release`, or until nobody has this.

    Within the process a folder may be held several times. The lock (flock) is of the
    folder itself, leaves no file, and ends with the process however that ends. On a
    network's file system it holds among the processes of one machine.

    Raises:
      FolderError: another process holds it, says which, and the way out; or it cannot
        be opened.
    """

    _taken: ClassVar[dict[tuple[int, int, int], list[int]]] = {}
    """(this process, device, inode) -> [file descriptor, how often it is held]."""
    _lock: ClassVar = threading.RLock()

    def __init__(self, folder: str | os.PathLike):
        self._key = None
        with self._lock:
            try:
                opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                raise FolderError(
                    f"folder={str(folder)!r} cannot be opened: {error.strerror}."
                ) from error
            status = os.fstat(opened)
            # A child that was forked is another process: its own lock, or none.
            key = os.getpid(), status.st_dev, status.st_ino
            if key in self._taken:
                os.close(opened)
            else:
                _lock_folder(opened, folder)
            self._taken.setdefault(key, [opened, 0])[1] += 1
            self._key = key

    def release(self) -> None:
        """Let others have the folder, once nothing else in this process holds it."""
        with self._lock:
            key, self._key = self._key, None
            if key is None or key[0] != os.getpid():
                return
            self._taken[key][1] -= 1
            if not self._taken[key][1]:
                os.close(self._taken.pop(key)[0])

    def __del__(self, ending=sys.is_finalizing):  # modules may be gone by then
        if not ending():
            self.release()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


def _lock_folder(opened: int, folder: str | os.PathLike) -> None:
    """Takes the lock of an open folder, or closes it and raises."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        other = _name_holder(os.fstat(opened).st_ino)
        os.close(opened)
        raise FolderError(
            f"folder={str(folder)!r} is in use by {other}.\n"
            "One process at a time writes there: wait until it ends, stop it, or "
            "choose another folder."
        ) from None
    except OSError as error:
        warnings.warn(
            f"folder={str(folder)!r} cannot be locked ({error.strerror}): see to it "
            "that no other process writes there.",
            stacklevel=3,
        )


def _name_holder(inode: int) -> str:
    """The process that locked a folder, in words, as far as Linux tells."""
    try:
        locks = pathlib.Path("/proc/locks").read_text().splitlines()
        found = (line.split() for line in locks if " FLOCK " in line)
        pid = next(w[4] for w in found if w[5].endswith(f":{inode}") and int(w[4]) > 0)
        words = pathlib.Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
    except (OSError, StopIteration, IndexError, ValueError):
        return "another process"
    command = " ".join(word.decode(errors="replace") for word in words).strip()
    return f"process {pid} ({command[:120]})"


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
