"""Reports of programs that were measured before, on this machine.

The key is everything the bytes follow from: the lowered program, labels, target,
compile options, versions, and the code that reads XLA's plan. A report also names
lines of source files, so it is kept with their digests, and not taken once one has
changed. Failures are not kept. The folder is $JMEM_CACHE_DIR, by default ~/.cache/jmem;
set it to "" to keep nothing. One that cannot be written, or is not there as the user
has no home, is no error, and neither is an entry that is not what was written: the
program is measured again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jaxlib.version

from jmem import disk
from jmem.memory.report import MemoryReport
from jmem.program import Program
from jmem.targets import Target


def folder() -> pathlib.Path | None:
    """Where reports are kept; None keeps none."""
    chosen = os.environ.get("JMEM_CACHE_DIR")
    if chosen is not None:
        return pathlib.Path(chosen) if chosen else None
    try:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # no home, as of a user of a container's own
        return None
    return pathlib.Path(home) / "jmem"


def make_key(
    program: Program,
    stablehlo: str,
    target: Target,
    options: Mapping[str, Any],
    bounds: bool,
) -> str:
    """sha256 of everything that decides what a report says; equal in every process.

    `stablehlo` is the lowered program's text.
    """
    names = program.name_arguments()
    parts = {
        "stablehlo": stablehlo,
        "name": program.name,
        "written": _locate(program.fn),
        "leaves": [
            (names[position], path, label, kind)
            for (position, path, _), label, kind in zip(
                program.list_leaves(), program.label_leaves(), program.classify_leaves()
            )
        ],
        "donate": program.donate,
        "target": dataclasses.asdict(target),
        "options": sorted(options.items()),
        "bounds": bounds,
        "flags": os.environ.get("XLA_FLAGS", ""),
        "versions": (jax.__version__, jaxlib.version.__version__),
        "reader": _digest_reader(),
    }
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def load(name: str) -> MemoryReport | None:
    """The report kept under a key, or None; a damaged one counts as none."""
    where = folder()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        raw = (where / f"{name}.json").read_bytes() if where else b""
        entry = disk.open_sealed(raw, name, bare=False)
        if entry["sources"] == _digest_files(entry["sources"]):
            report = MemoryReport.from_json(entry["report"])
            return dataclasses.replace(report, cached=True)
    return None


def store(name: str, report: MemoryReport) -> None:
    """Keeps a report under a key: whole, or not at all."""
    where = folder()
    if where is None:
        return
    lines = {row.source for row in report.rows} | {report.peak_instant.source}
    files = {line.rsplit(":", 1)[0] for line in lines if line}
    entry = {"sources": _digest_files(files), "report": report.to_json()}
    with contextlib.suppress(OSError):
        where.mkdir(parents=True, exist_ok=True)
        disk.write_atomically(where / f"{name}.json", disk.seal(entry))


def _digest_files(files: Iterable[str]) -> dict[str, str]:
    """sha256 of each file; "" of one that is not there, as <stdin>."""
    digests = {}
    for name in files:
        path = pathlib.Path(name)
        content = path.read_bytes() if path.is_file() else b""
        digests[name] = hashlib.sha256(content).hexdigest() if content else ""
    return digests


def _locate(fn: Any) -> tuple[str, int]:
    """File and line of a function; two alike in one file must not share a report."""
    code = getattr(inspect.unwrap(fn), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code else ("", 0)


@functools.cache
def _digest_reader() -> str:
    """Digest of the code that makes reports of XLA's plans."""
    sources = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
