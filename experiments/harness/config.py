"""Configs: frozen dataclasses as TOML, strict in both directions.

A preset states only what differs from the defaults; a saved run's config.toml states
everything, and is itself a preset. A field is a number, a boolean, a string, a
`Literal`, a path, a tuple of these, any of them `| None`, or a frozen dataclass of such
fields: a table in TOML, a prefix on the command line. No other unions: what a value
means would depend on the order of their members.

TOML has no word for nothing: there, as on the command line, a field that may be None is
so by the word `None`.
"""

import dataclasses
import difflib
import json
import operator
import pathlib
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeGuard

Keys = tuple[str | int, ...]
"""A key's place: ("lisa", "adamw", "learning_rate"); of tables in an array, their
numbers too."""


NONE = "None"
"""How nothing is written, where a field may be nothing."""


SCALARS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    pathlib.Path: "a string with a path",
}
"""Types of single values, and how a message names them."""


class ConfigError(ValueError):
    """A preset, a flag or a saved run that does not fit the experiment's config."""


def find_slug(what: Callable | type) -> str:
    """The experiment's name: that of the module that holds its `main` or `Config`."""
    spec = sys.modules[what.__module__].__spec__
    # Of a module run by `python -m`, the only true name.
    name = spec.name if spec else pathlib.Path(sys.argv[0]).stem
    return name.rpartition(".")[2]


# Types --------------------------------------------------------------------------------


def resolve_hints(config: type) -> dict[str, Any]:
    """Types of a dataclass's fields, with `type` aliases resolved."""
    found = typing.get_type_hints(config)
    return {f.name: _resolve(found[f.name]) for f in dataclasses.fields(config)}


def _resolve(hint: Any) -> Any:
    while isinstance(hint, typing.TypeAliasType):
        hint = hint.__value__
    return hint


def _unwrap_optional(hint: Any) -> Any | None:
    """`T` of a hint `T | None`; None of any other."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return None
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return _resolve(kinds[0]) if len(kinds) == 1 else None


def _is_table(hint: Any) -> TypeGuard[type]:
    """Whether a field is a config of its own."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def check(config: type) -> None:
    """Refuse a class that cannot be a config.

    Raises:
      TypeError: it is not a frozen dataclass, or a field's type is none of those above.
    """
    if not getattr(getattr(config, "__dataclass_params__", None), "frozen", False):
        raise TypeError(f"{config.__name__} must be a frozen dataclass to be a config.")
    for name, hint in resolve_hints(config).items():
        where = f"{config.__name__}.{name}"
        if _is_table(hint):
            check(hint)
        else:
            _check_value(where, hint)


def _check_value(where: str, hint: Any) -> None:
    """Refuse a type that neither TOML nor a command line can state."""
    hint = _unwrap_optional(hint) or hint
    if typing.get_origin(hint) is tuple:
        for item in typing.get_args(hint):
            if item is not Ellipsis:
                _check_value(where, _resolve(item))
    elif hint not in SCALARS and typing.get_origin(hint) is not Literal:
        raise TypeError(
            f"{where}: {hint} is no type of a config's field; use bool, int, float, "
            "str, Literal, pathlib.Path, a tuple of these, any of them | None, or a "
            "frozen dataclass."
        )


# Reading ------------------------------------------------------------------------------


def read[Config](path: pathlib.Path, base: Config) -> Config:
    """`base` with what a TOML file states.

    Raises:
      ConfigError: with file and line: text that is not TOML, an unknown key, a value
        of another type, or one that the config itself refuses.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from None
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # deep, or a number without end
        message, _, place = str(error).partition(" (at ")
        line = re.match(r"line (\d+)", place)
        number = line[1] if line else len(text.splitlines())
        raise ConfigError(f"{path}:{number}: not TOML: {message}.") from None
    lines = locate(text)

    def where(keys: Keys) -> str:
        return f"{path}:{lines.get(keys, 1)}"

    return _apply(base, values, where, ())


def _apply(
    base: Any, values: Mapping[str, Any], where: Callable[[Keys], str], above: Keys
) -> Any:
    """`base` with `values`, recursively; errors name the line of a key (`where`)."""
    types, given = resolve_hints(type(base)), {}
    for name, value in values.items():
        keys = (*above, name)
        if name not in types:
            raise ConfigError(
                f"{where(keys)}: unknown key {name!r}{_suggest(name, type(base))}"
            )
        if not _is_table(types[name]):
            given[name] = _convert(types[name], value, f"{where(keys)}: {name}")
        elif isinstance(value, dict):
            given[name] = _apply(getattr(base, name), value, where, keys)
        else:
            raise ConfigError(
                f"{where(keys)}: {name}={value!r} must be a table: write "
                f"{'.'.join(map(str, keys))}.KEY = ..."
            )
    try:
        return dataclasses.replace(base, **given)
    except (ValueError, TypeError) as error:
        named = [name for name in values if f"{name}=" in str(error)]
        keys = (*above, *(named or list(values))[:1])
        raise ConfigError(f"{where(keys)}: {error}") from error


def _suggest(name: str, config: type) -> str:
    """The end of an unknown key's message: the nearest name, in a table below too."""
    own = {name: name for name in resolve_hints(config)}
    below = {path.rpartition(".")[2]: path for path in reversed([*list_leaves(config)])}
    paths = below | own
    near = difflib.get_close_matches(name, paths, n=1, cutoff=0.4)
    return (
        f"; did you mean {paths[near[0]]!r}?" if near else f"; known: {', '.join(own)}"
    )


