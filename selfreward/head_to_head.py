"""Models against one another: whose answer to the same prompt is better?

A judge model scores every answer by itself, with the recipe's template and draws, and the higher mean score wins; equal
scores are a tie. An external command sees two answers at once, in both orders; it wins who wins in both, all else is a
tie (the paper's rule, section 3.1.2), since judges of pairs prefer a place; pairwise.py asks a model so.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from engine import InputError
from selfreward.context import Row, Run
from selfreward.files import Unreadable, read_rows
from selfreward.judging import Item, judge_by_model, mean_of_draws, once
from selfreward.metrics import mean_and_error, resampled
from selfreward.records import kind

BASELINE = "SFT"
WINNERS = ("first", "second", "tie")
Answers = Mapping[str, Sequence[Row]]  # model -> its rows, one a prompt, in the order of the prompts
Outcomes = list[int | None]  # per prompt: 1 won, 0 tie, -1 lost, None: no verdict that can be read


def matches(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every model against the one before it and against the SFT baseline, where that is among those before."""
    found = []
    for place, name in enumerate(names):
        before = names[:place]
        opponents = [*before[-1:], *([BASELINE] if BASELINE in before[:-1] else [])]
        found += [(name, opponent) for opponent in opponents]
    return found


def by_scores(
    run: Run, judge: Path, answers: Answers, file: str = "judgements.jsonl"
) -> dict[tuple[str, str], Outcomes]:
    """Each match's outcomes by the judge's mean scores; its judgements go into `file`.

    The answers to one prompt stand together, so that the rubric and the prompt are computed once for all models.
    """
    rows = [list(each) for each in zip(*answers.values(), strict=True)]
    items = [
        [Item(f"{row['id']}-{name}", row["prompt"], row["text"]) for name, row in zip(answers, each, strict=True)]
        for each in rows
    ]
    _check_apart([item.id for each in items for item in each])
    options, drawn = run.recipe.judge, dict[str, list[Row]]()
    if options.duplicates == "once":
        items = [once(each) for each in items]
    template = run.judge_model_template if judge == run.recipe.judge_model else None
    for row in judge_by_model(run, file, judge, items, options, (0, "head to head"), template):
        drawn.setdefault(row["candidate_id"], []).append(row)
    scores = {item.id: mean_of_draws(run, drawn[item.same_as or item.id]) for each in items for item in each}

    def outcome(first: Row, second: Row, a: str, b: str) -> int | None:
        return compared(first, second, scores[f"{first['id']}-{a}"], scores[f"{second['id']}-{b}"])

    return {
        (a, b): [outcome(first, second, a, b) for first, second in zip(answers[a], answers[b], strict=True)]
        for a, b in matches(list(answers))
    }


def _check_apart(ids: Sequence[str]) -> None:
    """Names are made of a prompt's id and of models' names: "a" with "b-c" and "a-b" with "c" would be one."""
    name, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise InputError(f"two answers would both be called {name!r}; give the models names without a hyphen")


def compared(first: Row, second: Row, score: float | None, other: float | None) -> int | None:
    """The same text ties whatever the draws say."""
    if first["text"] == second["text"]:
        return 0
    return None if score is None or other is None else (score > other) - (score < other)


def by_command(run: Run, command: str, answers: Answers) -> dict[tuple[str, str], Outcomes]:
    """Each match's outcomes by a command that reads {"id", "prompt", "first", "second"} a line and writes {"id", "winner"}
    with "first", "second", "tie" or null, in any order. Its verdicts are kept in verdicts.jsonl, and asked for while that is
    not there. It is not told which model wrote what. Equal texts tie without being asked about."""
    pairs = matches(list(answers))
    asked = [
        {"id": f"{match}-{place}-{order}", "prompt": row["prompt"], "first": texts[0], "second": texts[1]}
        for match, (a, b) in enumerate(pairs)
        for place, (row, other) in enumerate(zip(answers[a], answers[b], strict=True))
        if row["text"] != other["text"]
        for order, texts in enumerate([(row["text"], other["text"]), (other["text"], row["text"])])
    ]
    file, ids = run.dir.file("verdicts.jsonl"), {str(row["id"]) for row in asked}
    if not file.is_file():
        raw = run.dir.file("command_output.jsonl")
        raw.write_bytes(_output(run, command, asked) if asked else b"")
        verdicts = read_verdicts(raw, ids)
        run.dir.write_jsonl("verdicts.jsonl", [row | {"winner": verdicts[str(row["id"])]} for row in asked])
        raw.unlink()
    winners = read_verdicts(file, ids)

    def outcome(match: int, place: int, row: Row, other: Row) -> int | None:
        if row["text"] == other["text"]:
            return 0
        return both_orders(*(winners[f"{match}-{place}-{order}"] for order in (0, 1)))

    return {
        (a, b): [
            outcome(match, place, row, other)
            for place, (row, other) in enumerate(zip(answers[a], answers[b], strict=True))
        ]
        for match, (a, b) in enumerate(pairs)
    }


