"""Rows out of the files that users bring: JSON lines, a JSON list, CSV, TSV or Parquet, each also gzipped but the last.

A row is numbered from 1: its line in JSON lines, else its place among the rows (a CSV's header is none).
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from engine import InputError, NotBuiltError

LINES = ("", ".jsonl", ".json", ".ndjson", ".txt")
TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Unreadable:
    """Stands for a line that is no JSON value."""

    said: str


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:number", value) of each row, blank lines left out; `Unreadable` where a single line is no JSON value.

    InputError: the file cannot be read as a whole. NotBuiltError: a kind of file that is not read here.
    """
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    kind = name.suffix.lower()
    if kind == ".parquet" and name is path:
        rows = _parquet(path)
    elif kind in TABLES:
        rows = _table(path, TABLES[kind])
    elif kind in LINES:
        rows = _json(path)
    else:
        raise NotBuiltError(f"{path}: files ending in {path.suffix} are not read; convert it to JSON lines (.jsonl)")
    try:
        yield from rows
    except OSError as error:  # gzip's complaint about a damaged file has no strerror
        raise InputError(f"{path} cannot be read: {error.strerror or error}; expected a file of rows") from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be unpacked ({error}); fetch the .gz file again") from None


def stem(path: Path) -> str:
    """The name of a file without what says its kind: after it, rows without an id are named."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).stem


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines, unless the first visible character opens a list. Only a line feed ends a line: text may hold U+2028."""
    with _open(path) as file:
        first = True
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"["):
                yield from _list(path, line + file.read())
                return
            first = False
            where = f"{path}:{number}"
            try:
                yield where, _value(line.rstrip(b"\r\n"))
            except ValueError as error:
                yield where, Unreadable(f"{error}; expected one JSON value per line")


def _list(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        rows = _value(content)
    except ValueError as error:
        raise InputError(f"{path} begins like a JSON list, but is {error}; correct it, or write JSON lines") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row


def _value(content: bytes) -> Any:
    """ValueError says in words what is wrong."""
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON at {line}column {error.colno} ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON value that can be read ({error})") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Rows under the header's names. A cell is text; an empty one is no value."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KB is less than a long document
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise InputError(f"{path}: the header names a column twice ({', '.join(header)}); rename one")
            for number, cells in enumerate((cells for cells in reader if cells), start=1):
                where = f"{path}:{number}"
                if len(cells) != len(header):
                    yield where, Unreadable(f"{len(cells)} cells under a header of {len(header)} columns")
                else:
                    yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except UnicodeDecodeError:
            raise InputError(f"{path} is not UTF-8; save the file as UTF-8") from None
        except csv.Error as error:
            raise InputError(f"{path}: not CSV after line {reader.line_num} ({error}); correct the quotes") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        arrow, reader = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))  # no requirement of ours
    except ImportError:
        raise NotBuiltError(f"{path}: Parquet needs pyarrow; `pip install pyarrow`, or convert the file") from None
    with path.open("rb") as file:
        number = 0
        try:
            for batch in reader.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
        except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise InputError(f"{path} is no Parquet file that can be read ({str(error).splitlines()[0]})") from None
