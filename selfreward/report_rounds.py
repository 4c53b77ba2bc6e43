"""What one round did, in figures: read from the finished files of a run, for report.json and the page.

A figure that a run does not have (it stopped before, or nothing could be measured) is None, never a number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import pvariance
from typing import Any

from selfreward.filters import word_count, words
from selfreward.formats import read_jsonl
from selfreward.judge import TOP_SCORE
from selfreward.metrics import entropy_bits, mean_and_error
from selfreward.variety import diversity

Row = dict[str, Any]

SHOWN_WORDS = 8  # openings and topics
TOPIC_LETTERS = 6  # shorter words are mostly of no topic

TRAINED = ("steps", "best_step", "held_out", "label_smoothing", "parity_max")  # counts of the round's training

FIGURES = (
    *("prompts_kept", "prompts_dropped", "prompt_words", "prompt_rouge"),
    *("openings", "openings_different", "opening_entropy_bits", "topics"),
    *("answer_diversity", "answers_cut"),
    *("judgements", "statuses", "score_histogram", "score_entropy_bits", "score_mean"),
    *("draw_variance", "expected_share", "expected_gap"),
    *("pairs", "pair_yield", "pairs_dropped", "consistency"),
    "length_drift",
    *("length_chosen", "length_rejected", "length_gap", "length_gap_se"),
    "positives",
    *TRAINED,
)


def round_figures(folder: Path, stages: Mapping[str, Row]) -> list[Row]:
    """A row per round that has begun: its number, the model that wrote and judged, and FIGURES.

    folder: the run's directory. stages: the counts of its finished stages; files of others are not looked at.
    """
    rows: list[Row] = []
    while f"iter_{len(rows) + 1}/prompts" in stages:
        rows.append(figures_of_round(folder, stages, len(rows) + 1))
    return rows


def figures_of_round(folder: Path, stages: Mapping[str, Row], k: int) -> Row:
    """Of one round that has begun."""
    files, prompts = folder / f"iter_{k}", stages[f"iter_{k}/prompts"]
    row: Row = {"round": k, "model": f"M{k}"} | dict.fromkeys(FIGURES)
    row |= {"prompts_kept": prompts["kept"], "prompts_dropped": _by_count(prompts["dropped"])}
    answers = stages.get(f"iter_{k}/candidates", {})
    if answers:
        row["answers_cut"] = answers.get("finish_length", 0) / answers["candidates"]
    row["length_drift"] = answers.get("length_drift")
    row |= prompt_figures(read_jsonl(files / "prompts.jsonl"))
    if f"iter_{k}/candidates" in stages:
        row["answer_diversity"] = answer_diversity(read_jsonl(files / "candidates.jsonl"))
    if f"iter_{k}/judgements" in stages:
        row |= judgement_figures(read_jsonl(files / "judgements.jsonl"))
    if f"iter_{k}/pairs" in stages:
        row |= pair_figures(read_jsonl(files / "pairs.jsonl"), read_jsonl(files / "dropped.jsonl"))
        row["consistency"] = stages[f"iter_{k}/pairs"].get("consistency")
    trained = stages.get(f"iter_{k}/model", {})
    return row | {key: trained.get(key) for key in ("positives", *TRAINED)}


def prompt_figures(prompts: Sequence[Row]) -> Row:
    """How varied a round's prompts are.

    openings: the most frequent first two words and how many prompts begin so; openings_different: how many beginnings
    there are, as a share of the prompts; opening_entropy_bits: of the first word alone. topics: the longer words that
    most prompts have in common, once each prompt. prompt_words: their mean length; prompt_rouge: the mean of the
    highest ROUGE-L of each against those before it, where that was computed.
    """
    texts = [words(row["prompt"]) for row in prompts]
    openings = Counter(" ".join(text[:2]) for text in texts)
    topics = Counter(word for text in texts for word in sorted(set(text)) if len(word) >= TOPIC_LETTERS)
    return {
        "prompt_words": mean_and_error([word_count(row["prompt"]) for row in prompts])[0],
        "prompt_rouge": mean_and_error([row["rouge"] for row in prompts if "rouge" in row])[0],
        "openings": dict(list(_by_count(openings).items())[:SHOWN_WORDS]),
        "openings_different": len(openings) / len(texts) if texts else None,
        "opening_entropy_bits": entropy_bits(Counter(" ".join(text[:1]) for text in texts).values()),
        "topics": dict(list(_by_count(topics).items())[:SHOWN_WORDS]),
    }


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
    number below it. draw_variance: between the draws of an answer, the mean over answers with two or more. expected_share: of
    the readable judgements those with an expected score; expected_gap: how far it is from the one that was drawn.
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
        "draw_variance": _draw_variance(judgements),
    } | _expected_figures(judgements)


def _draw_variance(judgements: Sequence[Row]) -> float | None:
    drawn: dict[str, list[float]] = {}
    for row in judgements:
        if row["score"] is not None:
            drawn.setdefault(row["candidate_id"], []).append(row["score"])
    found = [pvariance(scores) for scores in drawn.values() if len(scores) > 1]
    return math.fsum(found) / len(found) if found else None


def _expected_figures(judgements: Sequence[Row]) -> Row:
    """None where no judgement has an expected score: the recipe did not ask for it."""
    read = [row for row in judgements if row["score"] is not None]
    gaps = [abs(row["expected"] - row["score"]) for row in read if row.get("expected") is not None]
    if not gaps:
        return {"expected_share": None, "expected_gap": None}
    return {"expected_share": len(gaps) / len(read), "expected_gap": math.fsum(gaps) / len(gaps)}


def pair_figures(pairs: Sequence[Row], dropped: Sequence[Row]) -> Row:
    """How many pairs there are, why prompts without one have none, and lengths in tokens (gap: chosen minus rejected).

    A prompt may give several pairs; rows that say why it gave no more of them are no prompts without a pair.
    """
    chosen = [len(row["chosen_token_ids"]) for row in pairs]
    rejected = [len(row["rejected_token_ids"]) for row in pairs]
    gap, error = mean_and_error([a - b for a, b in zip(chosen, rejected, strict=True)])
    with_pair = {row["prompt_id"] for row in pairs}
    why_none: dict[str, str] = {}
    for row in dropped:
        if row["prompt_id"] not in with_pair:
            why_none.setdefault(row["prompt_id"], row["reason"])
    prompts = len(with_pair) + len(why_none)
    return {
        "pairs": len(pairs),
        "pair_yield": len(pairs) / prompts if prompts else None,
        "pairs_dropped": _by_count(Counter(why_none.values())),
        "length_chosen": mean_and_error(chosen)[0],
        "length_rejected": mean_and_error(rejected)[0],
        "length_gap": gap,
        "length_gap_se": error,
    }


def _by_count(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first, equals by name: an order that does not depend on that of the rows."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
