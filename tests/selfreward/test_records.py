"""Formats: the same content in all of them is the same record, and every row that gives none says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import InputError, Tokenizer
from selfreward.formats import as_example, as_group, as_prompt, left_out, load_ift, load_prompts, load_ranked, read_file
from selfreward.recipe import PACKAGE
from selfreward.records import FORMATS, Answer, Record, Refused, format_of, read_record, with_system

Q, GOOD, BAD = "What is 2 + 2?", "Four.", "Five."


def user(text: str = Q) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str = GOOD) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def human(text: str = Q) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: str = GOOD) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


def tree(*replies: tuple[str, int | None]) -> dict[str, Any]:
    messages = [{"text": text, "rank": rank, "role": "assistant", "replies": []} for text, rank in replies]
    return {"message_tree_id": "t", "prompt": {"text": Q, "role": "prompter", "lang": "en", "replies": messages}}


ANSWERED = [
    ("prompt_completion", {"prompt": Q, "response": GOOD}),
    ("prompt_completion", {"prompt": Q, "completion": GOOD}),
    ("prompt_completion", {"prompt": [user()], "completion": [assistant()]}),
    ("prompt_completion", {"prompt": Q, "completion": GOOD, "label": True}),
    ("messages", {"messages": [user(), assistant()]}),
    ("messages", {"prompt": Q, "prompt_id": "7", "messages": [user(), assistant()]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, assistant()]}),
    ("sharegpt", {"conversations": [human(), gpt()]}),
    ("sharegpt", {"id": "x_0", "conversations": [human(), gpt()], "system": ""}),
    ("sharegpt", {"conversations": [user(), assistant()]}),
    ("alpaca", {"instruction": Q, "input": "", "output": GOOD}),
    ("alpaca", {"instruction": Q, "output": GOOD, "history": []}),
    ("open_assistant", tree((BAD, 1), (GOOD, 0), ("Six.", None))),
]
PREFERRED = [
    ("preference", {"prompt": Q, "chosen": GOOD, "rejected": BAD, "score_chosen": 5.0}),
    ("preference_conversational", {"prompt": [user()], "chosen": [assistant()], "rejected": [assistant(BAD)]}),
    ("preference_conversational", {"prompt": Q, "chosen": [user(), assistant()], "rejected": [user(), assistant(BAD)]}),
    ("preference_implicit", {"chosen": [user(), assistant()], "rejected": [user(), assistant(BAD)]}),
    ("preference_implicit", {"chosen": f"{Q} {GOOD}", "rejected": f"{Q} {BAD}"}),
    (
        "preference_implicit",
        {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}"},
    ),
    (
        "pandalm",
        {"idx": 3, "instruction": Q, "input": "", "response1": BAD, "response2": GOOD}
        | {"annotator1": 2, "annotator2": 0, "annotator3": 2},
    ),
    ("llmbar", {"input": Q, "output_1": BAD, "output_2": GOOD, "label": 2}),
    ("sharegpt_preference", {"conversations": [human()], "chosen": gpt(), "rejected": gpt(BAD)}),
    ("alpaca_preference", {"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD}),
    ("ranked", {"prompt": Q, "answers": [{"text": BAD, "rank": 1}, {"text": GOOD, "rank": 0}]}),
    ("open_assistant", tree((BAD, 1), (GOOD, 0))),
]


@pytest.mark.parametrize(("name", "row"), ANSWERED + PREFERRED)
def test_an_answered_question_is_the_same_in_every_format(name: str, row: dict[str, Any]) -> None:
    assert format_of(row) == name
    record = read_record(row, name)
    example = as_example(record)
    assert (example["prompt"], example["response"].strip()) == (Q, GOOD) and as_prompt(record)["prompt"] == Q


@pytest.mark.parametrize(("name", "row"), PREFERRED)
def test_a_preference_is_a_group_of_two_ranked_answers_in_every_format(name: str, row: dict[str, Any]) -> None:
    group = as_group(read_record(row, name))
    ranked = sorted(group["answers"], key=lambda answer: answer["rank"])
    assert group["prompt"] == Q and [answer["text"].strip() for answer in ranked] == [GOOD, BAD]


UNANSWERED = [
    (reason, row | damage)
    for name, row in ANSWERED + PREFERRED
    for reason, damage in {
        "prompt_completion": [
            ("wrong_type", {"response": True, "completion": True}),
            ("labelled_bad", {"label": False}),
        ],
        "alpaca": [("wrong_type", {"output": True})],
        "preference": [("wrong_type", {"rejected": False}), ("identical", {"rejected": GOOD})],
        "sharegpt_preference": [("wrong_type", {"chosen": True})],
        "alpaca_preference": [("empty", {"chosen": " "})],
        "pandalm": [("wrong_type", {"response1": False}), ("undecided", {"annotator1": 1})],
        "llmbar": [("wrong_type", {"label": True})],
        "ranked": [("one_answer", {"answers": []})],
        "open_assistant": [("wrong_type", {"prompt": {"text": Q, "replies": 3}})],
    }.get(name, [])
]


@pytest.mark.parametrize(("reason", "row"), UNANSWERED)
def test_a_prompt_is_taken_whatever_is_wrong_with_its_answers(reason: str, row: dict[str, Any]) -> None:
    name = format_of(row)
    assert name is not None
    record = read_record(row, name)
    assert as_prompt(record)["prompt"] == Q
    for use in (as_example, as_group):
        with pytest.raises(Refused) as caught:
            use(record)
        assert caught.value.reason == reason


def test_every_format_has_a_row_in_this_file_and_is_the_first_that_fits_it() -> None:
    prompts = [("text", Q), ("prompt", {"prompt": Q}), ("prompt", {"text": Q}), ("prompt", {"instruction": Q})]
    prompts.append(("prompt", {"prompt": [user()]}))
    assert all(format_of(row) == name and read_record(row, name).prompt == Q for name, row in prompts)
    assert {name for name, _ in ANSWERED + PREFERRED + prompts} == set(FORMATS)


def test_a_system_message_goes_to_the_model_as_two_messages_would() -> None:
    tokenizer = Tokenizer(PACKAGE / "tiny/m0")
    system = {"role": "system", "content": " sort a b "}
    rows: list[tuple[str, dict[str, Any]]] = [
        ("messages", {"messages": [system, user("copy a"), assistant()]}),
        ("sharegpt", {"system": " sort a b ", "conversations": [human("copy a"), gpt()]}),
        ("alpaca", {"instruction": "copy a", "output": GOOD, "system": "sort a b"}),
        ("prompt", {"prompt": [system, user("copy a")]}),
    ]
    expected = tokenizer.chat([system, user("copy a")])
    for name, row in rows:
        assert tokenizer.chat_prompt(read_record(row, name).prompt) == expected
    assert with_system(None, Q) == with_system(" ", Q) == Q


def test_an_input_stands_below_its_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Haus", "output": "house"}
    assert read_record(row, "alpaca").prompt == read_record(row, "prompt").prompt == "Translate.\nHaus"


def test_of_a_conversation_the_first_exchange_is_taken_and_the_rest_counted() -> None:
    turns = [user(), assistant(), user("And 3 + 3?"), assistant("Six.")]
    assert read_record({"messages": turns}, "messages") == Record(Q, (Answer(GOOD, 0),), later_turns=2)
    assert read_record({"messages": turns[:1]}, "messages") == Record(Q)


def test_an_implicit_prompt_is_what_trl_takes() -> None:
    trl = pytest.importorskip("trl.data_utils")
    for chosen, rejected in (
        ("The sky is blue.", "The sky is green."),
        ("a b c", "a b d"),
        ("It is (so)", "It is (not)"),
    ):
        row = {"chosen": chosen, "rejected": rejected}
        record, theirs = read_record(row, "preference_implicit"), trl.extract_prompt(row)
        assert (record.prompt, record.answers[0].text, record.answers[1].text) == (
            theirs["prompt"],
            theirs["chosen"],
            theirs["rejected"],
        )


USELESS = [
    ("no_ranked_reply", as_example, tree((GOOD, None))),
    ("no_ranked_reply", as_group, tree()),
    ("one_answer", as_group, tree((GOOD, 0))),
    ("one_answer", as_group, {"prompt": Q, "response": GOOD}),
    ("deleted", as_example, {"prompt": {"text": Q, "deleted": True, "replies": []}}),
    ("language", as_example, {"prompt": {"text": Q, "lang": "de", "replies": [{"text": GOOD, "rank": 0}]}}),
    ("labelled_bad", as_example, {"prompt": Q, "completion": BAD, "label": False}),
    ("identical", as_group, {"prompt": Q, "chosen": GOOD, "rejected": GOOD}),
    ("identical", as_group, {"chosen": GOOD, "rejected": GOOD}),
    ("identical", as_group, {"chosen": [user(), assistant()], "rejected": [user(), assistant()]}),
    ("several_turns", as_group, {"prompt": [user(), assistant(), user()], "chosen": GOOD, "rejected": BAD}),
    ("several_turns", as_group, {"chosen": [user(), assistant(), user(), assistant()], "rejected": [user(), assistant(BAD)]}),
    ("several_turns", as_group, {"prompt": [user()], "chosen": [assistant()] * 2, "rejected": [assistant(BAD)]}),
    ("several_turns", as_group, {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}\n\nHuman: ok\n\nAssistant: a",
                                 "rejected": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}\n\nHuman: ok\n\nAssistant: b"}),
    ("several_turns", as_example, {"instruction": Q, "output": GOOD, "history": [["a", "b"]]}),
    ("turn_order", as_example, {"conversations": [gpt(), human()]}),
    ("turn_order", as_example, {"messages": [user(), user(), assistant()]}),
    ("turn_order", as_example, {"messages": [{"role": "system", "content": "s"}]}),
    ("turn_order", as_prompt, {"prompt": [user(), assistant()]}),
    ("turn_order", as_group, {"prompt": [user()], "chosen": [user()], "rejected": [assistant()]}),
    ("role", as_example, {"messages": [user(), {"role": "tool", "content": "4"}]}),
    ("not_text", as_example, {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, assistant()]}),
]  # fmt: skip
BROKEN = [
    ("unknown_format", as_example, {"turns": [Q]}),
    ("unknown_format", as_example, [Q]),
    ("unknown_format", as_example, {"prompt": None, "chosen": GOOD, "rejected": None, "messages": None}),
    ("no_answer", as_example, {"prompt": Q, "response": None}),
    ("no_answer", as_group, Q),
    ("wrong_type", as_example, {"messages": "no list"}),
    ("wrong_type", as_example, {"messages": []}),
    ("wrong_type", as_example, {"messages": [user(), "Four."]}),
    ("wrong_type", as_example, {"messages": [{"role": 3, "content": "x"}]}),
    ("wrong_type", as_example, {"messages": [user(), {"role": "assistant", "content": True}]}),
    ("missing", as_example, {"conversations": [{"from": "human"}, gpt()]}),
    ("wrong_type", as_group, {"prompt": Q, "chosen": GOOD, "rejected": False}),
    ("wrong_type", as_group, {"conversations": [human()], "chosen": [], "rejected": gpt()}),
    ("empty", as_example, {"messages": [user(), assistant(" ")]}),
    ("empty", as_example, {"messages": [user(" "), assistant()]}),
    ("empty", as_group, {"prompt": Q, "chosen": " ", "rejected": BAD}),
    ("empty", as_group, {"chosen": GOOD, "rejected": "Xive."}),
    ("surrogate", as_example, {"messages": [user("\ud800"), assistant()]}),
    ("wrong_type", as_example, {"id": 1.5, "prompt": Q, "response": GOOD}),
]


@pytest.mark.parametrize(
    ("reason", "use", "row", "broken"),
    [(*case, False) for case in USELESS] + [(*case, True) for case in BROKEN],
)
def test_a_row_without_a_record_says_why(reason: str, use: Any, row: Any, broken: bool, tmp_path: Path) -> None:
    good = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (good[0], row, good[1])))
    read = read_file(path, use, language="en")
    (refusal,) = read.refused
    assert (refusal.where, refusal.reason, refusal.broken) == (f"{path}:2", reason, broken)
    assert (read.total, len(read.rows), read.reasons()) == (3, 2, {reason: 1})
    said = [sentence.partition(", first")[0] for sentence in left_out(read)]
    assert said == ([] if broken else [f"{path}: left out 1 of 3 rows as {reason}"])
    load = {as_example: load_ift, as_prompt: load_prompts, as_group: load_ranked}[use]
    if broken:
        with pytest.raises(InputError, match=r"rows.jsonl:2: "):
            load(path, language="en")
    else:
        assert [each["prompt"] for each in load(path, language="en")] == ["p", "q"]


def test_a_forced_format_is_the_only_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    both = {"prompt": "p", "response": "short", "messages": [user(), assistant()]}
    path.write_text(json.dumps(both) + "\n" + json.dumps({"messages": [user(), assistant()]}) + "\n")
    assert read_file(path, as_example).matched == {"messages": 2}
    read = read_file(path, as_example, format="prompt_completion")
    assert read.rows == [{"id": "rows-1", "prompt": "p", "response": "short"}] and read.reasons() == {"missing": 1}
    with pytest.raises(InputError, match="the format 'csv' is not read; use one of text, open_assistant, ranked"):
        read_file(path, as_example, format="csv")


def test_a_file_of_several_formats_says_how_many_rows_matched_what(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [row for _, row in ANSWERED] + [{"odd": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    read = read_file(path, as_example)
    matched = {"prompt_completion": 4, "messages": 3, "sharegpt": 3, "alpaca": 2, "open_assistant": 1, "none": 2}
    assert read.matched == matched and read.reasons() == {"unknown_format": 1, "unreadable": 1}
    assert len(read.rows) == len(ANSWERED) and read.total == len(ANSWERED) + 2


def test_refused_is_an_exception_with_its_reason_and_sentence() -> None:
    with pytest.raises(Refused, match="expected a JSON object") as caught:
        read_record(3, "prompt")
    assert caught.value.reason == "wrong_type" and caught.value.broken
