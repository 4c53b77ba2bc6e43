"""From scored candidates to one preference pair: best against worst."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from selfreward.judge import TOP_SCORE

REASONS = ("too_few_scored", "duplicate", "none_choosable", "tie", "none_better")
TOO_LONG = "too_long"  # a pair that one forward pass of the training does not take

Row = Mapping[str, Any]


def build_pair(
    prompt_row: Row, candidates: Sequence[Row], allow_truncated_chosen: bool = False
) -> tuple[dict[str, Any] | None, str | None]:
    """The best against the worst candidate of one prompt: (pair row, None), or (None, reason) where there is no pair.

    `prompt_row`: {"id", "prompt"}. `candidates`, in any order, all of this prompt: {"id", "prompt_id", "prompt",
    "index", "text", "token_ids", "finish_reason", "score"}, with `score` the mean over judgements or None.

    Candidates with the same text are one candidate, with the mean of their scores: judged apart they would get different
    noise, and best and worst could be copies. The worst is any scored candidate; the best must be choosable: not empty,
    and ended by itself (one cut at max_tokens, finish_reason "length", only with `allow_truncated_chosen`). Among equals
    the lowest index wins. Reasons: fewer than two scores (too_few_scored), one text only (duplicate), nothing choosable
    (none_choosable), all scores equal (tie), nothing choosable above the worst (none_better).
    """
    scored = sorted((c for c in candidates if c["score"] is not None), key=lambda c: c["index"])
    assert all(c["prompt_id"] == prompt_row["id"] and math.isfinite(c["score"]) for c in scored), prompt_row["id"]
    if len(scored) < 2:
        return None, "too_few_scored"
    scored = _distinct(scored)
    if len(scored) < 2:
        return None, "duplicate"
    choosable = [c for c in scored if _choosable(c, allow_truncated_chosen)]
    if not choosable:
        return None, "none_choosable"
    chosen = max(choosable, key=lambda c: c["score"])  # max and min return the first of equals: the lowest index
    rejected = min(scored, key=lambda c: c["score"])
    if chosen["score"] == rejected["score"]:
        return None, "tie" if len({c["score"] for c in scored}) == 1 else "none_better"
    return _pair_row(prompt_row, chosen, rejected), None


def positive(candidates: Sequence[Row], allow_truncated: bool = False) -> Row | None:
    """The first candidate of a prompt with the perfect score, if one may be chosen: the "positives" method's example."""
    for candidate in sorted(candidates, key=lambda c: c["index"]):
        if candidate["score"] == TOP_SCORE and _choosable(candidate, allow_truncated):
            return candidate
    return None


def _distinct(candidates: Sequence[Row]) -> list[Row]:
    """One candidate of every text, with the mean score of all that have it: the first that ended by itself, or the first."""
    same: dict[str, list[Row]] = {}
    for candidate in candidates:
        same.setdefault(candidate["text"], []).append(candidate)
    return [
        {
            **next((row for row in rows if row["finish_reason"] == "stop"), rows[0]),
            "score": math.fsum(row["score"] for row in rows) / len(rows),
        }
        for rows in same.values()
    ]


def _choosable(candidate: Row, allow_truncated: bool) -> bool:
    ended = candidate["finish_reason"] == "stop" or (allow_truncated and candidate["finish_reason"] == "length")
    return ended and bool(candidate["text"].strip())


def _pair_row(prompt_row: Row, chosen: Row, rejected: Row) -> dict[str, Any]:
    """TRL's preference format plus what the trainer and the report need: scores, places, ids, which end is cut."""
    return {
        "id": prompt_row["id"],
        "prompt": prompt_row["prompt"],
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "score_chosen": chosen["score"],
        "score_rejected": rejected["score"],
        "chosen_index": chosen["index"],
        "rejected_index": rejected["index"],
        "chosen_token_ids": list(chosen["token_ids"]),
        "rejected_token_ids": list(rejected["token_ids"]),
        "chosen_truncated": chosen["finish_reason"] == "length",
        "rejected_truncated": rejected["finish_reason"] == "length",
    }
