"""What rows does a file of rows hold? CSV, JSON lines, Parquet and Arrow; here, in a store, or gzipped.

What its columns mean is not known here.
"""

from __future__ import annotations

import csv as python_csv
import gzip
import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, json

from thawline.dataio.errors import SourceError, quoted
from thawline.dataio.store import files
from thawline.dataio.store.root import Root

TEXTS, JSONS, TABLES = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".parquet", ".arrow", ".feather")
"""Endings of lists of images, each also followed by .gz."""

_WORKBOOKS = (".xlsx", ".xls", ".xlsm", ".ods")
_SEPARATORS = ",;\t|"
_SAMPLE_BYTES = 1 << 16
_LINE_BYTES = 16 << 20  # the longest row that is read: run-length masks have some 100 kB
_DEEPEST = 64
_UNPACKED_BYTES, _RATIO = 64 << 20, 200  # beyond both it is a bomb: texts shrink to a tenth, zeros to a thousandth
_EXCELS_LINE = re.compile(rb"(?:\xef\xbb\xbf)?sep=([ !#-~\t])\r?\n")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_CANNOT = (pa.ArrowException, OSError, ValueError)


def ending(file: str | Path) -> str:
    """The ending of a list's name, in lower case and without .gz: '.csv'."""
    return Path(str(file).partition("?")[0].lower().removesuffix(".gz")).suffix


def is_known(file: str | Path) -> bool:
    """Whether a file is a list by its name, or a workbook, for which `check_kind` has a remedy."""
    return ending(file) in (*TEXTS, *JSONS, *TABLES, *_WORKBOOKS)


def check_kind(file: str | Path) -> None:
    """Raises SourceError for a workbook, or another file that is no list of images by its name."""
    if ending(file) in _WORKBOOKS:
        raise SourceError(
            f"{file} is a workbook, which is not read: save its sheet as CSV (UTF-8) and give that, or write it with "
            "pandas.read_excel(...).to_parquet(...)"
        )
    if ending(file) not in (*TEXTS, *JSONS, *TABLES):
        raise SourceError(
            f"{file} is a file and no list of images by its name: give a folder, or a list that ends in "
            f"{', '.join((*TEXTS, *JSONS))} (each also .gz), .parquet or .arrow"
        )


def contents(home: Root, name: str, kind: str) -> pa.Buffer:
    """A file's bytes, unpacked if they are gzipped; a local one is mapped. Raises SourceError."""
    path = home.full(name)
    try:
        data = home.buffer(name)
        if data[:2].to_pybytes() == b"\x1f\x8b":
            data = _unpacked(data, path)
    except FileNotFoundError as error:
        raise SourceError(f"no {kind} at {path}: there is nothing to list; check the path") from error
    except (EOFError, zlib.error) as error:
        raise SourceError(f"{path} cannot be unpacked ({error}): it is damaged or cut off; fetch it again") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({files.why_unreadable(error)}): check what it is") from error
    if data[:4].to_pybytes() == b"PK\3\4":
        raise SourceError(
            f"{path} is a zip archive or a workbook by its content: save its sheet as CSV (UTF-8), or unpack it"
        )
    return data


def _unpacked(data: pa.Buffer, path: str) -> pa.Buffer:
    most = max(_UNPACKED_BYTES, _RATIO * data.size)
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
        plain = packed.read(most + 1)
    if len(plain) > most:
        raise SourceError(
            f"{path} unpacks to more than {most:,} bytes, over {_RATIO} times its size, which no list does: it would "
            "fill the memory; check what it is"
        )
    return pa.py_buffer(plain)


# CSV ------------------------------------------------------------------------------------------------------


