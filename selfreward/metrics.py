"""How good is a model, and how good a judge: plain figures over rows, no models in here.

docs/evaluation.md says what each figure means and how ties count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from selfreward.judge import TOP_SCORE

Row = dict[str, Any]
Scores = Sequence[float | None]  # of a group's answers; None: unreadable

RESAMPLES = 2000
COVERED = 0.95  # of the resampled figures lie in an interval


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error (None where there are too few values)."""
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


# ---------------------------------------------------------------------------------------------------------------------
# A judge, against human ranks


def ranked_pairs(groups: Sequence[Row]) -> list[tuple[int, int, int]]:
    """(group, better answer, worse answer) for all answers of a group whose human ranks differ."""
    return [(number, a, b) for number, group in enumerate(groups) for a, b in _pairs(_ranks(group))]


def judge_figures(groups: Sequence[Row], scores: Sequence[Scores], drawn: Sequence[Scores] | None = None) -> Row:
    """The paper's five figures of a judge (section 3.1.2), each a number from 0 (or -1) to 1 with an interval.

    groups: {"answers": [{"text", "rank"}]}; those whose ranks are all equal say nothing and are left out.
    scores[group][answer]; drawn: the same for 5-best, where `scores` are expected ones. Keys: `pairs`, `groups`, `prompts`
    (different ones), `unread` (the share of answers without a readable score, which are wrong in the figures), and for each
    name of FIGURES `name` and `name_interval`, [low, high]; None where nothing could be measured.
    """
    apart = [number for number, group in enumerate(groups) if len(set(_ranks(group))) > 1]
    used, each = [groups[number] for number in apart], [scores[number] for number in apart]
    whole = each if drawn is None else [drawn[number] for number in apart]
    given = [score for of_group in each for score in of_group]
    found: Row = {"pairs": len(ranked_pairs(used)), "groups": len(used), "prompts": len(_by_prompt(used, each, _exact))}
    found["unread"] = given.count(None) / len(given) if given else None
    for name, of_group in FIGURES.items():
        parts = _by_prompt(used, whole if name == "five_best" else each, of_group)
        found[name], found[f"{name}_interval"] = ratio_and_interval(parts)
    return found


def judge_change(groups: Sequence[Row], scores: Sequence[Scores], before: Sequence[Scores]) -> Row:
    """`change` of pairwise accuracy (ties half) from the scores `before` to `scores` of the same answers, with
    `change_interval`. Paired: prompts are drawn with what both judges say of them, so what is hard for both does not count."""
    apart = [number for number, group in enumerate(groups) if len(set(_ranks(group))) > 1]
    used = [groups[number] for number in apart]
    after, first = (
        _by_prompt(used, [each[number] for number in apart], _pairwise_ties_half) for each in (scores, before)
    )
    parts = [(right - wrong, total) for (right, total), (wrong, _) in zip(after, first, strict=True)]
    change, interval = ratio_and_interval(parts)
    return {"change": change, "change_interval": interval}


def _by_prompt(
    groups: Sequence[Row],
    scores: Sequence[Scores],
    of_group: Callable[[Sequence[int], Scores], tuple[float, float]],
) -> list[tuple[float, float]]:
    """A figure's part of each different prompt: of a file that has a prompt twice, the rows are drawn together."""
    parts: dict[str, tuple[float, float]] = {}
    for number, (group, each) in enumerate(zip(groups, scores, strict=True)):
        prompt, part = group.get("prompt", str(number)), of_group(_ranks(group), each)
        before = parts.get(prompt, (0.0, 0.0))
        parts[prompt] = before[0] + part[0], before[1] + part[1]
    return list(parts.values())


def length_figures(groups: Sequence[Row]) -> Row:
    """The baseline: the same figures of a judge that scores a text by its length in characters. No length is perfect, so
    there is no 5-best."""
    found = judge_figures(groups, [_lengths(group) for group in groups])
    return found | {"five_best": None, "five_best_interval": None}


def longer_wins(groups: Sequence[Row]) -> float | None:
    """How often the longer text is the better one (equal lengths count one half)."""
    parts = [_pairwise_ties_half(_ranks(group), _lengths(group)) for group in groups]
    total = sum(of for _, of in parts)
    return sum(right for right, _ in parts) / total if total else None


def _pairwise(ranks: Sequence[int], scores: Scores) -> tuple[float, float]:
    """Pairs in the humans' order; ties and unreadable scores are wrong (as in the paper: section A5's 26.6%)."""
    pairs = _pairs(ranks)
    return float(sum(_order(scores[a], scores[b]) == 1 for a, b in pairs)), len(pairs)


def _pairwise_ties_half(ranks: Sequence[int], scores: Scores) -> tuple[float, float]:
    """The same with one half for a tie; unreadable scores stay wrong."""
    pairs = _pairs(ranks)
    found = [_order(scores[a], scores[b]) for a, b in pairs]
    return found.count(1) + found.count(0) / 2, len(pairs)


