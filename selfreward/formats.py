"""Reading the rows that users bring: instructions with answers, prompts, ranked answers, in any format of `records`.

Every row of a file is read, or refused with its reason; `Read` counts both and they add up. A row that is not what its
format says (`broken`) stops a run, with the file, the line, what was found and what was expected; a row that is in order
and of no use (a tree without ranks) is left out, and how many were is said. A row's id is its own, else the file's stem
and the row's number.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from engine import InputError, NotBuiltError
from selfreward.files import Unreadable, read_rows, stem
from selfreward.records import FORMATS, Record, Refused, Row, format_of, kind, read_record, renamed, unknown

log = logging.getLogger(__name__)

NO_FORMAT = "none"  # what `matched` counts a row under that has no format's keys


class Refusal(NamedTuple):
    """A row that was not taken: where it stands, in which format, why in a word and in a sentence."""

    where: str
    format: str
    reason: str
    said: str
    broken: bool


@dataclass
class Read:
    """What became of a file: `total` rows were looked at, each is one of `rows` or of `refused`."""

    path: Path
    total: int = 0
    rows: list[Row] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    matched: Counter[str] = field(default_factory=Counter)  # format -> rows, refused ones among them
    cut_short: int = 0  # rows whose conversation goes on behind the answer that was taken

    def reasons(self) -> Counter[str]:
        return Counter(refusal.reason for refusal in self.refused)

    def check(self) -> None:
        """Every row is accounted for."""
        assert len(self.rows) + len(self.refused) == self.total == sum(self.matched.values()), self.path


def read_jsonl(path: str | Path) -> list[Row]:
    """The objects of a JSON lines file, in order; blank lines are skipped. InputError names "file:line"."""
    return [_mapping(where, row) for where, row in read_rows(Path(path))]


# ---------------------------------------------------------------------------------------------------------------------
# What a record is wanted for: each gives a row, or refuses


def as_example(record: Record) -> Row:
    """{"id", "prompt", "response"}: the answer of the lowest rank, the first of equals."""
    _check_answered(record)
    best = min(record.answers, key=lambda answer: answer.rank)
    if not best.text.strip():
        raise Refused("empty", "the answer is empty; write the text or remove the row")
    return {"id": record.id, "prompt": record.prompt, "response": best.text}


def as_prompt(record: Record) -> Row:
    """{"id", "prompt"}; answers are passed over, whatever is wrong with them."""
    return {"id": record.id, "prompt": record.prompt}


def as_group(record: Record) -> Row:
    """{"id", "prompt", "answers": [{"text", "rank"}]}: two answers or more, in the order of the file."""
    _check_answered(record)
    if len(record.answers) < 2:
        raise Refused("one_answer", "the row has one ranked answer; two or more say which is better", broken=False)
    return {"id": record.id, "prompt": record.prompt, "answers": [answer._asdict() for answer in record.answers]}


def _check_answered(record: Record) -> None:
    if record.unread is not None:
        raise record.unread
    if not record.answers:
        raise Refused("no_answer", "the row has a prompt and no answer; expected a 'response' beside it")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_file(
    path: str | Path,
    use: Callable[[Record], Row],
    format: str | None = None,
    language: str | None = None,
    limit: int | None = None,
) -> Read:
    """The file's rows as `use` wants them, until there are `limit`; nothing is dropped without a reason.

    format: one of FORMATS for all rows; None: recognised row by row. language: rows that state another are left out.
    InputError or NotBuiltError: the file cannot be read at all, or two rows have one id.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"the format {format!r} is not read; use one of {', '.join(FORMATS)}")
    read, ids = Read(Path(path)), dict[str, str]()
    for where, row in read_rows(read.path):
        if limit is not None and len(read.rows) >= limit:
            break
        name = format or format_of(row) or NO_FORMAT
        read.total += 1
        read.matched[name] += 1
        try:
            record = _record(where, row, name, language)
            taken = use(record)
        except Refused as refused:
            read.refused.append(Refusal(where, name, refused.reason, refused.said, refused.broken))
            continue
        if ids.setdefault(taken["id"], where) != where:
            read.refused.append(Refusal(where, name, "same_id", _same_id(taken["id"], ids[taken["id"]]), True))
            continue
        read.rows.append(taken)
        read.cut_short += record.later_turns > 0
    read.check()
    return read