def csv_rows(
    data: pa.Buffer, file: str, *, separator: str | None = None, column_names: Sequence[str] | None = None
) -> tuple[pa.Table, str]:
    """The rows of a CSV, every column a text, and the separator of its columns, detected where none is given.

    Raises: SourceError for what is no CSV, naming the line if it is known.
    """
    if (start := data[:2].to_pybytes()) in _UTF16 or start.count(b"\0") == 1:
        raise SourceError(f"{file} is text in UTF-16, which is not read: save it as UTF-8")
    if excel_line := _EXCELS_LINE.match(data[:16].to_pybytes()):
        separator, data = separator or excel_line[1].decode(), data[excel_line.end() :]
    if separator is None:
        separator = _separator(data, default=usual_separator(file))
    elif len(separator) != 1 or not separator.isascii() or separator in '"\r\n':
        raise SourceError(f"separator {quoted(repr(separator))} is not one character of ASCII: give one such as ';'")
    text = _text(data, file, "CSV")
    _check_lines(text, file)
    _check_quotes(text, separator.encode(), file)
    bad: list[csv.InvalidRow] = []

    def keep(row: csv.InvalidRow) -> str:
        bad.append(row)
        return "error"

    parse = csv.ParseOptions(
        delimiter=separator,
        newlines_in_values=True,  # of a caption, say; see labels.py and sources.py for what must not hold one
        invalid_row_handler=keep,
    )
    header = csv.ReadOptions(
        column_names=None if column_names is None else list(column_names), block_size=_LINE_BYTES, use_threads=False
    )
    try:
        names = csv.open_csv(pa.BufferReader(data), header, parse).schema.names
        as_text = csv.ConvertOptions(column_types={name: pa.string() for name in names})
        rows = csv.read_csv(pa.BufferReader(data), header, parse, as_text)
        return rows.rename_columns([name.strip() for name in rows.column_names]), separator
    except _CANNOT as error:
        raise SourceError(f"{file} cannot be read as CSV: {_why(error, bad)}") from error


def usual_separator(file: str | Path) -> str:
    """The usual separator for a file's ending."""
    return "\t" if ending(file) == ".tsv" else ","


def _separator(data: pa.Buffer, *, default: str) -> str:
    """The default if the first line holds it, else what csv.Sniffer detects."""
    sample = data[:_SAMPLE_BYTES].to_pybytes().decode("utf-8-sig", "replace").replace("\r\n", "\n")
    first = sample.partition("\n")[0]
    if default in first:
        return default
    candidates = [mark for mark in _SEPARATORS if mark in first]
    try:
        separator = python_csv.Sniffer().sniff(sample, "".join(candidates)).delimiter if candidates else default
    except python_csv.Error:
        separator = candidates[0]
    return separator


def _why(error: Exception, bad: list[csv.InvalidRow]) -> str:
    """Why a CSV cannot be read, and the remedy."""
    if bad:
        where = f" in row {bad[0].number} of the file" if bad[0].number is not None else ""
        return (
            f"expected {bad[0].expected_columns} columns, got {bad[0].actual_columns}{where} ({quoted(bad[0].text)}); "
            "correct it there, or name the --separator"
        )
    return f"{quoted(str(error))}; check its separator and encoding"


def _text(data: pa.Buffer, file: str, kind: str) -> bytes:
    """All of a file of text.

    Raises: SourceError for a first line that is too long for a row, before the rest is read; for a file that does not
        fit into memory; for text that is not UTF-8, since Arrow prints a traceback if a row of it is wrong as well.
    """
    if data.size > _LINE_BYTES:
        _check_lines(data[: _LINE_BYTES + 1].to_pybytes(), file, kind)
    try:
        text: bytes = data.to_pybytes()
        text.decode()
    except MemoryError as error:
        raise SourceError(
            f"{file} cannot be read as {kind}: its {data.size:,} bytes do not fit into memory; write it as Parquet"
        ) from error
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise SourceError(
            f"{file} cannot be read as {kind}: line {line} is not UTF-8 (byte {text[error.start]:#04x}); save it as "
            "UTF-8"
        ) from error
    return text


