"""Rows as users bring them, and every way in which they are broken."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import InputError, NotBuiltError
from selfreward import formats
from selfreward.formats import load_ift, load_prompts, load_ranked, read_jsonl

DATA = os.environ.get("SELFREWARD_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="SELFREWARD_TEST_DATA is not set: real data is not at hand")


def write(tmp_path: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tree(identity: str, *replies: tuple[Any, Any], **extra: Any) -> dict[str, Any]:
    messages: list[Any] = [
        {"text": text, "role": "assistant", "rank": rank, "replies": [], **extra} for text, rank in replies
    ]
    return {"message_tree_id": identity, "prompt": {"text": f"ask {identity}", "role": "prompter", "replies": messages}}


JSON_TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)


@given(rows=st.lists(st.dictionaries(JSON_TEXT, st.none() | st.booleans() | st.integers() | JSON_TEXT), max_size=5))
def test_rows_survive_a_round_trip(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")
    assert read_jsonl(path) == rows


def test_only_a_line_feed_ends_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y\u0085z"}\r\n{"a": "last"}'.encode())
    assert [row["a"] for row in read_jsonl(path)] == ["x\u2028y\u0085z", "last"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "rows.jsonl:2: not JSON at column"),
        (b'{"a": 1} {"b": 2}', "rows.jsonl:2: not JSON at column 10"),
        (b"nonsense", "rows.jsonl:2: not JSON at column 1"),
        (b'"text"', "rows.jsonl:2: the row is a string; expected a JSON object"),
        (b"null", "rows.jsonl:2: the row is missing or null"),
        (b"[1]", "rows.jsonl:2: the row is a list"),
        (b'{"a": NaN}', "rows.jsonl:2: .*NaN is not JSON"),
        (b'{"a": "\xff"}', "rows.jsonl:2: not UTF-8 at byte 8"),
        (b"[" * 100_000, "rows.jsonl:2: not a JSON value"),
        (b'{"a": ' + b"9" * 5000 + b"}", "rows.jsonl:2: not a JSON value"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        read_jsonl(path)


@pytest.mark.parametrize("load", [load_ift, load_prompts, load_ranked])
def test_a_file_that_is_missing_empty_or_of_another_kind_is_named(
    load: Callable[[Path], list[dict[str, Any]]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"none.jsonl cannot be read: No such file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"cannot be read: Is a directory"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"empty.jsonl holds no usable rows"):
        load(write(tmp_path, name="empty.jsonl"))
    with pytest.raises(NotBuiltError, match=r"files ending in \.xlsx are not read"):
        load(tmp_path / "rows.xlsx")
    with pytest.raises(NotBuiltError, match=r"keys turns.*not read; read here"):
        load(write(tmp_path, {"turns": ["a"]}))


# ---------------------------------------------------------------------------------------------------------------------
# IFT


def test_prompt_response_rows_keep_their_ids_or_get_the_line(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "p", "response": "r", "more": 1}, {"id": 7, "prompt": "q", "response": "s"}]
    path = write(tmp_path, *rows, {"prompt": "t", "response": "u"})
    assert load_ift(path) == [
        {"id": "a", "prompt": "p", "response": "r"},
        {"id": "7", "prompt": "q", "response": "s"},
        {"id": "rows-3", "prompt": "t", "response": "u"},
    ]
    assert [row["id"] for row in load_ift(path, limit=2)] == ["a", "7"]


def test_a_tree_gives_its_first_prompt_and_best_ranked_reply(tmp_path: Path) -> None:
    path = write(tmp_path, tree("x", ("second", 1), ("best", 0), ("third", 2)), tree("y", ("b", 3), ("c", 3), ("d", 4)))
    assert load_ift(path) == [
        {"id": "x", "prompt": "ask x", "response": "best"},
        {"id": "y", "prompt": "ask y", "response": "b"},
    ]


def test_a_tree_without_ranks_is_left_out_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, tree("x", ("a", None), ("b", None)), tree("y", ("c", 0)), tree("z", ("d", 0), deleted=True))
    with caplog.at_level(logging.WARNING):
        assert [row["id"] for row in load_ift(path, limit=5)] == [row["id"] for row in load_ift(path, limit=5)] == ["y"]
    assert caplog.text.count("left out 2 of 3 rows as no_ranked_reply, first row 1: of the tree's 2 replies none") == 1
    with pytest.raises(InputError, match=r"no usable rows \(.*rows.jsonl:1: of the tree's 1 replies none is ranked\)"):
        load_ift(write(tmp_path, tree("x", ("a", None))))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "response": True}, ":2: 'response' is the boolean true; expected a string"),
        ({"prompt": 3, "response": "r"}, ":2: 'prompt' is the number 3; expected a string"),
        ({"prompt": "p"}, ":2: the row has a prompt and no answer; expected a 'response'"),
        ({"prompt": "p", "response": "  "}, ":2: 'response' is empty"),
        ({"prompt": "p", "response": "\ud800"}, ":2: 'response' holds half of a surrogate"),
        ({"prompt": "p", "response": "r", "id": ["x"]}, ":2: 'id' is a list"),
        ({"prompt": "p", "response": "r", "id": "a"}, "the id 'a' stands in two rows"),
    ],
)
def test_a_wrong_ift_field_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_ift(write(tmp_path, {"id": "a", "prompt": "p", "response": "r"}, row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (tree("t", ("a", True)), ":2: 'rank' is the boolean true"),
        (tree("t", (False, 0)), ":2: 'text' is the boolean false"),
        ({"prompt": {"text": "p", "replies": None}}, ":2: 'prompt.replies' is missing or null"),
        ({"prompt": {"text": "p", "replies": ["a"]}}, ":2: 'prompt.replies' is a list"),
    ],
)
def test_a_wrong_tree_field_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_ift(write(tmp_path, tree("s", ("a", 0)), row))


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and ranked answers


def test_prompts_come_from_strings_and_known_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "one", {"prompt": "two", "id": "b"}, {"text": "three"}, {"instruction": "four", "input": ""})
    assert load_prompts(path) == [
        {"id": "rows-1", "prompt": "one"},
        {"id": "b", "prompt": "two"},
        {"id": "rows-3", "prompt": "three"},
        {"id": "rows-4", "prompt": "four"},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (True, ":1: the row is the boolean true"),
        ("", ":1: 'prompt' is empty"),
        ({"prompt": False}, ":1: 'prompt' is the boolean false"),
        ({"instruction": "translate", "input": 3}, ":1: 'input' is the number 3"),
        (
            {"answer": "a"},
            ":1: the row is an object with the keys answer, a format that is not read; read here: text, ",
        ),
    ],
)
def test_a_wrong_prompt_is_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_prompts(write(tmp_path, row))


def test_ranked_groups_keep_order_ranks_and_empty_answers(tmp_path: Path) -> None:
    answers = [{"text": "b", "rank": 1, "by": "x"}, {"text": "a", "rank": 0}, {"text": "", "rank": 1}]
    assert load_ranked(write(tmp_path, {"prompt": "p", "answers": answers})) == [
        {
            "id": "rows-1",
            "prompt": "p",
            "answers": [{"text": "b", "rank": 1}, {"text": "a", "rank": 0}, {"text": "", "rank": 1}],
        }
    ]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"text": "a", "rank": 0}], "'answers' has one entry; expected two or more"),
        ([{"text": "a", "rank": 0}, "b"], r"'answers\[1\]' is a string; expected an object with 'text' and 'rank'"),
        ([{"text": "a", "rank": 0}, {"text": "b", "rank": True}], "'rank' is the boolean true"),
        ([{"text": "a", "rank": 0}, {"text": "b"}], "'rank' is missing or null"),
        ([{"text": "a", "rank": 0}, {"text": "b", "rank": 0.5}], "'rank' is the number 0.5"),
        ([{"text": "a", "rank": 0}, {"text": None, "rank": 1}], "'text' is missing or null"),
        ("ab", "'answers' is a string; expected a list of objects with 'text' and 'rank'"),
        ([], "'answers' has no entries; expected two or more"),
    ],
)
def test_a_wrong_ranked_answer_is_named(answers: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_ranked(write(tmp_path, {"prompt": "p", "answers": answers}))


# ---------------------------------------------------------------------------------------------------------------------
# Real files


@needs_data
def test_real_open_assistant_trees_give_their_best_replies(caplog: pytest.LogCaptureFixture) -> None:
    path = Path(DATA or "") / "oasst" / "en_100_tree.jsonl"
    formats._warn_once.cache_clear()  # another test may have read the file
    rows = load_ift(path)
    assert (
        len(rows) == 99 and "left out 1 of 100 rows as no_ranked_reply" in caplog.text
    )  # one tree has three unranked replies
    best = {
        t["message_tree_id"]: [r["text"] for r in t["prompt"]["replies"] if r.get("rank") == 0]
        for t in map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
    }
    assert all([row["response"]] == best[row["id"]] for row in rows)


@needs_data
def test_real_prompts_are_plain_json_strings() -> None:
    rows = load_prompts(Path(DATA or "") / "oasst" / "prompt_lottery_en_250_text.jsonl")
    assert len(rows) == 250 and rows[0]["prompt"] == "Can you tell me about GLaDOS?"


@needs_data
def test_real_seed_tasks_are_read_by_their_instruction() -> None:
    rows = load_prompts(Path(DATA or "") / "self_instruct" / "seed_tasks.jsonl")
    assert len(rows) == 175 and rows[0]["id"] == "seed_task_0"
