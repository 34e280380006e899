"""Local files as documents, through `datasets`: JSON lines, CSV, Parquet, plain text.

Idea    `read` gives a `datasets.Dataset` with the columns of `Document`, so its own
        tools (`train_test_split`, `filter`, `map` ...) lie between reading and
        `jmem.data.tokenise`. That function takes any Dataset with a column of text:
        whatever else `datasets` opens (Arrow, a hub) needs no reader here.
Differs Rows are parsed here and not by `datasets.load_dataset`, which names no line in
        its errors, turns a column of dates into datetimes (seen in 5.2), and writes a
        cache. Here every row is checked before anything else happens, strings stay as
        they are, and nothing is written or fetched.
Memory  The documents, twice while they are read and once afterwards.
"""

import os
from collections.abc import Callable, Iterable, Iterator
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
)

if TYPE_CHECKING:
    import datasets

KINDS = (".jsonl", ".csv", ".parquet", ".txt")


def read(
    *paths: str | os.PathLike[str],
    column: str = "text",
    unit: Literal["file", "paragraph"] = "file",
    prompt: str | None = None,
    completion: str | None = None,
) -> "datasets.Dataset":
    r"""Documents of the files, in order, as a Dataset with columns `text` and `source`.

    A `.jsonl` file holds one JSON object a line (blank lines are skipped), a `.csv`
    file a header and rows, a `.parquet` file columns of strings. The text is in
    `column`, further columns are left behind, and the source is `path:line` (in Parquet
    `path:row`, from 1). A `.txt` file is one document, or with `unit="paragraph"` one
    for each group of lines between blank lines; line ends become `\n`. Text is UTF-8, a
    leading byte order mark is dropped.

    With `prompt` and `completion`, two columns, the text is one after the other as they
    stand, and a third column, `loss_spans`, says that the loss covers the completion
    only: `tokenise`, `pack` and `pad` keep to it. A prompt may be empty.

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
    columns = (
        (column,) if prompt is None or completion is None else (prompt, completion)
    )
    files = check_files("read", paths, KINDS)
    for path in files:
        if path.suffix.lower() == ".txt" and len(columns) > 1:
            raise DataError(
                f"{path}: plain text has no columns {columns[0]!r} and {columns[1]!r}; "
                "write prompts and completions as .jsonl, .csv or .parquet."
            )
    return gather(files, lambda path: _read_documents(path, columns, unit))


def read_all[Item](
    files: Iterable[Path],
    items_of: Callable[[Path], Iterable[Item]],
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
    files: Iterable[Path], documents_of: Callable[[Path], Iterable[Document]]
) -> "datasets.Dataset":
    """The documents of all files as a Dataset; each file must hold one at least."""
    from datasets import Dataset, Features, List, Value

    documents = read_all(files, documents_of)
    # 64-bit offsets: the texts together may exceed 2 GiB.
    features: dict[str, Any] = dict.fromkeys(("text", "source"), Value("large_string"))
    if "loss_spans" in documents[0]:
        features["loss_spans"] = List(List(Value("int64"), length=2))
    return Dataset.from_list([*map(dict, documents)], features=Features(features))


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
                f"{path}: is a folder; name the {_join_with_or(kinds)} files inside."
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


def _read_documents(
    path: Path, columns: tuple[str, ...], unit: str
) -> Iterable[Document]:
    table = rows.read_rows(path, columns)
    if table is not None:
        return (_make_document(row, columns, place) for place, row in table)
    return [_read_whole(path)] if unit == "file" else _read_paragraphs(path)


def _make_document(row: Any, columns: tuple[str, ...], place: str) -> Document:
    """A document of one column, or of two: a prompt, and what is trained on."""
    *given, column = columns
    start = "".join(read_text(row, name, place, blank=True) for name in given)
    text = read_text(row, column, place)
    if given:
        return join_completion(start, text, place)
    return Document(text=text, source=place)


def _read_whole(path: Path) -> Document:
    text = "\n".join(_read_lines(path))
    return Document(text=read_text({"text": text}, "text", str(path)), source=str(path))


def _read_paragraphs(path: Path) -> Iterator[Document]:
    numbered = enumerate(_read_lines(path), start=1)
    for blank, group in groupby(numbered, key=lambda item: not item[1].strip()):
        if not blank:
            numbers, lines = zip(*group)
            yield Document(text="\n".join(lines), source=f"{path}:{numbers[0]}")


def _read_lines(path: Path) -> list[str]:
    text = rows.decode(path.read_bytes(), path, first_line=1)
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _join_with_or(kinds: tuple[str, ...]) -> str:
    return f"{', '.join(kinds[:-1])} or {kinds[-1]}"