def _check_lines(data: bytes, file: str, kind: str = "CSV") -> None:
    """Raises SourceError for a line of more than _LINE_BYTES."""
    start = 0
    while len(data) - start > _LINE_BYTES:
        end = data.rfind(b"\n", start, start + _LINE_BYTES + 1)
        if end < 0:
            line = data.count(b"\n", 0, start) + 1
            raise SourceError(
                f"{file} cannot be read as {kind}: line {line} has more than {_LINE_BYTES:,} bytes, which is "
                "no row of a list of images; check what the file is"
            )
        start = end + 1


def _check_quotes(data: bytes, separator: bytes, file: str) -> None:
    """Raises SourceError for a quote that does not close, or not at the end of a value: it would swallow rows.

    A quote opens at the beginning of a value; within one it is a character like others.
    """
    start = data.find(b'"')
    while start >= 0:
        if start == 0 or data[start - 1 : start] in (separator, b"\n", b"\r") or data[:start] == b"\xef\xbb\xbf":
            close = data.find(b'"', start + 1)
            while close >= 0 and data[close + 1 : close + 2] == b'"':  # doubled: a quote within the value
                close = data.find(b'"', close + 2)
            if close < 0 or data[close + 1 : close + 2] not in (separator, b"\n", b"\r", b""):
                line = data.count(b"\n", 0, start) + 1
                value = data[start : start + 100].partition(b"\n")[0].decode("utf-8", "replace")
                raise SourceError(
                    f"{file} has a quote in line {line} that does not close at the end of its value "
                    f"({quoted(value.strip())}): it would swallow the rows behind it; close or remove it"
                )
            start = close
        start = data.find(b'"', start + 1)


# JSON lines, Parquet, Arrow -------------------------------------------------------------------------------


def json_rows(data: pa.Buffer, file: str) -> pa.Table:
    """The rows of JSON lines, an object a line. Raises SourceError for what is none."""
    read = json.ReadOptions(block_size=_LINE_BYTES, use_threads=False)
    text = _text(data, file, "JSON lines")
    try:
        if _depth(text) > _DEEPEST:
            raise ValueError(f"brackets within brackets, deeper than {_DEEPEST}")
        rows = json.read_json(pa.BufferReader(data), read)
        names = rows.column_names
        dates = [pa.field(f.name, pa.string()) for f in rows.schema if pa.types.is_timestamp(f.type)]
        if dates:  # texts that look like dates: a class named 2024-05-01 keeps its name
            rows = json.read_json(pa.BufferReader(data), read, json.ParseOptions(explicit_schema=pa.schema(dates)))
        return rows.select(names)
    except _CANNOT as error:
        raise SourceError(
            f"{file} cannot be read as JSON lines: {quoted(str(error))}; give an object a line, such as "
            '{"path": "a.jpg", "label": "cat"}'
        ) from error


def _depth(data: bytes) -> int:
    """The depth of nested brackets: the parser recurses for each, until the process dies."""
    brackets = re.sub(rb'"[^"\\\\]*(?:\\\\.[^"\\\\]*)*"', b"", data, flags=re.DOTALL)
    marks = np.frombuffer(brackets.translate(None, bytes(set(range(256)) - set(b"{}[]"))), np.uint8)
    opens = (marks == ord("{")) | (marks == ord("["))
    return int(np.cumsum(np.where(opens, 1, -1)).max(initial=0))


def table_rows(data: pa.Buffer, file: str) -> pa.Table:
    """The rows of a Parquet or Arrow file, its metadata with them. Raises SourceError for what is none."""
    try:
        arrow = data[:6].to_pybytes() == b"ARROW1"
        rows = pa.ipc.open_file(pa.BufferReader(data)).read_all() if arrow else files.as_table(data)
        rows.validate(full=True)  # damaged offsets in a stranger's file would be read as addresses
    except _CANNOT as error:
        if data[:4].to_pybytes() == b"\xff\xff\xff\xff":
            raise SourceError(
                f"{file} is a stream of Arrow's, as the datasets library writes, and no file of it, so it is not read: "
                "write its table as Parquet (to_parquet) and give that"
            ) from error
        raise SourceError(
            f"{file} cannot be read as Parquet or Arrow: {quoted(str(error))}; check what it is"
        ) from error
    return rows