def usable(read: Read) -> list[Row]:
    """The rows for a run. InputError: a row is broken, or there is none. What was left out is logged, once."""
    broken = [refusal for refusal in read.refused if refusal.broken]
    if broken:
        more = f" ({len(broken) - 1} more such rows after this one)" if len(broken) > 1 else ""
        error = NotBuiltError if broken[0].reason == "unknown_format" else InputError
        raise error(f"{broken[0].where}: {broken[0].said}{more}")
    for sentence in left_out(read):
        _warn_once(sentence)
    if not read.rows:
        why = f" ({read.refused[0].where}: {read.refused[0].said})" if read.refused else ""
        raise InputError(f"{read.path} holds no usable rows{why}; expected at least one")
    return read.rows


def left_out(read: Read) -> list[str]:
    """What of a file is in order and of no use, in sentences: rows by reason with the first of each, and conversations of
    which only the beginning is taken."""
    said = []
    useless = [refusal for refusal in read.refused if not refusal.broken]
    for reason, count in sorted(Counter(refusal.reason for refusal in useless).items()):
        first = next(refusal for refusal in useless if refusal.reason == reason)
        said.append(
            f"{read.path}: left out {count} of {read.total} rows as {reason}, first row {_row_of(first)}: {first.said}"
        )
    if read.cut_short:
        said.append(f"{read.path}: of {read.cut_short} of {read.total} conversations only the first exchange is taken")
    return said


def load_ift(
    path: str | Path, limit: int | None = None, format: str | None = None, language: str | None = None
) -> list[Row]:
    """The first `limit` instructions with human answers: [{"id", "prompt", "response"}].

    Of ranked answers the best is taken, of a conversation the first exchange.
    """
    return usable(read_file(path, as_example, format, language, limit))


def load_prompts(path: str | Path, format: str | None = None, language: str | None = None) -> list[Row]:
    """Instructions without answers: [{"id", "prompt"}]."""
    return usable(read_file(path, as_prompt, format, language))


def load_ranked(path: str | Path, format: str | None = None, language: str | None = None) -> list[Row]:
    """Ranked answers: [{"id", "prompt", "answers": [{"text", "rank"}]}]; rank 0 is the best, equal ranks are equals.

    At least two answers each; an answer may be empty (it can be the worst), a prompt may not.
    """
    return usable(read_file(path, as_group, format, language))


def _record(where: str, row: Any, name: str, language: str | None) -> Record:
    if isinstance(row, Unreadable):
        raise Refused("unreadable", row.said)
    if name == NO_FORMAT:
        unknown(row)
    file, _, number = where.rpartition(":")
    record = renamed(read_record(row, name), f"{stem(Path(file))}-{number}")
    if language is not None and record.language is not None and record.language != language:
        raise Refused("language", f"its language is {record.language!r}, not {language!r}", broken=False)
    return record


def _same_id(name: str, first: str) -> str:
    return f"the id {name!r} stands in two rows, here and in {first}; give every row its own, or none"


def _row_of(refusal: Refusal) -> str:
    return refusal.where.rpartition(":")[2]


def _mapping(where: str, row: Any) -> Row:
    if isinstance(row, Unreadable):
        raise InputError(f"{where}: {row.said}")
    if not isinstance(row, dict):
        raise InputError(f"{where}: the row is {kind(row)}; expected a JSON object")
    return row


@functools.cache
def _warn_once(text: str) -> None:
    """A run reads a file several times."""
    log.warning(text)
