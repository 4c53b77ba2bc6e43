"""Does a judge's head-to-head track truth? That of a finished tiny run, beside the oracle on the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from selfreward.formats import read_jsonl
from selfreward.metrics import mean_and_error
from selfreward.tiny.oracle import grade

Row = dict[str, Any]
MATCHES = (("M2", "M1"), ("M3", "M2"), ("M3", "SFT"))


def outcomes(run: Path, model: str, against: str) -> list[tuple[int, int]]:
    """Per prompt (judge, truth): 1 where `model` won, 0 tie, -1 lost; prompts with an unread score are left out."""
    folder = run / "evaluation"
    scores: dict[str, list[float]] = {}
    for row in read_jsonl(folder / "judgements.jsonl"):
        if row["score"] is not None:
            scores.setdefault(row["candidate_id"], []).append(row["score"])
    found = []
    for a, b in zip(*(read_jsonl(folder / f"{name}/answers.jsonl") for name in (model, against)), strict=True):
        names = f"{a['id']}-{model}", f"{b['id']}-{against}"
        if a["text"] == b["text"]:
            found.append((0, 0))
        elif all(name in scores for name in names):
            judged = [fmean(scores[name]) for name in names]
            true = [grade(row["prompt"], row["text"]) for row in (a, b)]
            found.append((_sign(judged[0] - judged[1]), _sign(true[0] - true[1])))
    return found


def table_rows(runs: Sequence[Path]) -> list[list[str]]:
    """A row per match, over the runs: win - loss by the judge and in truth, and how often they agree."""
    rows = []
    for model, against in MATCHES:
        by_run = [outcomes(run, model, against) for run in runs]
        judged, true = ([fmean(pair[side] for pair in each) for each in by_run] for side in (0, 1))
        decided = [pair for each in by_run for pair in each if pair[0] and pair[1]]
        missed = [pair for each in by_run for pair in each if pair[1]]
        same = sum(_sign(a) == _sign(b) for a, b in zip(judged, true, strict=True))
        rows.append(
            [
                f"{model} against {against}",
                _with_error(judged),
                _with_error(true),
                f"{same} of {len(runs)}",
                f"{sum(a == b for a, b in decided) / len(decided):.1%}" if decided else "",
                f"{1 - len(decided) / len(missed):.1%}" if missed else "",
            ]
        )
    return rows


HEADING = [
    "match",
    "win - loss by M3's scores",
    "in truth",
    "seeds with the same sign",
    "same winner, where both have one",
    "true winners that it ties",
]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _with_error(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:+.2f}" + (f" +- {error:.2f}" if error is not None else "")
