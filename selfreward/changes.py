"""From each model to the next: who wins, by how much truth and judging changed, and how sure that is.

All models answer the same instructions with the same seeds and judge the same answers, so a difference is paired by prompt
and much better known than the two figures that it is made of.
"""

from __future__ import annotations

from collections.abc import Sequence

from selfreward.context import Row, Run
from selfreward.evaluation import mean_scores, prefixed
from selfreward.head_to_head import BASELINE
from selfreward.metrics import judge_change, mean_and_error
from selfreward.seeds import heldout_groups

OUTCOME = (
    "n",
    "win",
    "tie",
    "loss",
    "win_minus_loss",
    "win_minus_loss_se",
    "unread",
    "same_text",
)  # of a match, in a model's row


def with_changes(run: Run, models: Sequence[Row], matches: Sequence[Row]) -> list[Row]:
    """The models' rows, each beside the one before it: `true_quality_change` with its error, `judge_change` (of pairwise
    accuracy, ties half) with its interval, and what came of its matches."""
    rows = with_matches(models, matches)
    changes = [quality_change(run, rows), judging_change(run, rows)]
    return [row | quality | judging for row, quality, judging in zip(rows, *changes, strict=True)]


def with_matches(models: Sequence[Row], matches: Sequence[Row]) -> list[Row]:
    """The models' rows with what came of each against the one before it (`previous_*`) and the baseline (`sft_*`)."""
    found = {(row["model"], row["against"]): row for row in matches}
    rows = list[Row]()
    for row in models:
        before = rows[-1]["name"] if rows else None
        for prefix, other in (("previous", before), ("sft", BASELINE)):
            match = found.get((row["name"], other))
            row = row | {f"{prefix}_{key}": match and match[key] for key in OUTCOME}
        rows.append(row)
    return rows


def quality_change(run: Run, models: Sequence[Row]) -> list[Row]:
    """Of the grades of the sampled answers: mean difference and its standard error over the instructions."""
    found, before = list[Row](), list[Row]()
    for row in models:
        answers = run.rows(f"evaluation/{row['name']}/answers.jsonl") if row["true_quality_n"] else []
        gaps = [now["grade"] - then["grade"] for now, then in zip(answers, before, strict=True)] if before else []
        change, error = mean_and_error(gaps)
        found.append({"true_quality_change": change, "true_quality_change_se": error})
        before = answers
    return found


def judging_change(run: Run, models: Sequence[Row]) -> list[Row]:
    groups, found = heldout_groups(run.recipe), list[Row]()
    before = None
    for row in models:
        scores = mean_scores(run, groups, run.rows(f"evaluation/{row['name']}/judgements.jsonl")) if groups else None
        change: Row = {"change": None, "change_interval": None}
        if scores is not None and before is not None:
            change = judge_change(groups, scores, before)
        found.append(prefixed("judge", change))
        before = scores
    return found
