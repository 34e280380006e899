"""Rows of local tables, each with its place: JSON, CSV, Parquet, `datasets`.

A row maps column names to values; its place is `path:line`, or `path:row` (from 1) of a
Parquet file or a Dataset, which have no lines. What cannot be read is a `DataError`
that starts with the place: raised, or in the place of a row where the next one can be
read all the same. Nothing is fetched and nothing is cached.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jmem.data.document import DataError, make_missing_column_error

Row = tuple[str, Any]
"""(place, the row there): a mapping, unless JSON has something else; or a DataError."""
_BLANKS = re.compile(r"[ \t\r\n]*")
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")
"""What lies in a folder that `datasets` saved."""


def read_json_lines(path: Path) -> Iterator[Row]:
    """One JSON value a line; blank lines are skipped.

    A line that is not UTF-8 or not JSON is a DataError in the place of its row.
    """
    # Read at once: a caller that refuses a row would leave the file open.
    for number, line in enumerate(io.BytesIO(path.read_bytes()), start=1):
        place = f"{path}:{number}"
        try:
            text = decode(line, path, first_line=number)
            if text.strip():
                yield place, json.loads(text)
        except DataError as error:
            yield place, error
        except (ValueError, RecursionError) as error:
            yield (
                place,
                DataError(
                    f"{place}: not JSON ({_describe_error(error)}). A .jsonl file "
                    "holds one object a line; an array must be written out one element "
                    "a line, or be a .json file."
                ),
            )


def read_json_array(path: Path) -> Iterator[Row]:
    """The elements of a JSON array, each with the line that it begins in.

    A file without one is read as JSON lines, which some call `.json` too.

    Raises:
      DataError: not UTF-8; an element that is not JSON; an array that does not end.
    """
    text = decode(path.read_bytes(), path, first_line=1)
    at = _skip_blanks(text, 0)
    if not text.startswith("[", at):
        yield from read_json_lines(path)
        return
    read, line, counted, at = json.JSONDecoder().raw_decode, 1, 0, at + 1
    while not text.startswith("]", at := _skip_blanks(text, at)):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = read(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{line}: not JSON ({_describe_error(error)}), in an array of "
                "rows. Repair it, or write one object a line in a .jsonl file."
            ) from error
        yield f"{path}:{line}", value
        at = _skip_blanks(text, at)
        if text.startswith(",", at):
            at += 1
        elif not text.startswith("]", at):
            raise DataError(
                f"{path}:{line}: the array of rows does not go on with ',' or ']' "
                "behind the row that begins here. The file is cut or damaged."
            )
    if _skip_blanks(text, at + 1) < len(text):
        raise DataError(f"{path}: holds more than an array. The file is damaged.")


def _skip_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found else at


def is_saved(path: Path) -> bool:
    """Whether this is a folder that `datasets` saved, of one table or several."""
    return path.is_dir() and any((path / name).exists() for name in _SAVED)


def read_dataset_rows(
    source: Any, columns: tuple[str, ...], beside: tuple[str, ...] = ()
) -> Iterator[Row]:
    """Rows of a Dataset, or of the folder it was saved to, of which `columns` are read.

    Those of `beside` are read where they are there.

    Raises:
      DataError: a column that is missing; a folder that is damaged, or holds several
        tables.
    """
    import datasets

    place = source if isinstance(source, Path) else type(source).__name__
    if isinstance(source, Path):
        try:
            source = datasets.load_from_disk(os.fspath(source))
        # What a damaged folder ends in is not documented.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{place}: not a folder that a Dataset was saved to ({reason}). Save "
                "it again with save_to_disk."
            ) from error
    if isinstance(source, dict):
        raise DataError(
            f"{place}: holds the tables {', '.join(map(str, source))}; name one of "
            f"them: {place}/{next(iter(source), '')}."
        )
    source, names = source.with_format(None), source.column_names
    if names is not None:
        for column in columns:
            if column not in names:
                raise make_missing_column_error(str(place), column, names)
        read = [n for n in names if n in {*columns, *beside}]
        source = source.select_columns(read or names)  # all, for who says what lacks
    for number, row in enumerate(source, start=1):
        yield f"{place}:{number}", row


def read_csv_rows(path: Path) -> Iterator[Row]:
    """Rows below a header, separated by commas, quoted as RFC 4180 says.

    The place is the row's first line: a quoted field may go over several.

    Raises:
      DataError: not UTF-8; a header that names a column twice; quotes that do not
        close, or close inside a field. A row with more or fewer fields than the header
        is one in its place.
    """
    text = decode(path.read_bytes(), path, first_line=1)
    for line, fields, header in _read_csv_fields(path, text):
        place = f"{path}:{line}"
        if len(fields) == len(header):
            yield place, dict(zip(header, fields))
            continue
        yield (
            place,
            DataError(
                f"{place}: {len(fields)} field(s), but the header names "
                f"{len(header)}: {header}. Quote fields that hold commas or line ends."
            ),
        )


def _read_csv_fields(path: Path, text: str) -> list[tuple[int, list[str], list[str]]]:
    """(line, fields, header) of each row below the header."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, rows, line = None, [], 1
    # A document may be longer than the 128 KiB that the module allows a field; the
    # limit is the process's, so it is put back.
    limit = csv.field_size_limit(len(text) + 1)
    try:
        for fields in reader:
            if header is None and fields:
                header = fields
            elif fields and header is not None:
                rows.append((line, fields, header))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: not CSV ({error}). A field that holds quotes is quoted, "
            'and its quotes are doubled: "say ""hello""".'
        ) from error
    finally:
        csv.field_size_limit(limit)
    if header is not None and len(set(header)) < len(header):
        raise DataError(
            f"{path}: the header {header} names a column twice. Rename one of them."
        )
    return rows


