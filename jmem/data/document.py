"""What every reader returns, `Document`, and the error of this package, `DataError`."""

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict


class DataError(ValueError):
    """Data that cannot be used: names the file, the place, the rule and a way out."""


class DataWarning(UserWarning):
    """Data that are used in part: says what is left out, and why."""


class Document(TypedDict):
    """A text and where it came from.

    A row of a `datasets.Dataset` with these columns is a Document as it stands.
    """

    text: str
    """The text: not empty, and encodable as UTF-8."""
    source: str
    """Where it came from, for messages and records: `train.jsonl:17`, `topic:del`."""
    loss_spans: NotRequired[list[tuple[int, int]]]
    """Characters [start, end) of the text that the loss covers, in order and apart.
    Absent: all."""
    add_special_tokens: NotRequired[bool]
    """Whether the tokenizer puts its begin and end tokens around the text. Absent: yes;
    no for a chat, whose template writes them out."""


def _name_chats(column: str) -> str:
    return (
        f"These are conversations: give --chat {column}, or "
        f"jmem.data.read_chats(..., column={column!r})."
    )


_KINDS_OF_ROWS = {
    ("prompt", "completion"): "These are prompts with completions: give --prompt prompt"
    " --completion completion, or prompt=..., completion=...",
    **{
        own: _name_chats(own[0])
        for own in (("instruction", "output"), ("conversations",), ("messages",))
    },
}
"""Columns by which rows of another kind are known, and how to read these."""


def join_completion(prompt: str, completion: str, source: str) -> Document:
    """A prompt and its completion as one document; the loss covers the latter only.

    >>> join_completion("2 + 2 =", " 4", "sums.csv:2")["loss_spans"]
    [(7, 9)]
    """
    text = prompt + completion
    return Document(text=text, source=source, loss_spans=[(len(prompt), len(text))])


def make_missing_column_error(
    place: str, column: str, columns: Iterable[Any]
) -> DataError:
    """The error that names the column, those there are, and the nearest."""
    names = sorted(map(str, columns))
    way_out = "Name the column that holds the text: --column, column=..."
    for own, hint in _KINDS_OF_ROWS.items():
        if {*own} <= {*names} and column not in own:
            way_out = hint
    return DataError(
        f"{place}: no column {column!r} among "
        f"{names}{suggest_nearest(column, names)}. {way_out}"
    )


def read_text(row: Any, column: str, place: str, *, blank: bool = False) -> str:
    """The text in `column` of a row, once it is known to be usable.

    Raises:
      DataError: `row` is one, is not a mapping or has no such column, or the value is
        not a string, is blank (unless it may be), or holds a lone surrogate (which no
        UTF-8 text can). The message starts with `place`.
    """
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(
            f"{place}: a row must be an object with a column {column!r}, "
            f"not {type(row).__name__}. Write it as {{{column!r}: ...}}."
        )
    if column not in row:
        raise make_missing_column_error(place, column, row)
    text = row[column]
    if not isinstance(text, str):
        chats = isinstance(text, list) and text and isinstance(text[0], Mapping)
        way_out = "Convert it, or name another column: --column, column=..."
        raise DataError(
            f"{place}: column {column!r} holds {type(text).__name__}, not a string. "
            f"{_name_chats(column) if chats else way_out}"
        )
    if not blank and not text.strip():
        raise DataError(
            f"{place}: column {column!r} is blank, and a document needs text. "
            "Remove the row."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: column {column!r} holds the lone surrogate "
            f"{text[error.start]!a} at character {error.start}, which is not Unicode "
            'text. Repair it where it was written (often a cut "\\ud83d\\ude00" pair).'
        ) from error
    return text


def warn_of_bad_rows(bad: Sequence[DataError], counted: int) -> None:
    """Says how many rows of those counted are left out, if any."""
    if bad:
        warnings.warn(
            f"{len(bad)} of {counted} rows left out. The first: {bad[0]}",
            DataWarning,
            stacklevel=3,
        )


def suggest_nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known name is near."""
    found = difflib.get_close_matches(name, [str(k) for k in known], n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
