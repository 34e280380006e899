"""Which flags a refusal speaks of: the library names its arguments, a user typed flags.

    name_flags("Lora: rank=0 must be at least 1.", [Config], ["--lora.rank", "0"])
    'Flags: --lora.rank 0.'

One place for all that the library refuses. An argument is a typed flag's where it has
the flag's last name and its value; if the message names none of these, that of a flag
that was not typed (of a preset, or by default), or one's whose value alone it tells
(`target='h20'` is `--gpu h20`).
"""

import operator
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments.harness.config import list_leaves

_ARGUMENT = re.compile(
    r"(?<![\w.-])((?:\w+(?:\[\d+\])?\.)*[a-z]\w*)(?:\[\d+\])?="
    r"('[^']*'|\"[^\"]*\"|\((?:[^()]|\([^()]*\))*\)|\d{1,3}(?:,\d{3})+|[^\s,;]+)"
)
_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|[^\s,()\[\]]+")


def name_flags(
    message: str,
    kinds: Iterable[type],
    arguments: Sequence[str],
    read: Iterable[Any] = (),
) -> str:
    """The end of a message: flags behind the arguments that it names; "" if none are.

    Args:
      message: of a refusal.
      kinds: the dataclasses that the command line is read into.
      arguments: the command line.
      read: the dataclasses as they were read, if it came to that.
    """
    leaves = [leaf for kind in kinds for leaf in list_leaves(kind)]
    typed = _read_typed(arguments, leaves)
    named = [(re.sub(r".*\]\.", "", n), v) for n, v in _ARGUMENT.findall(message)]
    found = _find(typed, named)
    for path in [*found]:  # what was not typed and lies in the same table, or above it
        for name, _ in named:
            for near in _list_near(path, name):
                if near in leaves and near not in typed:
                    found[near] = None
    if not found:
        held = _find({k: v for config in read for k, v in _read_held(config)}, named)
        told = {p: None for p, words in typed.items() if _holds(message, words)}
        found = held if 0 < len(held) <= _FEW else told
    shown = [shlex.join([_spell(path), *typed.get(path, ())]) for path in found]
    missing = [flag for flag in shown if flag not in message]
    return f"Flags: {', '.join(missing)}." if missing else ""


_FEW = 4
"""More untyped flags of one name and one value than that say nothing."""


def _find(
    words: Mapping[str, Sequence[str]], named: Iterable[tuple[str, str]]
) -> dict[str, None]:
    """The fields that have the name and, in `words`, the value of an argument."""
    return {
        path: None
        for name, value in named
        for path in words
        if f".{path}".endswith(f".{name}") and _is_equal(words[path], value)
    }


def _read_held(config: Any) -> Iterator[tuple[str, list[str]]]:
    """Every field of a dataclass with its value in words, as it would be typed."""
    for path in list_leaves(type(config)):
        value = operator.attrgetter(path)(config)
        entries = value if isinstance(value, tuple) else (value,)
        yield path, _VALUE.findall(" ".join(map(repr, entries)))


def _read_typed(arguments: Sequence[str], leaves: Sequence[str]) -> dict[str, list]:
    """What was typed behind the flag of each field; True or False of a bare one."""
    typed: dict[str, list[str]] = {}
    current: list[str] = []
    for argument in arguments:
        if not argument.startswith("--"):
            current.append(argument)
            continue
        flag, equals, value = argument[2:].partition("=")
        path = flag.replace("-", "_")
        current = [value] if equals else []
        typed[path] = current
    return {path: words for path, words in typed.items() if path in leaves}


def _is_equal(words: Sequence[str], value: str) -> bool:
    """Whether typed words are the value that a message tells."""
    told = [_read(word) for word in _VALUE.findall(value.rstrip(".:"))]
    return told == [*map(_read, words)] or (not words and told == ["True"])


def _read(word: str) -> float | str:
    word = word.strip("'\"")
    try:
        return float(word.replace(",", ""))
    except ValueError:
        return word


def _list_near(path: str, name: str) -> Iterator[str]:
    """The names of `name` beside the field `path`, and in each table above that."""
    table = path.rpartition(".")[0]
    yield from [name] * (not table or "." in name)
    yield f"{table}.{name}"
    while table := table.rpartition(".")[0]:
        yield f"{table}.{name}"


def _holds(message: str, words: Sequence[str]) -> bool:
    """Whether a message tells one of these words, as they are or as a number is."""
    for word in words:
        forms = {word, f"{int(word):,}"} if word.isdigit() else {word}
        for form in forms:
            if len(form) > 1 and re.search(rf"(?<!\w){re.escape(form)}(?!\w)", message):
                return True
    return False


def _spell(path: str) -> str:
    return f"--{path.replace('_', '-')}"