def read_parquet_rows(
    path: Path,
    columns: tuple[str, ...],
    *,
    strings: bool = True,
    beside: tuple[str, ...] = (),
) -> Iterator[Row]:
    """Rows of a Parquet file, of which only `columns` are read, a batch at a time.

    Those of `beside` are read where they are there.

    Raises:
      DataError: a column that is missing, there twice, or (if it must be) not of
        strings; a file that is truncated, damaged or encrypted.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for column in columns:
                _check_column(path, column, file.schema_arrow, strings)
            names = file.schema_arrow.names
            read = [n for n in dict.fromkeys((*columns, *beside)) if n in names]
            read = read or names  # for who says what is missing
            for batch in file.iter_batches(columns=read):
                values = [batch.column(column).to_pylist() for column in read]
                for row in zip(*values):
                    number += 1
                    yield f"{path}:{number}", dict(zip(read, row))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: not readable as Parquet after {number} row(s) ({reason}). It is "
            "truncated or damaged; copy or write it again."
        ) from error


def _check_column(path: Path, column: str, schema, strings: bool) -> None:
    import pyarrow.types as types

    found = [field.type for field in schema if field.name == column]
    if not found:
        raise make_missing_column_error(str(path), column, schema.names)
    if len(found) > 1:
        raise DataError(f"{path}: column {column!r} is there twice. Rename one.")
    kind = found[0].value_type if types.is_dictionary(found[0]) else found[0]
    if strings and not (types.is_string(kind) or types.is_large_string(kind)):
        raise DataError(
            f"{path}: column {column!r} holds {kind}, not strings. Convert it, or name "
            "another column."
        )


def read_rows(
    source: Any,
    columns: tuple[str, ...],
    *,
    strings: bool = True,
    beside: tuple[str, ...] = (),
) -> Iterator[Row] | None:
    """Rows of a Dataset, its folder, or a table by its file's suffix; None otherwise.

    A Parquet file's `columns` must be there and hold strings, unless `strings` is
    false. `beside` are columns that are read as well, where they are there. Nulls
    inside what Arrow holds are entries that another row has, and left out.
    """
    if not isinstance(source, Path) or source.is_dir():
        return _drop_nulls(read_dataset_rows(source, columns, beside))
    match source.suffix.lower():
        case ".jsonl":
            return read_json_lines(source)
        case ".json":
            return read_json_array(source)
        case ".csv":
            return read_csv_rows(source)
        case ".parquet":
            table = read_parquet_rows(source, columns, strings=strings, beside=beside)
            return _drop_nulls(table)
    return None


def _drop_nulls(table: Iterator[Row]) -> Iterator[Row]:
    """The rows, their values without entries that are null, at any depth."""

    def drop(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: drop(v) for k, v in value.items() if v is not None}
        return [*map(drop, value)] if isinstance(value, list | tuple) else value

    return (
        (place, {name: drop(value) for name, value in row.items()})
        for place, row in table
    )


def decode(content: bytes, path: Path, *, first_line: int) -> str:
    """UTF-8 as text, without the byte order mark that may start a file.

    Raises:
      DataError: not UTF-8; names the line, counted from `first_line`, and the byte.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8. "
            "Convert the file, as in: iconv -f latin1 -t utf-8."
        ) from error
    return text.removeprefix("\ufeff") if first_line == 1 else text


def _describe_error(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