def both_orders(winner: str | None, swapped: str | None) -> int | None:
    """The outcome for who stands first in the first order. None if one of the verdicts is none."""
    if winner is None or swapped is None:
        return None
    if (winner, swapped) in (("first", "second"), ("second", "first")):
        return 1 if winner == "first" else -1
    return 0


def check_command(command: str) -> None:
    """InputError: nothing of that name can be started, which should not show after all answers."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise _cannot_start(command, error) from None
    if not words or shutil.which(words[0]) is None:
        raise _cannot_start(command, "there is no such command")


def _cannot_start(command: str, why: object) -> InputError:
    return InputError(f"--judge-command {command!r} cannot be started ({why}); correct it")


def _output(run: Run, command: str, asked: Sequence[Row]) -> bytes:
    given = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked).encode("utf-8")
    try:
        done = subprocess.run(shlex.split(command), input=given, stdout=subprocess.PIPE)
    except OSError as error:
        raise _cannot_start(command, error) from None
    if done.returncode:
        run.check_stop()  # Ctrl-C reaches the command too: that it ended is then no fault of its own
        raise InputError(
            f"--judge-command {command!r} ended with exit code {done.returncode}; what it wrote to standard error stands above"
        )
    return done.stdout


def read_verdicts(path: Path, asked: set[str]) -> dict[str, str | None]:
    """Id -> winner, one for each id that was asked. InputError names file and row."""
    found: dict[str, str | None] = {}
    for where, row in read_rows(path):
        if isinstance(row, Unreadable):
            raise InputError(f"{where}: {row.said}")
        if not isinstance(row, dict):
            raise InputError(f"{where}: the row is {kind(row)}; expected {{'id', 'winner'}}")
        name, winner = row.get("id"), row.get("winner")
        if not isinstance(name, str) or name not in asked:
            said = repr(name) if isinstance(name, str) else kind(name)
            raise InputError(f"{where}: 'id' is {said}; expected one that was asked")
        if name in found:
            raise InputError(f"{where}: 'id' {name!r} stands twice; expected one verdict for each")
        if "winner" not in row:
            raise InputError(
                f"{where}: 'winner' is missing; expected {', '.join(WINNERS)}, or null where there is none"
            )
        if winner is not None and winner not in WINNERS:
            said = repr(winner) if isinstance(winner, str) else kind(winner)
            raise InputError(f"{where}: 'winner' is {said}; expected {', '.join(WINNERS)} or null")
        found[name] = winner
    if len(found) < len(asked):
        missing = min(asked - set(found))
        raise InputError(
            f"{path} lacks {len(asked) - len(found)} of {len(asked)} verdicts, such as that of {missing!r}"
        )
    return found


def match_rows(outcomes: Mapping[tuple[str, str], Outcomes], answers: Answers) -> list[Row]:
    """A row per match: who against whom, and `figures`."""
    return [{"model": a, "against": b} | figures(each, answers[a], answers[b]) for (a, b), each in outcomes.items()]


def figures(outcomes: Outcomes, rows: Sequence[Row], against: Sequence[Row]) -> Row:
    """Shares of wins, ties and losses among the prompts with a verdict, and `win_minus_loss` with the standard error that
    resampling the prompts gives (None where all have one outcome: that is no certainty); `same_text`: prompts that both
    answered alike, which tie; lengths in tokens, over all prompts."""
    read = [outcome for outcome in outcomes if outcome is not None]
    n = len(read)
    found: Row = {"n": n, "unread": len(outcomes) - n}
    found["same_text"] = sum(row["text"] == other["text"] for row, other in zip(rows, against, strict=True))
    found |= {name: read.count(value) / n if n else None for name, value in (("win", 1), ("tie", 0), ("loss", -1))}
    found |= {"win_minus_loss": sum(read) / n if n else None, "win_minus_loss_se": None}
    if len(set(read)) > 1:
        means = resampled(np.array(read, dtype=np.float64).reshape(-1, 1))[:, 0] / n
        found["win_minus_loss_se"] = round(float(means.std(ddof=1)), 9)
    for key, each in (("mean_length", rows), ("mean_length_against", against)):
        found[key], _ = mean_and_error([len(row["token_ids"]) for row in each])
    return found
