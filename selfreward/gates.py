"""Gates that a round must pass: figures at which it makes no sense to go on, each with what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from selfreward.context import GateError, Row, Run
from selfreward.report import reasons
from selfreward.report_rounds import judgement_figures


def check_judgements(run: Run, k: int, judgements: Sequence[Row]) -> None:
    """Enough of a round's judgements must be readable, and the readable ones must not be all the same score."""
    gates, found = run.recipe.gates, judgement_figures(judgements)
    written = run.dir.file(f"iter_{k}/judgements.jsonl")
    statuses = {
        name: count for name, count in found["statuses"].items() if name != "duplicate"
    }  # those were not asked for
    asked = sum(statuses.values())
    readable = statuses.get("ok", 0) / asked
    if readable < gates.min_readable:
        raise GateError(
            f"round {k}: {readable:.1%} of {asked} judgements are readable ({reasons(statuses)}), the "
            f"floor is {gates.min_readable:.0%}: give the model judge data (data.eft), more room (judge.max_tokens), a "
            f"template that it can follow (judge.template), or lower gates.min_readable; what it wrote is in {written}"
        )
    entropy = found["score_entropy_bits"]
    if entropy is not None and entropy < gates.min_score_entropy:
        scores = ", ".join(f"{score}: {count}" for score, count in enumerate(found["score_histogram"]) if count)
        raise GateError(
            f"round {k}: the judge gives nearly one score only ({scores}; {entropy:.2f} bits, the floor is "
            f"{gates.min_score_entropy}), so it says little about which answer is better: give it judge data (data.eft, "
            f"dpo.replay_weight), another template (judge.template), or lower gates.min_score_entropy; its judgements are in "
            f"{written}"
        )


def length_drift(run: Run, k: int, lengths: Sequence[int]) -> float | None:
    """How many times as long as M1's the answers of this round are, by their mean in tokens; None in round 1. GateError
    above the recipe's ceiling. lengths: tokens of each answer."""
    if k == 1:
        return None
    first = [len(row["token_ids"]) for row in run.rows("iter_1/candidates.jsonl")]
    before, now = sum(first) / len(first), sum(lengths) / len(lengths)
    drift, ceiling = now / max(before, 1.0), run.recipe.gates.max_length_drift
    if drift > ceiling:
        raise GateError(
            f"round {k}: answers have {now:.1f} tokens on average, {drift:.2f} times those of round 1 ({before:.1f}), the "
            f"ceiling is {ceiling:g}: the judge prefers length to quality, or answers do not end; set pairs.length_control "
            "(0.1 to 0.4) in a new --out directory, or raise gates.max_length_drift"
        )
    return drift
