"""Text of others in what is shown: names of arguments, functions, files and cards.

A name may hold anything: an escape sequence that clears a terminal, a line break that
ends a row of a table, a tag that runs in a browser. Whatever is shown passes through
here, and comes out as what it says, on one line.
"""

import dataclasses
import re
from typing import Any

_ASCII = str.maketrans({"─": "-", "×": "x", "·": "*", "→": "->", "…": "~", "–": "-"})
_BAR = str.maketrans(dict.fromkeys("█▉▊▋▌", "#") | dict.fromkeys("▍▎▏", ""))


def escape_controls(text: str) -> str:
    r"""One line of text without anything that a terminal obeys.

    What cannot be printed, line breaks and marks of direction among it, is written as
    Python writes it.

    >>> escape_controls("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def escape_lines(text: str) -> str:
    """As `escape_controls`, of text whose line breaks are meant."""
    return "\n".join(map(escape_controls, text.split("\n")))


def escape_markdown(text: Any) -> str:
    r"""A value as Markdown that shows its text: in a line, a list or a table's cell.

    >>> escape_markdown("<b>|[x](y)")
    '&lt;b&gt;\\|\\[x](y)'
    """
    text = re.sub(r"([\\`*|[~])", r"\\\1", escape_controls(str(text)))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def escape_all[T](value: T) -> T:
    """A report, or anything of plain values, with every text in it escaped."""
    kept: Any = value
    if isinstance(value, str):
        kept = escape_controls(value)
    elif isinstance(value, dict):
        kept = {escape_all(key): escape_all(held) for key, held in value.items()}
    elif isinstance(value, tuple) and not (value and isinstance(value[0], int | float)):
        kept = tuple(map(escape_all, value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        kept = dataclasses.replace(
            value, **{name: escape_all(getattr(value, name)) for name in names}
        )
    return kept


def fit_encoding(text: str, encoding: str | None) -> str:
    r"""The text with what an encoding lacks said in characters that it has.

    >>> fit_encoding("2 × 4 ── █▌ é", "ascii")
    '2 x 4 -- ## \\xe9'
    """
    encoding = encoding or "utf-8"
    for table in ({}, _ASCII | _BAR):
        try:
            text = text.translate(table)
            text.encode(encoding)
            return text
        except UnicodeEncodeError:
            continue
    return text.encode(encoding, "backslashreplace").decode(encoding)
