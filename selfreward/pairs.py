"""From scored candidates to preference pairs: best against worst."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, pvariance
from typing import Any, Literal

from selfreward.judge import TOP_SCORE
from selfreward.metrics import kendall_tau

REASONS = ("too_few_scored", "duplicate", "none_choosable", "tie", "none_better")
TOO_LONG = "too_long"  # a pair that one forward pass of the training does not take
NO_MORE = "no_more"  # a prompt that has a pair, but not as many as it may have

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rules:
    """How a prompt's pairs are chosen.

    `tie_break` decides between equal scores: "index" takes the lowest, "variance" first the answer on which the judge's
    draws agree more (as NeMo-Aligner's implementation does), then the lowest index.

    `length_control` rho (Meta-Rewarding, arXiv 2407.19594): chosen is the shortest answer in the top tier,
    scores from (1 - rho) top + rho bottom up, rejected the longest in the bottom tier; 0: among equals only; None: off.
    Lengths are in tokens; answers as long as each other are chosen between by score, then as `tie_break` says.
    """

    allow_truncated_chosen: bool = False
    tie_break: Literal["index", "variance"] = "index"
    length_control: float | None = None
    per_prompt: int = 1


Pick = Callable[[Sequence[Row], Sequence[Row], Rules], tuple[Row, Row]]


def best_and_worst(choosable: Sequence[Row], scored: Sequence[Row], rules: Rules) -> tuple[Row, Row]:
    """(chosen, rejected): the best that may be chosen, the worst of all. Both lists are in the order of the index."""
    top, bottom = max(c["score"] for c in choosable), min(c["score"] for c in scored)
    rho = rules.length_control

    def by(sign: int) -> Callable[[Row], tuple[float, ...]]:
        """What is least for the candidate to take: the best with sign 1, the worst with -1."""

        def order(candidate: Row) -> tuple[float, ...]:
            length = sign * len(candidate["token_ids"]) if rho is not None else 0
            unsure = variance(candidate) if rules.tie_break == "variance" else 0.0
            return length, -sign * candidate["score"], unsure

        return order

    margin = (rho or 0.0) * (top - bottom)
    return (  # min returns the first of equals: the lowest index
        min((c for c in choosable if c["score"] >= top - margin), key=by(1)),
        min((c for c in scored if c["score"] <= bottom + margin), key=by(-1)),
    )


def build_pairs(
    prompt_row: Row, candidates: Sequence[Row], rules: Rules = Rules(), pick: Pick = best_and_worst
) -> list[tuple[dict[str, Any] | None, str | None]]:
    """`rules.per_prompt` entries: (pair row, None), or (None, reason) where there is no pair (any more).

    `prompt_row`: {"id", "prompt"}. `candidates`, in any order, all of this prompt: {"id", "prompt_id", "prompt",
    "index", "text", "token_ids", "finish_reason", "score", "draws"}, `draws` what each judgement counts as
    (None: unreadable) and `score` their mean, or None.

    Candidates with the same text are one candidate, with the mean of their draws: judged apart they would get different
    noise, and best and worst could be copies. The worst is any scored candidate; the best must be choosable: not empty,
    and ended by itself (one cut at max_tokens, finish_reason "length", only where the rules allow it). The second pair is
    best against worst of what the first has left. Reasons for the first: fewer than two scores (too_few_scored), one text
    only (duplicate), nothing choosable (none_choosable), all scores equal (tie), nothing choosable above the worst
    (none_better); for a later one: no_more.
    """
    scored = sorted((c for c in candidates if c["score"] is not None), key=lambda c: c["index"])
    assert all(c["prompt_id"] == prompt_row["id"] and math.isfinite(c["score"]) for c in scored), prompt_row["id"]
    left: Sequence[Row] = _distinct(scored)
    agreed = consistency(left)
    found: list[tuple[dict[str, Any] | None, str | None]] = []
    for number in range(rules.per_prompt):
        reason = _why_none(scored, left, rules)
        if reason is not None:
            found.append((None, NO_MORE if number else reason))
            continue
        chosen, rejected = pick(_choosable(left, rules), left, rules)
        assert chosen["score"] > rejected["score"], prompt_row["id"]
        found.append((_pair_row(prompt_row, chosen, rejected, number, agreed), None))
        left = [c for c in left if c["index"] not in (chosen["index"], rejected["index"])]
    return found


def _why_none(scored: Sequence[Row], left: Sequence[Row], rules: Rules) -> str | None:
    if len(scored) < 2:
        return "too_few_scored"
    if len(left) < 2:
        return "duplicate"
    choosable = _choosable(left, rules)
    if not choosable:
        return "none_choosable"
    if max(c["score"] for c in choosable) > min(c["score"] for c in left):
        return None
    return "tie" if len({c["score"] for c in left}) == 1 else "none_better"


def consistency(candidates: Sequence[Row]) -> float | None:
    """How far the judge's draws order the candidates alike: 1 always the same order, 0.5 as by chance; None: nothing known.

    (tau + 1) / 2 with the mean of Kendall's tau over all pairs of draws, after CREAM (arXiv 2410.12735), which
    compares the rankings of two models; here they are two draws of one. A pair of draws without an order has tau 0.
    """
    draws = [c["draws"] for c in candidates]
    if len(draws) < 2:
        return None
    taus = []
    for a, b in combinations(range(min(map(len, draws))), 2):
        both = [(d[a], d[b]) for d in draws if d[a] is not None and d[b] is not None]
        if len(both) > 1:
            taus.append(kendall_tau([x for x, _ in both], [y for _, y in both]) or 0.0)
    return (fmean(taus) + 1) / 2 if taus else None


def variance(candidate: Row) -> float:
    """Of the readable draws: how unsure the judge is of an answer."""
    return pvariance([score for score in candidate["draws"] if score is not None])


def positive(candidates: Sequence[Row], allow_truncated: bool = False) -> Row | None:
    """The first candidate of a prompt with the perfect score, if one may be chosen: the "positives" method's example."""
    for candidate in sorted(candidates, key=lambda c: c["index"]):
        if candidate["score"] == TOP_SCORE and _may_be_chosen(candidate, allow_truncated):
            return candidate
    return None


def _distinct(candidates: Sequence[Row]) -> list[Row]:
    """One candidate of every text, with the mean of all its draws: the first that ended by itself, or the first.

    Of the draws and not of their means, whose rounding would order equal scores: (4 + 14/3) / 2 is more than 13/3.
    """
    same: dict[str, list[Row]] = {}
    for candidate in candidates:
        same.setdefault(candidate["text"], []).append(candidate)
    return [
        {
            **next((row for row in rows if row["finish_reason"] == "stop"), rows[0]),
            "score": rows[0]["score"] if len(rows) == 1 else _mean([score for row in rows for score in row["draws"]]),
            "draws": [_mean(draws) for draws in zip(*(row["draws"] for row in rows), strict=True)],
        }
        for rows in same.values()
    ]


def _mean(draws: Sequence[float | None]) -> float | None:
    read = [score for score in draws if score is not None]
    return math.fsum(read) / len(read) if read else None


def _choosable(candidates: Sequence[Row], rules: Rules) -> list[Row]:
    return [c for c in candidates if _may_be_chosen(c, rules.allow_truncated_chosen)]


def _may_be_chosen(candidate: Row, allow_truncated: bool) -> bool:
    ended = candidate["finish_reason"] == "stop" or (allow_truncated and candidate["finish_reason"] == "length")
    return ended and bool(candidate["text"].strip())


def _pair_row(prompt_row: Row, chosen: Row, rejected: Row, number: int, agreed: float | None) -> dict[str, Any]:
    """TRL's conversational preference format plus what the trainer and the report need: scores, places, ids, which end is
    cut. As messages another trainer puts them into the chat layout that the model answered in (tokenizer_config.json)."""
    return {
        "id": pair_id(prompt_row["id"], number),
        "prompt_id": prompt_row["id"],
        "prompt": [{"role": "user", "content": prompt_row["prompt"]}],
        "chosen": [{"role": "assistant", "content": chosen["text"]}],
        "rejected": [{"role": "assistant", "content": rejected["text"]}],
        "score_chosen": chosen["score"],
        "score_rejected": rejected["score"],
        "chosen_index": chosen["index"],
        "rejected_index": rejected["index"],
        "chosen_token_ids": list(chosen["token_ids"]),
        "rejected_token_ids": list(rejected["token_ids"]),
        "chosen_truncated": chosen["finish_reason"] == "length",
        "rejected_truncated": rejected["finish_reason"] == "length",
        "consistency": agreed,
    }


def said(pair: Row, key: str) -> str:
    """The text of a pair's "prompt", "chosen" or "rejected"."""
    return str(pair[key][0]["content"])


def pair_id(prompt_id: str, number: int) -> str:
    """The prompt's id for its first pair (number 0), with the number of the pair behind a plus for the others."""
    return f"{prompt_id}+{number + 1}" if number else prompt_id
