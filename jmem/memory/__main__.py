"""Does a program of yours fit, and what fills it?

    python -m jmem.memory mymodel:training_step --gpu rtx4090
    python -m jmem.memory mymodel:training_step --gpu a100-40 --html report.html

`mymodel:training_step` is a `jmem.Program`, or a function without arguments that
returns one, in a module that Python can import from here. Exit status: 0 it fits, 1 it
does not, 2 it could not be measured.
"""

import argparse
import functools
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from jmem.memory import page
from jmem.memory.measure import measure
from jmem.memory.report import GiB, MemoryReport
from jmem.program import Program, ProgramError
from jmem.targets import suggest


class _NotFoundError(ValueError):
    """`module:program` names nothing that can be measured."""


def load(dotted: str) -> Program:
    """The program that `module:name` names.

    Raises:
      ValueError: there is no such module, name, or program; says which.
    """
    module, colon, name = dotted.partition(":")
    if not (module and colon and name):
        raise _NotFoundError(
            f"{dotted!r} names no program; write module:name, as mymodel:training_step."
        )
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not (module + ".").startswith(error.name + "."):
            raise  # a module that the user's own module misses
        raise _NotFoundError(
            f"no module {module!r} can be imported from here; run this where Python "
            "finds it, or set PYTHONPATH."
        ) from error
    try:
        found = functools.reduce(getattr, name.split("."), holder)
    except AttributeError as error:
        near = suggest(name, vars(holder))
        raise _NotFoundError(f"module {module!r} has no {name!r}{near}") from error
    if callable(found) and not isinstance(found, Program):
        found = found()
    if not isinstance(found, Program):
        raise _NotFoundError(
            f"{dotted} is a {type(found).__name__}; need a jmem.Program, or a function "
            "without arguments that returns one."
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jmem.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("program", help="module:name of a Program")
    parser.add_argument("--gpu", default="h200", help="a name, or a TOML file")
    parser.add_argument("--reserve", type=float, default=1.0, help="GiB to keep free")
    parser.add_argument("--top", type=int, default=12, help="largest buffers listed")
    for kind in _WRITERS:
        words = f"also write the report to this .{kind} file"
        parser.add_argument(f"--{kind}", type=pathlib.Path, help=words)
    given = parser.parse_args(arguments)
    reserve = round(given.reserve * GiB)
    try:
        report = measure(load(given.program), target=given.gpu)
        verdict = report.fits(reserve)
    except (ValueError, TypeError, ProgramError) as error:
        print(f"jmem.memory: {error}", file=sys.stderr)
        return 2
    print(report.table(top=given.top, reserve=reserve))
    for kind, write in _WRITERS.items():
        if path := getattr(given, kind):
            write(report, path, reserve)
    return 0 if verdict else 1


_WRITERS: dict[str, Callable[[MemoryReport, pathlib.Path, int], Any]] = {
    "png": lambda report, path, reserve: report.plot(path, reserve=reserve),
    "html": lambda report, path, reserve: path.write_text(
        page.write_html(report, reserve)
    ),
    "md": lambda report, path, reserve: path.write_text(
        page.write_markdown(report, reserve)
    ),
    "json": lambda report, path, reserve: report.to_json(path),
}
"""Functions of a report, the file's path and the reserve in bytes, by the file's kind.
"""


if __name__ == "__main__":
    sys.exit(main())
