"""Reading the rows that users bring: JSON lines of instructions, prompts and ranked answers.

Every complaint names the file and the line, what was found and what was expected. A row's id is its own "id" (a
string or an integer), else the file's stem and the line number.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from engine import InputError, NotBuiltError

log = logging.getLogger(__name__)

IFT_FORMATS = '{"prompt": text, "response": text} rows or Open Assistant trees'
PROMPT_FORMATS = 'JSON strings, or rows with a text under "prompt", "text" or "instruction"'
RANKED_FORMATS = '{"prompt": text, "answers": [{"text": text, "rank": integer, 0 the best}, ...]} rows'


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, in order; blank lines are skipped. InputError names "file:line"."""
    return [_mapping(where, row) for where, row in _rows(Path(path))]


def load_ift(path: str | Path, limit: int | None = None) -> list[dict[str, str]]:
    """The first `limit` instructions with human answers: [{"id", "prompt", "response"}].

    Either {"prompt", "response"} rows, or Open Assistant trees: the tree's first prompt and its best-ranked root reply.
    A tree without a ranked reply is left out, and how many were is logged. The first row decides which format it is.
    """
    path, read = Path(path), None
    rows: list[dict[str, str]] = []
    unranked = 0
    for where, row in _rows(path):
        if limit is not None and len(rows) >= limit:
            break
        read = read or _ift_reader(where, row)
        example = read(where, _mapping(where, row))
        if example is None:
            unranked += 1
        else:
            rows.append(example)
    if unranked:
        trees = "tree" if unranked == 1 else "trees"
        _warn_once(f"{path}: left out {unranked} Open Assistant {trees} without a ranked reply, read {len(rows)}")
    return _identified(path, rows)


def load_prompts(path: str | Path) -> list[dict[str, str]]:
    """Instructions without answers: [{"id", "prompt"}], from plain JSON strings or rows with one of the known keys."""
    return _identified(Path(path), [_prompt(where, row) for where, row in _rows(Path(path))])


def load_ranked(path: str | Path) -> list[dict[str, Any]]:
    """EFT groups: [{"id", "prompt", "answers": [{"text", "rank"}]}]; rank 0 is the best, equal ranks are equals.

    At least two answers each; an answer may be empty (it can be the worst), a prompt may not.
    """
    return _identified(Path(path), [_ranked_group(where, _mapping(where, row)) for where, row in _rows(Path(path))])


@functools.cache
def _warn_once(text: str) -> None:
    """A run reads a file several times."""
    log.warning(text)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of each format


def _ift_reader(where: str, row: Any) -> Callable[[str, dict[str, Any]], dict[str, str] | None]:
    if isinstance(row, dict) and isinstance(row.get("prompt"), dict):
        return _tree_example
    if isinstance(row, dict) and "prompt" in row and "response" in row:
        return _plain_example
    _unknown_format(where, row, IFT_FORMATS)


def _plain_example(where: str, row: dict[str, Any]) -> dict[str, str]:
    return {
        "id": _row_id(where, row.get("id")),
        "prompt": _text(where, row, "prompt"),
        "response": _text(where, row, "response"),
    }


def _tree_example(where: str, row: dict[str, Any]) -> dict[str, str] | None:
    """The tree's first prompt with the root reply of the lowest rank (the first of equals); None without ranks."""
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise InputError(f"{where}: 'prompt' is {_kind(root)}; expected the root message of an Open Assistant tree")
    replies = root.get("replies")
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise InputError(f"{where}: 'prompt.replies' is {_kind(replies)}; expected a list of messages")
    ranked = [r for r in replies if r.get("rank") is not None and r.get("deleted") is not True]
    if not ranked:
        return None
    best = min(ranked, key=lambda reply: _rank(where, reply))
    return {
        "id": _row_id(where, row.get("message_tree_id")),
        "prompt": _text(where, root, "text"),
        "response": _text(where, best, "text"),
    }


