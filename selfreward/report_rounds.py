"""What one round did, in figures: read from the finished files of a run, for report.json and the page.

A figure that a run does not have (it stopped before, or nothing could be measured) is None, never a number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfreward.formats import read_jsonl
from selfreward.judge import TOP_SCORE
from selfreward.metrics import mean_and_error
from selfreward.variety import diversity

Row = dict[str, Any]

FIGURES = (
    *("prompts_kept", "prompts_dropped"),
    "answer_diversity",
    *("judgements", "statuses", "score_histogram", "score_entropy_bits", "score_mean"),
    *("pairs", "pair_yield", "pairs_dropped"),
    *("length_chosen", "length_rejected", "length_gap", "length_gap_se"),
    "positives",
)


def round_figures(folder: Path, stages: Mapping[str, Row]) -> list[Row]:
    """A row per round that has begun: its number, the model that wrote and judged, and FIGURES.

    folder: the run's directory. stages: the counts of its finished stages; files of others are not looked at.
    """
    rows: list[Row] = []
    while f"iter_{len(rows) + 1}/prompts" in stages:
        rows.append(_round(folder, stages, len(rows) + 1))
    return rows


def _round(folder: Path, stages: Mapping[str, Row], k: int) -> Row:
    files, prompts = folder / f"iter_{k}", stages[f"iter_{k}/prompts"]
    row: Row = {"round": k, "model": f"M{k}"} | dict.fromkeys(FIGURES)
    row |= {"prompts_kept": prompts["kept"], "prompts_dropped": _by_count(prompts["dropped"])}
    if f"iter_{k}/candidates" in stages:
        row["answer_diversity"] = answer_diversity(read_jsonl(files / "candidates.jsonl"))
    if f"iter_{k}/judgements" in stages:
        row |= judgement_figures(read_jsonl(files / "judgements.jsonl"))
    if f"iter_{k}/pairs" in stages:
        row |= pair_figures(read_jsonl(files / "pairs.jsonl"), read_jsonl(files / "dropped.jsonl"))
    row["positives"] = stages.get(f"iter_{k}/model", {}).get("positives")
    return row


def answer_diversity(candidates: Sequence[Row]) -> float | None:
    """How far the candidates of a prompt differ: at 0 there is nothing to choose from."""
    texts: dict[str, list[str]] = {}
    for row in candidates:
        texts.setdefault(row["prompt_id"], []).append(row["text"])
    return diversity(texts.values())


def judgement_figures(judgements: Sequence[Row]) -> Row:
    """Statuses of all judgements; histogram, entropy and mean of the readable scores.

    Single judgements are counted, not the means over an answer's draws, which are what pairs are built from: a judge that
    has collapsed to one score shows here, and a whole number needs no rounding. A fraction (4.5) counts as the whole
    number below it.
    """
    scores = [row["score"] for row in judgements if row["score"] is not None]
    counted = Counter(math.floor(score) for score in scores)
    histogram = [counted[score] for score in range(int(TOP_SCORE) + 1)]
    return {
        "judgements": len(judgements),
        "statuses": _by_count(Counter(row["status"] for row in judgements)),
        "score_histogram": histogram,
        "score_entropy_bits": entropy_bits(histogram),
        "score_mean": math.fsum(scores) / len(scores) if scores else None,
    }


def pair_figures(pairs: Sequence[Row], dropped: Sequence[Row]) -> Row:
    """How many prompts gave a pair, why the others gave none, and lengths in tokens (gap: chosen minus rejected)."""
    chosen = [len(row["chosen_token_ids"]) for row in pairs]
    rejected = [len(row["rejected_token_ids"]) for row in pairs]
    gap, error = mean_and_error([a - b for a, b in zip(chosen, rejected, strict=True)])
    prompts = len(pairs) + len(dropped)
    return {
        "pairs": len(pairs),
        "pair_yield": len(pairs) / prompts if prompts else None,
        "pairs_dropped": _by_count(Counter(row["reason"] for row in dropped)),
        "length_chosen": mean_and_error(chosen)[0],
        "length_rejected": mean_and_error(rejected)[0],
        "length_gap": gap,
        "length_gap_se": error,
    }


def entropy_bits(counts: Iterable[int]) -> float | None:
    """Entropy of a histogram: 0 if all counts are in one place, log2(6) = 2.58 if six scores are equally frequent."""
    found = [count for count in counts if count]
    total = sum(found)
    return math.fsum(count / total * math.log2(total / count) for count in found) if total else None


def _by_count(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first, equals by name: an order that does not depend on that of the rows."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