def _five_best(ranks: Sequence[int], scores: Scores) -> tuple[float, float]:
    """Of the answers with the perfect score: how many no human ranked below another answer of their prompt."""
    perfect = [rank for rank, score in zip(ranks, scores, strict=True) if score is not None and score >= TOP_SCORE]
    return perfect.count(min(ranks)), len(perfect)


def _exact(ranks: Sequence[int], scores: Scores) -> tuple[float, float]:
    """Whole groups in the humans' order: every pair right. Answers of equal rank may have any scores."""
    readable = all(score is not None for score in scores)
    return float(readable and all(_order(scores[a], scores[b]) == 1 for a, b in _pairs(ranks))), 1.0


def _spearman(ranks: Sequence[int], scores: Scores) -> tuple[float, float]:
    return _correlation(ranks, scores, spearman)


def _kendall(ranks: Sequence[int], scores: Scores) -> tuple[float, float]:
    return _correlation(ranks, scores, kendall_tau)


def _correlation(
    ranks: Sequence[int], scores: Scores, measure: Callable[[Sequence[float], Sequence[float]], float | None]
) -> tuple[float, float]:
    """Over a group's readable scores; 0 where these have no order, which is no agreement rather than no figure: a judge
    that gives everything the same score must not be left out of its own mean."""
    kept = [(-float(rank), score) for rank, score in zip(ranks, scores, strict=True) if score is not None]
    return measure([rank for rank, _ in kept], [score for _, score in kept]) or 0.0, 1.0


# Each gives a group's part of a numerator and of a denominator; the figure is the ratio of their sums.
FIGURES: dict[str, Callable[[Sequence[int], Scores], tuple[float, float]]] = {
    "pairwise": _pairwise,
    "pairwise_ties_half": _pairwise_ties_half,
    "five_best": _five_best,
    "exact": _exact,
    "spearman": _spearman,
    "kendall": _kendall,
}


def _ranks(group: Row) -> list[int]:
    return [answer["rank"] for answer in group["answers"]]


def _lengths(group: Row) -> list[float]:
    return [float(len(answer["text"])) for answer in group["answers"]]


def _pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    return [(a, b) for a, better in enumerate(ranks) for b, worse in enumerate(ranks) if better < worse]


def _order(first: float | None, second: float | None) -> int | None:
    """1: the first is higher, 0: equal, -1: lower, None: one of them could not be read."""
    return None if first is None or second is None else (first > second) - (first < second)


# ---------------------------------------------------------------------------------------------------------------------
# Rank correlation


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings of the same things; None where one of them has no order."""
    pairs = [(first[i] - first[j], second[i] - second[j]) for i in range(len(first)) for j in range(i)]
    order = sum((a > 0) - (a < 0) if b > 0 else (a < 0) - (a > 0) if b < 0 else 0 for a, b in pairs)
    untied = sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs)
    return order / math.sqrt(untied) if untied else None


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rho: the correlation of the places, ties sharing the mean of theirs; None where one has no order."""
    a, b = ([place - (len(values) + 1) / 2 for place in _places(values)] for values in (first, second))
    spread = sum(x * x for x in a) * sum(y * y for y in b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(spread) if spread else None


def _places(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values have the mean of the places that they fill."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def ratio_and_interval(parts: Sequence[tuple[float, float]]) -> tuple[float | None, list[float] | None]:
    """sum of numerators / sum of denominators, and the interval that resampling the parts gives (percentile bootstrap).

    A part is a prompt with all that belongs to it, since answers to one prompt are not independent. Parts that all say the
    same, or a single one, have no interval: resampling shows no spread there, which is not certainty. The seed is fixed and
    the sums are rounded to nine digits, so that equal rows give equal figures whatever the number of threads.
    """
    values = np.array(parts, dtype=np.float64).reshape(-1, 2)
    total = values.sum(axis=0)
    if not total[1]:
        return None, None
    drawn = resampled(values)
    ratios = drawn[drawn[:, 1] > 0]
    figure, resampled_figures = float(total[0] / total[1]), ratios[:, 0] / ratios[:, 1]
    low, high = np.quantile(resampled_figures, [(1 - COVERED) / 2, (1 + COVERED) / 2]).round(9).tolist()
    return figure, [low, high] if np.ptp(resampled_figures) > 1e-9 else None


def resampled(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[RESAMPLES, columns]: sums over as many rows as there are, drawn with replacement."""
    sums: npt.NDArray[np.float64] = _counts(len(values)) @ values
    return sums


@functools.lru_cache(maxsize=2)
def _counts(rows: int) -> npt.NDArray[np.float64]:
    """How often each resample takes each row: the same for all figures over the same rows."""
    drawn = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return drawn.astype(np.float64)


def entropy_bits(counts: Iterable[int]) -> float | None:
    """Entropy of a histogram: 0 if all counts are in one place, log2(6) = 2.58 if six scores are equally frequent."""
    found = [count for count in counts if count]
    total = sum(found)
    return math.fsum(count / total * math.log2(total / count) for count in found) if total else None
