"""What tests keep from run to run: programs compiled for the CPU, reports, bytecode.

$JMEM_TEST_CACHE names the folder, by default `jmem-tests` in the user's cache folder;
set it to "" to keep nothing. Everything in it may be deleted at any time: an entry that
is missing, half written or damaged is made again. Below it is a folder for each lock
file and kind of processor. JAX and `jmem.memory.cache` choose their entries' names by
content: the lowered program, flags, compile options, target and versions. Python keeps
bytecode by a source's date and size: without it each process that a test starts parses
JAX again, a second and more, where an installation brings none and none may be written.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import shutil
from collections.abc import Iterator

LOCK = pathlib.Path(__file__).parents[1] / "uv.lock"
LIMIT = 2 << 30
"""Bytes above which the folder is emptied before a run."""


def folder() -> pathlib.Path | None:
    """Where things are kept; None keeps none."""
    chosen = os.environ.get("JMEM_TEST_CACHE")
    if chosen == "":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(chosen or pathlib.Path(home) / "jmem-tests")


def settings() -> dict[str, str]:
    """Environment variables that tell JAX and Python, as they start, and jmem where to
    keep things.

    Makes the folder, and empties it first where it has grown beyond LIMIT.
    """
    nothing = {"JMEM_CACHE_DIR": ""}
    where = folder()
    if where is None:
        return nothing
    mine = where / _digest()
    try:
        if "PYTEST_XDIST_WORKER" not in os.environ and _size(where) > LIMIT:
            shutil.rmtree(where, ignore_errors=True)
        for name in ("programs", "reports", "bytecode"):
            (mine / name).mkdir(parents=True, exist_ok=True)
    except OSError:
        return nothing  # a folder that cannot be written is no error
    return {
        "JMEM_CACHE_DIR": str(mine / "reports"),
        "JAX_COMPILATION_CACHE_DIR": str(mine / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(mine / "bytecode"),
    }


@contextlib.contextmanager
def apart(where: pathlib.Path | None = None) -> Iterator[None]:
    """Inside, JAX keeps programs in another folder; in none by default."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)
    jax.config.update(name, where and str(where))
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()


def _digest() -> str:
    """Of the lock file and of the processor that programs are compiled for."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith("flags")), "")
    parts = (LOCK.read_bytes(), platform.processor().encode(), flags.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _size(where: pathlib.Path) -> int:
    """Bytes of all files below a folder; those that go meanwhile count nothing."""
    total = 0
    for path in where.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total
