"""Rows of local tables, each with its place: `.jsonl`, `.csv`, `.parquet`.

A row maps column names to values; its place is `path:line`, or `path:row` (from 1) of a
Parquet file, which has no lines. Whatever cannot be read is a `DataError` that starts
with the place. Nothing is fetched and nothing is cached.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jmem.data.document import DataError, make_missing_column_error

Row = tuple[str, Any]
"""(place, the row there): a mapping, unless a line of JSON holds something else."""


def read_json_lines(path: Path) -> Iterator[Row]:
    """One JSON value a line; blank lines are skipped.

    Raises:
      DataError: a line that is not UTF-8 or not JSON.
    """
    # Read at once: a caller that refuses a row would leave the file open.
    for number, line in enumerate(io.BytesIO(path.read_bytes()), start=1):
        place = f"{path}:{number}"
        text = decode(line, path, first_line=number)
        if not text.strip():
            continue
        try:
            yield place, json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: not JSON ({_describe_error(error)}). A .jsonl file holds "
                "one object a line; an array must be written out one element a line."
            ) from error


def read_csv_rows(path: Path) -> Iterator[Row]:
    """Rows below a header, separated by commas, quoted as RFC 4180 says.

    The place is the row's first line: a quoted field may go over several.

    Raises:
      DataError: not UTF-8; a header that names a column twice; a row with more or fewer
        fields than the header; quotes that do not close, or close inside a field.
    """
    text = decode(path.read_bytes(), path, first_line=1)
    for line, fields, header in _read_csv_fields(path, text):
        if len(fields) != len(header):
            raise DataError(
                f"{path}:{line}: {len(fields)} field(s), but the header names "
                f"{len(header)}: {header}. Quote fields that hold commas or line ends."
            )
        yield f"{path}:{line}", dict(zip(header, fields))


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
    path: Path, columns: tuple[str, ...], *, strings: bool = True
) -> Iterator[Row]:
    """Rows of a Parquet file, of which only `columns` are read, a batch at a time.

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
            for batch in file.iter_batches(columns=list(columns)):
                values = [batch.column(column).to_pylist() for column in columns]
                for row in zip(*values):
                    number += 1
                    yield f"{path}:{number}", dict(zip(columns, row))
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
    path: Path, columns: tuple[str, ...], *, strings: bool = True
) -> Iterator[Row] | None:
    """Rows of a table by the suffix of its file; None if it is no table.

    A Parquet file's `columns` must hold strings, unless `strings` is false.
    """
    match path.suffix.lower():
        case ".jsonl":
            return read_json_lines(path)
        case ".csv":
            return read_csv_rows(path)
        case ".parquet":
            return read_parquet_rows(path, columns, strings=strings)
    return None


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
