"""Judge data from human ranks (paper, section 3.1.1): the baseline judges ranked answers, agreement decides.

An attempt is one judgement of every answer of a group. The first attempt whose scores order the answers exactly as the
humans did is kept, the most common score among what was kept is thinned out, and every judgement that is no training row
is recorded with why.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

Row = dict[str, Any]
DROPPED = ("judgement_id", "group", "answer_index", "attempt", "score", "reason")


def agrees(scores: list[float | None], ranks: list[int]) -> str | None:
    """None if a lower rank number (better) always has the higher score and equal ranks may have any; else the reason."""
    if len(set(ranks)) < 2:
        return "no_ranks"  # equal ranks agree with anything
    if any(score is None for score in scores):
        return "unreadable"
    for a, score_a in zip(ranks, scores, strict=True):
        for b, score_b in zip(ranks, scores, strict=True):
            assert score_a is not None and score_b is not None
            if a < b and score_a <= score_b:
                return "tie" if score_a == score_b else "order"
    return None


def select(groups: list[Row], judgements: dict[str, list[list[Row]]]) -> tuple[list[Row], list[Row], Counter[str]]:
    """(training rows, dropped rows, counts). `judgements[group id][answer][attempt]` are judgement rows.

    Every judgement is a training row or a dropped row with its reason: that of its attempt (no_ranks, unreadable, order,
    tie), `enough` after the attempt that was kept, or `thinned`. counts: attempts by what became of them, groups, and
    `judgements`.
    """
    train, dropped, counts = list[Row](), list[Row](), Counter[str]()
    for group in groups:
        ranks = [answer["rank"] for answer in group["answers"]]
        kept = False
        for attempt, drawn in enumerate(zip(*judgements[group["id"]], strict=True)):
            reason = "enough" if kept else agrees([row["score"] for row in drawn], ranks)
            counts[reason or "kept"] += 1
            counts["judgements"] += len(drawn)
            if reason is None:
                kept = True
                train += [_train_row(group, answer, attempt, row) for answer, row in enumerate(drawn)]
            else:
                dropped += [_dropped_row(group["id"], i, attempt, row, reason) for i, row in enumerate(drawn)]
        counts["groups_kept" if kept else "groups_without_agreement"] += 1
    thinned, removed = thin(train)
    counts["thinned"] = len(removed)
    dropped += [{key: row[key] for key in DROPPED if key != "reason"} | {"reason": "thinned"} for row in removed]
    assert len(thinned) + len(dropped) == counts["judgements"]
    return thinned, dropped, counts


def thin(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Drop rows of the most common score, last ones first, down to the count of the second most common."""
    common = Counter(row["score"] for row in rows).most_common(2)
    if len(common) < 2:
        return rows, []
    (score, many), (_, limit) = common
    places = [place for place, row in enumerate(rows) if row["score"] == score][limit:many]
    gone = set(places)
    return [row for place, row in enumerate(rows) if place not in gone], [rows[place] for place in places]


def _train_row(group: Row, answer: int, attempt: int, judgement: Row) -> Row:
    return {
        "id": f"{group['id']}-{answer}",
        "group": group["id"],
        "answer_index": answer,
        "attempt": attempt,
        "prompt": group["prompt"],
        "answer": group["answers"][answer]["text"],
        "rank": group["answers"][answer]["rank"],
        "score": judgement["score"],
        "judgement": judgement["text"],
        "judgement_id": judgement["id"],
        "judgement_token_ids": judgement["token_ids"],
    }


def _dropped_row(group: str, answer: int, attempt: int, judgement: Row, reason: str) -> Row:
    values = (judgement["id"], group, answer, attempt, judgement["score"], reason)
    return dict(zip(DROPPED, values, strict=True))