def list_leaves(config: type, above: str = "") -> Iterator[str]:
    """Dotted names of the fields of a config, and of the configs within it."""
    for name, hint in resolve_hints(config).items():
        if _is_table(hint):
            yield from list_leaves(hint, f"{above}{name}.")
        else:
            yield above + name


def _convert(hint: Any, value: Any, where: str) -> Any:
    """A TOML value as the field's type, or a ConfigError."""
    if kind := _unwrap_optional(hint):
        return None if value == NONE else _convert(kind, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments or type(value) not in map(type, arguments):
            near = difflib.get_close_matches(str(value), map(str, arguments), n=1)
            tail = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(f"{where}={value!r} is none of {arguments}{tail}")
        return value
    if origin is tuple:
        if isinstance(value, list):
            if arguments[-1] is Ellipsis:
                arguments = arguments[:1] * len(value)
            if len(arguments) == len(value):
                pairs = enumerate(zip(arguments, value, strict=True))
                return tuple(
                    _convert(_resolve(item), entry, f"{where}[{index}]")
                    for index, (item, entry) in pairs
                )
        raise ConfigError(f"{where}={value!r} must be {_describe_type(hint)}.")
    if hint is float and type(value) is int:
        return float(value)
    if hint is pathlib.Path and type(value) is str:
        return pathlib.Path(value)
    if type(value) is not hint:
        raise ConfigError(f"{where}={value!r} must be {_describe_type(hint)}.")
    return value


def from_plain[Kind](kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """A dataclass of plain values, as JSON, TOML and argparse give them.

    Lists become tuples; what is not a field of `kind` is a TypeError.
    """
    lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
    return kind(**{**values, **lists})


def _describe_type(hint: Any) -> str:
    """What a value of this type is called in a message."""
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if items[-1] is Ellipsis:
            return f"an array, each {_describe_type(_resolve(items[0]))}"
        return f"an array of {len(items)} entries"
    return SCALARS.get(hint, str(hint))


def locate(text: str) -> dict[Keys, int]:
    """Line of every key of a valid TOML text, counted from 1.

    That of the first line of the statement that sets it. tomllib gives no places, so
    growing beginnings of the text are parsed: after the statement, the key is there.
    """
    lines, found, start = text.splitlines(), {}, 0
    for end in range(1, len(lines) + 1):
        try:
            values = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:  # in the middle of a value of several lines
            continue
        said = (n for n in range(start, end) if lines[n].split("#")[0].strip())
        first = next(said, start) + 1
        for keys in _list_paths(values):
            found.setdefault(keys, first)
        start = end
    return found


def _list_paths(values: Mapping[Any, Any], above: Keys = ()) -> Iterator[Keys]:
    """Every key of nested tables, and of arrays of tables, with those above it."""
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, list):
            value = {n: one for n, one in enumerate(value) if isinstance(one, dict)}
        if isinstance(value, dict):
            yield from _list_paths(value, (*above, name))


# Writing ------------------------------------------------------------------------------


def write(config: Any) -> str:
    """A config as TOML, every field stated; `read` gives an equal config back."""
    return "\n".join(_write_table(dataclasses.asdict(config), ()))


def _write_table(values: Mapping[str, Any], above: tuple[str, ...]) -> Iterable[str]:
    """Lines of a table and, after its own values, of those within it."""
    for name, value in values.items():
        if not isinstance(value, dict):
            yield f"{name} = {_write_value(value)}"
    for name, value in values.items():
        if isinstance(value, dict):
            yield f"\n[{'.'.join((*above, name))}]"
            yield from _write_table(value, (*above, name))


def _write_value(value: Any) -> str:
    """A single value, or a tuple of them, as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, str | pathlib.PurePath):  # TOML's escapes are JSON's and DEL
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
    return f"[{', '.join(map(_write_value, value))}]"


# Comparing ----------------------------------------------------------------------------


def find_differences(first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names of the fields whose values differ, with both values."""
    for name in list_leaves(type(first)):
        own, other = map(operator.attrgetter(name), (first, second))
        if own != other:
            yield name, own, other
