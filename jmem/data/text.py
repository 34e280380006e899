r"""Local files as documents, through `datasets`: JSON, CSV, Parquet, Arrow, plain text.

Idea    `read` gives a `datasets.Dataset` with the columns of `Document`, so its own
        tools (`train_test_split`, `filter`, `map` ...) lie between reading and
        `jmem.data.tokenise`. That function takes any Dataset with a column of text:
        whatever else `datasets` opens (a hub) needs no reader here.
Differs Rows are parsed here and not by `datasets.load_dataset`, which names no line in
        its errors, turns a column of dates into datetimes (seen in 5.2), and writes a
        cache. Here every row is checked before anything else happens, strings stay as
        they are, and nothing is written or fetched.
Memory  The documents, twice while they are read and once afterwards.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jmem.data import rows
from jmem.data.document import (
    DataError,
    Document,
    join_completion,
    read_text,
    suggest_nearest,
    warn_of_bad_rows,
)

if TYPE_CHECKING:
    import datasets

type Source = "str | os.PathLike[str] | datasets.Dataset"
"""A path, or rows in memory."""

_ALPACA_INPUT = ("input",)
"""What goes with an instruction, and would be lost in silence."""
KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def read(
    *sources: Source,
    column: str = "text",
    unit: Literal["file", "paragraph"] = "file",
    prompt: str | None = None,
    completion: str | None = None,
    skip_bad_rows: bool = False,
) -> "datasets.Dataset":
    r"""Documents of the files, in order, as a Dataset with columns `text` and `source`.

    A `.jsonl` file holds one JSON object a line (blank lines are skipped), a `.json`
    file an array of them, a `.csv` file a header and rows, a `.parquet` file columns of
    strings; a folder that `Dataset.save_to_disk` made, or a Dataset, holds rows too.
    The text is in `column`, further columns are left behind, and the source is
    `path:line` (in Parquet and Arrow `path:row`, from 1). A `.txt` file is one
    document, or with `unit="paragraph"` one for each group of lines between blank
    lines; line ends become `\n`. Text is UTF-8, a leading byte order mark is dropped.

    With `prompt` and `completion`, two columns, the text is one after the other as they
    stand, and a third column, `loss_spans`, says that the loss covers the completion
    only: `tokenise`, `pack` and `pad` keep to it. A prompt may be empty.

    With `skip_bad_rows`, rows that cannot be used are left out, and a `DataWarning`
    says how many; otherwise the first is refused.

    Raises:
      DataError: no path; a file that is missing, not readable, empty, of another kind,
        damaged or not UTF-8; a line that is not a JSON object; a column that is
        missing, not a string or blank. The message starts with `path:line` where there
        is one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "two.jsonl")
    ...     _ = path.write_text('{"text": "One."}\n{"text": "Two.", "id": 7}\n')
    ...     read(path)["text"][:]
    ['One.', 'Two.']
    """
    if unit not in ("file", "paragraph"):
        raise DataError(f"read: unit={unit!r} is neither 'file' nor 'paragraph'.")
    if (prompt is None) != (completion is None):
        raise DataError(
            f"read: prompt={prompt!r} and completion={completion!r} go together; for "
            "one column of text give column=..."
        )
    columns: tuple[str, ...] = (
        (column,) if prompt is None or completion is None else (prompt, completion)
    )
    found = check_sources("read", sources, KINDS)
    for path in found:
        if isinstance(path, Path) and path.suffix.lower() == ".txt" and columns[1:]:
            raise DataError(
                f"{path}: plain text has no columns {prompt!r} and {completion!r}; "
                "write prompts and completions as .jsonl, .csv or .parquet."
            )
    return gather(
        found,
        lambda source: _read_source(source, columns, unit),
        lambda place, row: [_make_document(row, columns, place)],
        skip_bad_rows=skip_bad_rows,
    )


def read_all[Item](
    files: Iterable[Any],
    items_of: Callable[[Any], Iterable[Item]],
    nothing: str = "no text, only blank lines or a header",
) -> list[Item]:
    """What all files hold, in order.

    Raises:
      DataError: names a file that cannot be read, or that holds `nothing`, as it says.
    """
    items: list[Item] = []
    for path in files:
        before = len(items)
        try:
            items.extend(items_of(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
        if len(items) == before:
            raise DataError(f"{path}: holds {nothing}; leave it out.")
    return items


def gather(
    sources: Iterable[Any],
    rows_of: Callable[[Any], Iterable[rows.Row]],
    documents_of: Callable[[str, Any], Sequence[Document]],
    *,
    skip_bad_rows: bool = False,
) -> "datasets.Dataset":
    """The documents of all rows as a Dataset; each source must hold one at least.

    Raises:
      DataError: what a row is refused for, unless bad rows are skipped; a source with
        no row, or with bad ones alone.
    """
    from datasets import Dataset, Features, List, Value

    bad, counted = [], 0

    def read(source: Any) -> Iterator[Document]:
        nonlocal counted
        before, good = len(bad), 0
        for place, row in rows_of(source):
            counted += 1
            try:
                made = documents_of(place, row)
            except DataError as error:
                if not skip_bad_rows:
                    raise
                bad.append(error)
                continue
            good += 1
            yield from made
        if not good and len(bad) > before:
            raise bad[before]

    documents = read_all(sources, read)
    warn_of_bad_rows(bad, counted)
    # 64-bit offsets: the texts together may exceed 2 GiB.
    features: dict[str, Any] = dict.fromkeys(("text", "source"), Value("large_string"))
    if "loss_spans" in documents[0]:
        features["loss_spans"] = List(List(Value("int64"), length=2))
    if "add_special_tokens" in documents[0]:
        features["add_special_tokens"] = Value("bool")
    return Dataset.from_list([*map(dict, documents)], features=Features(features))


def check_sources(
    caller: str, sources: Iterable[Any], kinds: tuple[str, ...]
) -> list[Any]:
    """The sources: Datasets as they are, paths as `check_files`, or saved folders."""
    given = [
        Path(source) if isinstance(source, str | os.PathLike) else source
        for source in sources
    ]
    for source in given:
        if not isinstance(source, Path) and not hasattr(source, "features"):
            raise DataError(
                f"{caller}: {type(source).__name__} is neither a path nor a "
                "datasets.Dataset. Make one: datasets.Dataset.from_list(rows)."
            )
    files = [s for s in given if isinstance(s, Path) and not rows.is_saved(s)]
    if files or not given:
        check_files(caller, files, kinds)
    return given


def check_files(
    caller: str, paths: Iterable[str | os.PathLike[str]], kinds: tuple[str, ...]
) -> list[Path]:
    """The paths, each a file that exists, is not empty and is of one of the kinds."""
    files = [Path(path) for path in paths]
    if not files:
        raise DataError(
            f"{caller}: no path given; name at least one {_join_with_or(kinds)} file."
        )
    for path in files:
        if path.is_dir():
            raise DataError(
                f"{path}: is a folder that no Dataset was saved to (save_to_disk); "
                f"name the {_join_with_or(kinds)} files inside."
            )
        if not path.exists():
            folder = path.parent
            near = (
                suggest_nearest(path.name, os.listdir(folder))
                if folder.is_dir()
                else ""
            )
            raise DataError(f"{path}: no such file{near}.")
        if path.stat().st_size == 0:
            raise DataError(
                f"{path}: is empty; give a file with text, or leave it out."
            )
        if path.suffix.lower() not in kinds:
            raise DataError(
                f"{path}: is not {_join_with_or(kinds)}. Convert it, or open it with "
                "datasets.load_dataset(...) and give the Dataset to jmem.data.tokenise."
            )
    return files


def _read_source(
    source: Any, columns: tuple[str, ...], unit: str
) -> Iterable[rows.Row]:
    table = rows.read_rows(source, columns, beside=_ALPACA_INPUT)
    if table is not None:
        return table
    read_rows = _read_whole if unit == "file" else _read_paragraphs
    return ((place, {columns[0]: text}) for place, text in read_rows(source))


def _make_document(row: Any, columns: tuple[str, ...], place: str) -> Document:
    """A document of one column, or of two: a prompt, and what is trained on."""
    *given, column = columns
    if given == ["instruction"] and isinstance(row, Mapping) and row.get("input"):
        raise DataError(
            f"{place}: the instruction has an input, {row['input']!r:.60}, which would "
            "be left out. Give --chat instruction (jmem.data.read_chats), or put both "
            "into one column."
        )
    start = "".join(read_text(row, name, place, blank=True) for name in given)
    text = read_text(row, column, place)
    if given:
        return join_completion(start, text, place)
    return Document(text=text, source=place)


def _read_whole(path: Path) -> Iterator[tuple[str, str]]:
    yield str(path), "\n".join(_read_lines(path))


def _read_paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    numbered = enumerate(_read_lines(path), start=1)
    for blank, group in groupby(numbered, key=lambda item: not item[1].strip()):
        if not blank:
            numbers, lines = zip(*group)
            yield f"{path}:{numbers[0]}", "\n".join(lines)


def _read_lines(path: Path) -> list[str]:
    text = rows.decode(path.read_bytes(), path, first_line=1)
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _join_with_or(kinds: tuple[str, ...]) -> str:
    return f"{', '.join(kinds[:-1])} or {kinds[-1]}"
