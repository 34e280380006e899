"""Does a program of yours fit, and what fills it?

    python -m jmem.memory mymodel:training_step --gpu rtx4090
    python -m jmem.memory mymodel:training_step --gpu a100-40 --html report.html

`mymodel:training_step` is a `jmem.Program`, or a function without arguments that
returns one, in a module that Python can import from here. Exit status: 0 it fits, 1 it
does not, 2 there is no verdict, 130 interrupted. JMEM_DEBUG=1 shows where an error came
from.
"""

import argparse
import functools
import importlib
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

from jmem.disk import write_atomically
from jmem.memory import page
from jmem.memory.escape import escape_controls, escape_lines, fit_encoding
from jmem.memory.measure import measure
from jmem.memory.report import GiB, MemoryReport
from jmem.program import Program
from jmem.targets import resolve, suggest
from jmem.terminal import silence


class _RefusedError(ValueError):
    """`module:program` names nothing that can be measured, or a flag says nonsense."""


def load(dotted: str) -> Program:
    """The program that `module:name` names.

    Raises:
      ValueError: there is no such module, name, or program; says which.
    """
    module, colon, name = dotted.partition(":")
    if not (module and colon and name):
        raise _RefusedError(
            f"{dotted!r} names no program; write module:name, as mymodel:training_step."
        )
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not (module + ".").startswith(error.name + "."):
            raise _RefusedError(
                f"{module} imports {error.name}, which is not installed."
            ) from error
        raise _RefusedError(
            f"no module {module!r} can be imported from here; run this where Python "
            "finds it, or set PYTHONPATH."
        ) from error
    try:
        found = functools.reduce(getattr, name.split("."), holder)
    except AttributeError as error:
        near = suggest(name, vars(holder))
        raise _RefusedError(f"module {module!r} has no {name!r}{near}") from error
    if callable(found) and not isinstance(found, Program):
        _refuse_arguments(dotted, found)
        found = found()
    if not isinstance(found, Program):
        raise _RefusedError(
            f"{dotted} is a {type(found).__name__}; need a jmem.Program, or a function "
            "without arguments that returns one."
        )
    return found


def _refuse_arguments(dotted: str, function: Callable) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise _RefusedError(
            f"{dotted} is a function with arguments ({error}); need a jmem.Program, or "
            "a function without arguments that returns one."
        ) from error
    except ValueError:  # some callables written in C have no signature
        return


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    given = _parse(arguments)
    try:
        _check(given)
        return _answer(given)
    except KeyboardInterrupt:
        return 130
    except (Exception, SystemExit) as error:
        if os.environ.get("JMEM_DEBUG"):
            traceback.print_exc()
        _say(f"jmem.memory: {_describe(error)}", sys.stderr)
        return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
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
    return parser.parse_args(arguments)


def _check(given: argparse.Namespace) -> None:
    """Refuses what would fail, or say nothing, only after the program is compiled."""
    if not 0 <= given.reserve <= _MOST:  # nor NaN
        raise _RefusedError(
            f"--reserve {given.reserve}: must not be negative, nor more than {_MOST:,} "
            "GiB."
        )
    try:
        resolve(given.gpu)
    except ValueError as error:
        raise _RefusedError(f"--gpu {given.gpu}: {error}") from error
    if given.top < 0:
        raise _RefusedError(f"--top {given.top}: must not be negative.")
    for kind in _WRITERS:
        path = getattr(given, kind)
        if path is not None and (why := _refuse_path(path)):
            raise _RefusedError(f"--{kind} {path}: {why}")


_MOST = 4096
"""GiB; no card has more."""


def _refuse_path(path: pathlib.Path) -> str:
    """Why nothing can be written to a path; "" where it can be."""
    try:
        if path.is_dir():
            return "it is a folder; name a file in it."
        if not path.parent.is_dir():
            return f"there is no folder {path.parent}."
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            return "it may not be written by you."
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _answer(given: argparse.Namespace) -> int:
    """Measures, prints and writes; 0 where the program fits, 1 where not."""
    reserve = round(given.reserve * GiB)
    try:
        report = measure(load(given.program), target=given.gpu)
    except SystemExit as error:
        raise _RefusedError(
            f"{given.program} ended the process with sys.exit({error.code!r}) before "
            "there was a program; guard what a script does by `if __name__ == "
            '"__main__":`.'
        ) from error
    verdict = report.fits(reserve)
    _say(report.table(top=given.top, reserve=reserve), sys.stdout)
    for kind, write in _WRITERS.items():
        if (path := getattr(given, kind)) is not None:
            write(report, path, reserve)
    return 0 if verdict else 1


def _say(text: str, stream: Any) -> None:
    """Prints what a stream's encoding has; a reader who has left is no error."""
    if stream is None:
        return
    try:
        print(fit_encoding(text, stream.encoding), file=stream, flush=True)
    except OSError as error:
        # Python would complain of the rest of it when it ends.
        silence(stream)
        if not isinstance(error, BrokenPipeError) and stream is not sys.stderr:
            raise


def _describe(error: BaseException) -> str:
    """An error in words: ours as it is; another's with its class and its line."""
    frames = traceback.extract_tb(error.__traceback__)
    raised = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    by = raised[-1].f_globals.get("__name__", "") if raised else ""
    ours = isinstance(error, _RefusedError)  # of __main__, by its name
    if ours or any(
        name.split(".")[0] == "jmem" for name in (type(error).__module__, by)
    ):
        return escape_lines(str(error))
    own = [f for f in frames if "site-packages" not in f.filename and f.lineno]
    own = [f for f in own if not f.filename.startswith(("<frozen", _LIBRARY))]
    words = escape_controls(str(error).partition("\n")[0])
    place = (
        f"\n  at {escape_controls(own[-1].filename)}:{own[-1].lineno}" if own else ""
    )
    return f"{type(error).__name__}: {words}{place}"


_LIBRARY = str(pathlib.Path(__file__).parents[1])

_WRITERS: dict[str, Callable[[MemoryReport, pathlib.Path, int], Any]] = {
    "png": lambda report, path, reserve: report.plot(path, reserve=reserve),
    "html": lambda report, path, reserve: write_atomically(
        path, page.write_html(report, reserve)
    ),
    "md": lambda report, path, reserve: write_atomically(
        path, page.write_markdown(report, reserve)
    ),
    "json": lambda report, path, reserve: report.to_json(path),
}
"""Functions of a report, the file's path and the reserve in bytes, by the file's kind.
"""


if __name__ == "__main__":
    sys.exit(main())
