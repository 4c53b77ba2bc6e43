"""How good is a model, and how good a judge: plain figures over rows, no models in here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error (None where there are too few values)."""
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def ranked_pairs(groups: Sequence[Row]) -> list[tuple[int, int, int]]:
    """(group, better answer, worse answer) for all answers of a group whose human ranks differ."""
    return [
        (number, a, b)
        for number, group in enumerate(groups)
        for a, better in enumerate(group["answers"])
        for b, worse in enumerate(group["answers"])
        if better["rank"] < worse["rank"]
    ]


def judge_accuracy(groups: Sequence[Row], scores: Sequence[Sequence[float | None]]) -> Row:
    """Share of ranked pairs that the scores order as humans did.

    `judge_pairwise` counts ties as wrong (as the paper must have), `judge_pairwise_ties_half` as one half; a pair with
    an unreadable score is wrong in both. scores[group][answer].
    """
    right = ties = 0
    pairs = ranked_pairs(groups)
    for group, a, b in pairs:
        better, worse = scores[group][a], scores[group][b]
        if better is None or worse is None:
            continue
        right += better > worse
        ties += better == worse
    total = len(pairs)
    return {
        "judge_pairs": total,
        "judge_pairwise": right / total if total else None,
        "judge_pairwise_ties_half": (right + ties / 2) / total if total else None,
    }


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings of the same things; None where one of them has no order."""
    pairs = [(first[i] - first[j], second[i] - second[j]) for i in range(len(first)) for j in range(i)]
    order = sum((a > 0) - (a < 0) if b > 0 else (a < 0) - (a > 0) if b < 0 else 0 for a, b in pairs)
    untied = sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs)
    return order / math.sqrt(untied) if untied else None


def longer_wins(groups: Sequence[Row]) -> float | None:
    """The baseline: how often the longer text is the better one (equal lengths count one half)."""
    pairs = ranked_pairs(groups)
    won = 0.0
    for group, a, b in pairs:
        answers = groups[group]["answers"]
        gap = len(answers[a]["text"]) - len(answers[b]["text"])
        won += 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
    return won / len(pairs) if pairs else None


def entropy_bits(counts: Iterable[int]) -> float | None:
    """Entropy of a histogram: 0 if all counts are in one place, log2(6) = 2.58 if six scores are equally frequent."""
    found = [count for count in counts if count]
    total = sum(found)
    return math.fsum(count / total * math.log2(total / count) for count in found) if total else None
