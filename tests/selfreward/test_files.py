"""Containers: whatever a file is packed in, its rows are the same, and damage is said in one sentence."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from engine import InputError, NotBuiltError
from selfreward.files import Unreadable, read_rows, stem

ROWS = [{"prompt": "a\u2028b", "response": 'say "x",\nthen y'}, {"prompt": "\u00e9", "response": "z" * 200_000}]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[Any], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


PACKED = {
    "rows.jsonl": lines(ROWS),
    "rows": lines(ROWS),
    "rows.json": json.dumps(ROWS, indent=2).encode(),
    "blank.json": b"\n \n" + json.dumps(ROWS).encode(),
    "listed.jsonl": json.dumps(ROWS).encode(),
    "rows.jsonl.gz": gzip.compress(lines(ROWS)),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv": table(ROWS),
    "marked.csv": b"\xef\xbb\xbf" + table(ROWS),
    "rows.tsv": table(ROWS, "\t"),
    "rows.csv.gz": gzip.compress(table(ROWS)),
}


@pytest.mark.parametrize("name", PACKED)
def test_every_container_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PACKED[name])
    found = list(read_rows(tmp_path / name))
    assert [row for _, row in found] == ROWS
    assert [where for where, _ in found] == [f"{tmp_path / name}:{number}" for number in (1, 2)]


def test_parquet_gives_the_same_rows_and_says_what_is_broken(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, Any]] = [row | {"turns": [{"role": "user", "content": "x"}]} for row in ROWS]
    parquet.write_table(arrow.Table.from_pylist([*rows, {"prompt": "q"}]), tmp_path / "rows.parquet", row_group_size=1)
    empty = {"response": None, "turns": None}
    assert [row for _, row in read_rows(tmp_path / "rows.parquet")] == [*rows, {"prompt": "q"} | empty]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cut.parquet is no Parquet file that can be read \("):
        list(read_rows(tmp_path / "cut.parquet"))


def test_parquet_without_its_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(NotBuiltError, match="Parquet needs pyarrow; `pip install pyarrow`"):
        list(read_rows(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-9], "a.jsonl.gz cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:40] + b"\x00" * 40, "a.jsonl.gz cannot be "),
        ("a.jsonl.gz", lines(ROWS), "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.json", b'[{"a": 1},\n {"b": }]', r"a.json begins like a JSON list, but is not JSON at line 2, column 8"),
        ("a.json", b"[1, NaN]", "but is not a JSON value that can be read .NaN is not JSON"),
        ("a.json", b'["\xff"]', "but is not UTF-8 at byte 3"),
        ("a.csv", b"p,p\n1,2\n", r"the header names a column twice \(p, p\)"),
        ("a.csv", b'p,q\n"1"x,2\n', "not CSV after line 2"),
        ("a.csv", b'p,q\n"1,2\n', "not CSV after line 2"),
        ("a.csv", b"p,q\n\xff,2\n", "a.csv is not UTF-8"),
        ("a.xlsx", b"", r"files ending in \.xlsx are not read"),
        ("a.tar.gz", b"", r"files ending in \.gz are not read"),
        ("a.parquet.gz", b"", r"files ending in \.gz are not read"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_whole_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_rows(tmp_path / name))


def test_a_single_line_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\nnonsense\n\n{"a": 2}\n')
    first, bad, last = read_rows(tmp_path / "a.jsonl")
    assert (first[1], last) == ({"a": 1}, (f"{tmp_path / 'a.jsonl'}:4", {"a": 2}))
    assert bad[1] == Unreadable("not JSON at column 1 (Expecting value); expected one JSON value per line")
    (tmp_path / "a.csv").write_bytes(b"p,q\n1,2\n1\n\n3,\n")
    first, bad, last = read_rows(tmp_path / "a.csv")
    assert (first[1], last[1]) == ({"p": "1", "q": "2"}, {"p": "3", "q": None})
    assert bad == (f"{tmp_path / 'a.csv'}:2", Unreadable("1 cells under a header of 2 columns"))


def test_rows_without_an_id_are_named_after_the_file_without_its_kinds() -> None:
    assert [stem(Path(name)) for name in ("x/rows.jsonl", "rows.v2.jsonl.gz", "rows", "rows.GZ")] == [
        "rows",
        "rows.v2",
        "rows",
        "rows",
    ]
