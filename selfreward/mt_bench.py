"""MT-bench: questions of two turns, answered as FastChat's `gen_model_answer` does and written as it writes them.

`model_answer/NAME.jsonl` has a row per question: question_id, answer_id, model_id, choices [{"index", "turns"}], tstamp.
The second turn is asked with the first answer before it, in Llama 2's layout; its ids are those that were sampled, so
that the engine finds what it has computed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from engine import InputError, RequestOutput, SamplingParams
from selfreward.context import Row, Run
from selfreward.files import Unreadable, read_rows
from selfreward.records import Refused, kind, text_field
from selfreward.sampling import Request, in_groups, sample_groups
from selfreward.state import row_seed

TURNS = 2
# FastChat's `temperature_config`, whole; other categories are asked at 0.7.
TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning", "arena-hard-200"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
OTHER = 0.7


def read_questions(path: Path) -> list[Row]:
    """Rows of question.jsonl: {"question_id", "category", "turns"}. InputError names file and row."""
    questions, seen = list[Row](), dict[int, str]()
    for where, row in read_rows(path):
        question = _checked(where, row)
        first = seen.setdefault(question["question_id"], where)
        if first != where:
            raise InputError(f"{where}: question {question['question_id']} stands at {first} already; give it once")
        questions.append(question)
    if not questions:
        raise InputError(f"{path} holds no questions; expected FastChat's question.jsonl")
    return questions


def _checked(where: str, row: object) -> Row:
    if isinstance(row, Unreadable):
        raise InputError(f"{where}: {row.said}")
    if not isinstance(row, dict):
        raise InputError(f"{where}: the row is {kind(row)}; expected a question, a JSON object")
    number, category, turns = row.get("question_id"), row.get("category"), row.get("turns")
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError(f"{where}: 'question_id' is {kind(number)}; expected an integer")
    if not isinstance(category, str):
        raise InputError(f"{where}: 'category' is {kind(category)}; expected a string")
    if not isinstance(turns, list):
        raise InputError(f"{where}: 'turns' is {kind(turns)}; expected a list of {TURNS} strings")
    if len(turns) != TURNS:
        raise InputError(f"{where}: 'turns' has {len(turns)} entr{'y' if len(turns) == 1 else 'ies'}; expected {TURNS}")
    for place, turn in enumerate(turns):
        try:
            text_field({f"turns[{place}]": turn}, f"turns[{place}]")
        except Refused as refused:
            raise InputError(f"{where}: {refused.said}") from None
    return {"question_id": number, "category": category, "turns": turns}


def answer_questions(run: Run, path: Path, questions: Sequence[Row]) -> list[Row]:
    """Both turns of every question, in rows that are resumed like any other: turn_1.jsonl and turn_2.jsonl.

    Returns the rows of turn 2, in the questions' order, each with both answers in `turns`.
    """
    firsts = _ask(run, path, "turn_1.jsonl", 1, [(q, [], []) for q in questions])
    later = []
    for question, first in zip(questions, firsts, strict=True):
        ids = run.tokenizer.chat_prompt(question["turns"][0]) + first["token_ids"]
        ended = ids[-1:] == [run.tokenizer.eos_id]
        later.append((question, ids if ended else [*ids, run.tokenizer.eos_id], first["turns"]))
    return _ask(run, path, "turn_2.jsonl", 2, later)


def _ask(run: Run, path: Path, name: str, turn: int, asked: Sequence[tuple[Row, list[int], list[str]]]) -> list[Row]:
    """asked: (question, ids before this turn, answers before it)."""

    def request(question: Row, before: list[int], answers: list[str]) -> Request:
        params = SamplingParams(
            temperature=TEMPERATURES.get(question["category"], OTHER),
            max_tokens=run.recipe.evaluation.max_tokens,
            seed=row_seed(run.recipe.seed, turn, "mt_bench", question["question_id"]),
        )
        ids = before + run.tokenizer.chat_prompt(question["turns"][turn - 1])
        return Request(ids, params, lambda output: [_row(question, answers, output)])

    return sample_groups(run, name, path, in_groups([request(*each) for each in asked]))


def _row(question: Row, answers: list[str], output: RequestOutput | None) -> Row:
    """A turn that leaves no room for an answer has none."""
    text, ids, finish = "", list[int](), "prompt_too_long"
    if output is not None:
        (answer,) = output.outputs
        text, ids, finish = answer.text.strip(), answer.token_ids, answer.finish_reason
    number = question["question_id"]
    return {"question_id": number, "turns": [*answers, text], "token_ids": ids, "finish_reason": finish}


def model_answers(model_id: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of FastChat's model_answer/NAME.jsonl, ordered by question as FastChat leaves them.

    An answer's id follows from its content; only `tstamp`, the seconds at which the file was made, differs between equal
    runs.
    """
    now = time.time()
    return [
        {
            "question_id": row["question_id"],
            "answer_id": _id(model_id, row),
            "model_id": model_id,
            "choices": [{"index": 0, "turns": row["turns"]}],
            "tstamp": now,
        }
        for row in sorted(rows, key=lambda row: row["question_id"])
    ]


def _id(model_id: str, row: Row) -> str:
    key = "\0".join([model_id, str(row["question_id"]), *row["turns"]])
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=11).hexdigest()
