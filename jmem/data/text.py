"""Local text files as documents: `.jsonl` and `.txt`, through `datasets`.

Idea    `read` gives a `datasets.Dataset` with the columns of `Document`, so its own
        tools (`train_test_split`, `filter`, `map` ...) lie between reading and
        `jmem.data.tokenise`. That function takes any Dataset with a column of
        text: whatever else `datasets` opens (Parquet, CSV, Arrow) needs no reader here.
Differs Lines are parsed here and not by `datasets.load_dataset("json")`, which names no
        line in its errors, turns a column of dates into datetimes (seen in 5.2), and
        writes a cache. Here every line is checked before anything else happens,
        strings stay as they are, and nothing is written or fetched.
Memory  The documents, twice while they are read and once afterwards.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jmem.data.document import DataError, Document, nearest, text_of

if TYPE_CHECKING:
    import datasets


def read(
    *paths: str | os.PathLike[str],
    column: str = "text",
    unit: Literal["file", "paragraph"] = "file",
) -> "datasets.Dataset":
    r"""Documents of the files, in order, as a Dataset with columns `text` and `source`.

    A `.jsonl` file holds one JSON object a line (blank lines are skipped); the text is
    in `column`, further columns are left behind, and the source is `path:line`. A
    `.txt` file is one document, or with `unit="paragraph"` one for each group of lines
    between blank lines; line ends become `\n`. Both are UTF-8, a leading byte order
    mark is dropped.

    Raises:
      DataError: no path; a file that is missing, not readable, empty, of another kind
        or not UTF-8; a line that is not a JSON object; a column that is missing, not a
        string or blank. The message starts with `path:line` where there is one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "two.jsonl")
    ...     _ = path.write_text('{"text": "One."}\n{"text": "Two.", "id": 7}\n')
    ...     read(path)["text"][:]
    ['One.', 'Two.']
    """
    if not paths:
        raise DataError("read: no path given; name at least one .jsonl or .txt file.")
    if unit not in ("file", "paragraph"):
        raise DataError(f"read: unit={unit!r} is neither 'file' nor 'paragraph'.")
    readers = [(Path(path), _reader(Path(path), column, unit)) for path in paths]
    documents: list[Document] = []
    for path, reader in readers:
        before = len(documents)
        try:
            documents.extend(reader(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
        if len(documents) == before:
            raise DataError(f"{path}: holds only blank lines; leave the file out.")

    import datasets

    return datasets.Dataset.from_dict(
        {key: [document[key] for document in documents] for key in ("text", "source")},
        # 64-bit offsets: the texts together may exceed 2 GiB.
        features=datasets.Features(
            text=datasets.Value("large_string"), source=datasets.Value("large_string")
        ),
    )


def _reader(path: Path, column: str, unit: str) -> Callable[[Path], Iterable[Document]]:
    """How to read `path`, after the checks that cost nothing."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name the .jsonl or .txt files inside.")
    if not path.exists():
        folder = path.parent
        near = nearest(path.name, os.listdir(folder)) if folder.is_dir() else ""
        raise DataError(f"{path}: no such file{near}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; give a file with text, or leave it out.")
    match path.suffix.lower():
        case ".jsonl":
            return lambda path: _json_lines(path, column)
        case ".txt" if unit == "file":
            return lambda path: [_whole(path)]
        case ".txt":
            return _paragraphs
    raise DataError(
        f"{path}: is neither .jsonl nor .txt. Convert it, or open it with "
        "datasets.load_dataset(...) and give the Dataset to jmem.data.tokenise."
    )


def _json_lines(path: Path, column: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            text = _decode(line, path, first_line=number)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{place}: not JSON ({_reason(error)}). A .jsonl file holds one "
                    "object a line; an array must be written out one element a line."
                ) from error
            yield Document(text=text_of(row, column, place), source=place)


def _whole(path: Path) -> Document:
    text = "\n".join(_lines(path))
    return Document(text=text_of({"text": text}, "text", str(path)), source=str(path))


def _paragraphs(path: Path) -> Iterator[Document]:
    numbered = enumerate(_lines(path), start=1)
    for blank, group in groupby(numbered, key=lambda item: not item[1].strip()):
        if not blank:
            numbers, lines = zip(*group)
            yield Document(text="\n".join(lines), source=f"{path}:{numbers[0]}")


def _lines(path: Path) -> list[str]:
    text = _decode(path.read_bytes(), path, first_line=1)
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _decode(content: bytes, path: Path, *, first_line: int) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8. "
            "Convert the file, as in: iconv -f latin1 -t utf-8."
        ) from error
    return text.removeprefix("\ufeff") if first_line == 1 else text


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