def _prompt(where: str, row: Any) -> dict[str, str]:
    if isinstance(row, str):
        return {"id": _row_id(where, None), "prompt": _text(where, {"prompt": row}, "prompt")}
    key = next((k for k in ("prompt", "text", "instruction") if isinstance(row, dict) and k in row), None)
    if key is None or isinstance(row[key], (dict, list)):
        _unknown_format(where, row, PROMPT_FORMATS)
    if isinstance(row.get("input"), str) and row["input"].strip():
        raise NotBuiltError(f"{where}: an 'input' beside '{key}' is not read; write both into one 'prompt'")
    return {"id": _row_id(where, row.get("id")), "prompt": _text(where, row, key)}


def _ranked_group(where: str, row: dict[str, Any]) -> dict[str, Any]:
    answers = row.get("answers")
    if "prompt" not in row or "answers" not in row:
        _unknown_format(where, row, RANKED_FORMATS)
    if not isinstance(answers, list):
        raise InputError(f"{where}: 'answers' is {_kind(answers)}; expected a list of objects with 'text' and 'rank'")
    for place, answer in enumerate(answers):
        if not isinstance(answer, dict):
            raise InputError(
                f"{where}: 'answers[{place}]' is {_kind(answer)}; expected an object with 'text' and 'rank'"
            )
    if len(answers) < 2:
        raise InputError(f"{where}: 'answers' has {'one entry' if answers else 'no entries'}; expected two or more")
    return {
        "id": _row_id(where, row.get("id")),
        "prompt": _text(where, row, "prompt"),
        "answers": [
            {"text": _text(where, answer, "text", may_be_empty=True), "rank": _rank(where, answer)}
            for answer in answers
        ],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Fields


def _text(where: str, row: dict[str, Any], key: str, may_be_empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: '{key}' is {_kind(value)}; expected a string")
    if not may_be_empty and not value.strip():
        raise InputError(f"{where}: '{key}' is empty; write the text or remove the row")
    if any("\ud800" <= c <= "\udfff" for c in value):  # JSON can spell these, UTF-8 cannot
        raise InputError(f"{where}: '{key}' holds half of a surrogate pair; expected text that UTF-8 can encode")
    return value


def _rank(where: str, answer: dict[str, Any]) -> int:
    rank = answer.get("rank")
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise InputError(f"{where}: 'rank' is {_kind(rank)}; expected an integer, 0 the best")
    return rank


def _row_id(where: str, value: Any) -> str:
    if value is None:
        file, _, line = where.rpartition(":")
        return f"{Path(file).stem}-{line}"
    if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
        return str(value)
    raise InputError(f"{where}: 'id' is {_kind(value)}; expected a string or an integer")


def _identified(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, if there are any and their ids differ: seeds and files of the loop are keyed by them."""
    if not rows:
        raise InputError(f"{path} holds no usable rows; expected at least one")
    seen = set()
    for row in rows:
        if row["id"] in seen:
            raise InputError(f"{path}: the id {row['id']!r} stands in two rows; give every row its own, or none")
        seen.add(row["id"])
    return rows


def _mapping(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: the row is {_kind(row)}; expected a JSON object")
    return row


def _kind(value: Any) -> str:
    """What a JSON value is, in words that name the value where it is short."""
    if value is None:
        return "missing or null"
    if isinstance(value, (bool, int, float)):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {json.dumps(value)}"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"


def _unknown_format(where: str, row: Any, expected: str) -> NoReturn:
    found = f"an object with the keys {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else _kind(row)
    raise NotBuiltError(f"{where}: the row is {found}, a format that is not read; read here: {expected}")


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of each line that is not blank. Only a line feed ends a line: text may hold U+2028."""
    if path.suffix.lower() not in ("", ".jsonl", ".json", ".ndjson", ".txt"):
        raise NotBuiltError(f"{path}: files ending in {path.suffix} are not read; convert it to JSON lines (.jsonl)")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _value(where, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; expected a JSON lines file") from None


def _value(where: str, line: bytes) -> Any:
    if where.endswith(":1") and line.lstrip().startswith(b"["):
        raise NotBuiltError(f"{where}: a JSON list is not read; write one row per line (JSON lines)")
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON at column {error.colno} ({error.msg}); expected one JSON value per line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a JSON value that can be read ({error})") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
