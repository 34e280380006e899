"""Flags of a script, read from its dataclass by the standard library alone.

Experiments read theirs with tyro. What is run on a machine lent for its GPU finds only
what JAX programs need, and no tyro; so this one place reads the flags of everything
that is no experiment without it (`experiments.harness.cli.script`).

A field is a boolean, a number, a string, a path, a `Literal`, a tuple of one of these,
or any of them `| None`: `--lanes 4`, `--only lisa lora`, `--todo`. One that has no
default is written without a name.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from experiments.harness import config as configs


def read[Command](
    command: type[Command], arguments: Sequence[str], *, prog: str, description: str
) -> Command:
    """The command that `arguments` state; the other fields keep their defaults.

    `--help` and a flag that is not one end the process, as command lines do.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    words, hints = dict(_read_docstrings(command)), configs.resolve_hints(command)
    names = {name: f"--{name.replace('_', '-')}" for name in hints}
    for name, hint in hints.items():
        options = _choose_options(hint)
        options["help"] = words.get(name, "").replace("%", "%%")
        flag = names[name]
        if _is_needed(command, name):
            flag, options["metavar"] = name, name.upper()
        parser.add_argument(flag, **options)
    found, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        near = difflib.get_close_matches(unknown[0], names.values(), 1)
        tail = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unknown: {' '.join(unknown)}{tail}")
    return configs.from_plain(command, vars(found))


def _is_needed(command: Any, name: str) -> bool:
    """Whether a field has no default."""
    (field,) = (f for f in dataclasses.fields(command) if f.name == name)
    return field.default is field.default_factory is dataclasses.MISSING


def _choose_options(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    if isinstance(hint, typing.TypeAliasType):
        return _choose_options(hint.__value__)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"action": "store_true"}
    if origin in (types.UnionType, typing.Union):
        (kind,) = (part for part in parts if part is not types.NoneType)
        return _choose_options(kind)
    if origin is tuple:
        return {"nargs": "+", **_choose_options(parts[0])}
    if origin is Literal:
        return {"choices": parts}
    return {"type": hint, "metavar": hint.__name__.upper()}


def _read_docstrings(command: type) -> Iterator[tuple[str, str]]:
    """Names and docstrings of the fields of a dataclass, and of those it is made of."""
    for kind in reversed(command.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        except OSError:  # there is no source, and so no help
            continue
        body = typing.cast(ast.ClassDef, tree.body[0]).body
        for field, words in itertools.pairwise(body):
            match field, words:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    yield name, " ".join(text.split())
