"""What is odd in a run's figures and yet no reason to stop it; what stops one is in gates.py.

A sentence for each says what was found, what it may mean and which key to turn. The bounds are wide: the tiny recipe's runs
and its paper-like figures give none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

UNREADABLE = 0.1  # of the judgements; gates.min_readable stops a run at 0.5 by default
CUT = 0.1  # of the answers: as many may be rejected, and none chosen
TIED = 0.5  # of the prompts
REPEATED = ("duplicate", "known", "near_duplicate", "similar")  # reasons of dropped prompts
ALIKE = 0.5  # of the prompts that were written
SAME_TEXT = 0.2  # variety of the answers to a prompt
LONGER = 1.25  # chosen answers, against rejected ones
LOOPING = 0.3  # runs of four tokens that stood in the same answer before
ERRORS = 2.0  # standard errors


def round_warnings(row: Row) -> list[str]:
    """Of a row of report_rounds.round_figures; a figure that the round does not have yet is looked at later."""
    found, k = list[str](), row["round"]
    dropped = row["prompts_dropped"] or {}
    written = row["prompts_kept"] + sum(count for name, count in dropped.items() if name != "enough")
    alike = sum(dropped.get(name, 0) for name in REPEATED)
    if alike > ALIKE * written:
        found.append(
            f"{alike} of {written} new prompts repeat others: the model that writes them runs out of them; raise "
            "prompts.temperature, or give more instructions (data.ift), another prompt_model or a prompts.file"
        )
    if _above(row["answers_cut"], CUT):
        found.append(
            f"{row['answers_cut']:.0%} of the answers were cut at candidates.max_tokens and cannot be chosen; raise it"
        )
    if row["answer_diversity"] is not None and row["answer_diversity"] < SAME_TEXT:
        found.append(
            f"the answers to a prompt are mostly one text (variety {row['answer_diversity']:.0%}), so there is little to "
            "choose from; raise candidates.temperature or candidates.top_p"
        )
    asked = {name: count for name, count in (row["statuses"] or {}).items() if name != "duplicate"}
    total = sum(asked.values())
    if total and asked.get("ok", 0) < (1 - UNREADABLE) * total:
        found.append(
            f"{1 - asked.get('ok', 0) / total:.0%} of the judgements cannot be read; raise judge.max_tokens, or give more judge "
            "data (data.eft) or another judge.template"
        )
    tied = (row["pairs_dropped"] or {}).get("tie", 0)
    prompts = row["prompts_kept"]
    if row["pairs"] is not None and tied > TIED * prompts:
        found.append(
            f"{tied} of {prompts} prompts have no pair because all answers have one score; set judge.score=expected, or raise "
            "judge.draws"
        )
    if row["length_gap_se"] is not None and row["length_gap"] > ERRORS * row["length_gap_se"]:
        ratio = row["length_chosen"] / max(row["length_rejected"], 1.0)
        if ratio > LONGER:
            found.append(
                f"chosen answers are {ratio:.2f} times as long as rejected ones: the judge may be rewarding length, and answers "
                "will grow; set pairs.length_control (0.1 to 0.4)"
            )
    return [f"round {k}: {sentence}" for sentence in found]


def model_warnings(models: Sequence[Row]) -> list[str]:
    """Of the models' rows, M0 first; what only the base model does is not looked at."""
    found, trained = list[str](), [row for row in models if row["name"] != "M0"]
    first = next((row for row in models if row["name"] == "M1"), None)
    for row in trained:
        name, judged, longer = row["name"], row.get("judge_pairwise_ties_half"), row.get("longer_wins")
        if judged is not None and longer is not None and judged <= longer:
            found.append(
                f"{name} orders {judged:.1%} of the ranked pairs rightly (ties half), the longer answer alone {longer:.1%}: as a "
                "judge it has learned nothing; give more judge data (data.eft)"
            )
        before = (first or {}).get("judge_pairwise_ties_half_interval")
        if judged is not None and before is not None and row is not first and name != "SFT" and judged < before[0]:
            found.append(
                f"{name} judges worse than M1 ({judged:.1%} of the ranked pairs, ties half, below M1's interval from "
                f"{before[0]:.1%}): DPO wears judging down; set dpo.replay_weight to train judge data beside the pairs"
            )
        margin, error = row.get("previous_win_minus_loss"), row.get("previous_win_minus_loss_se")
        if margin is not None and error is not None and margin < -ERRORS * error and name != "SFT":
            found.append(
                f"{name} loses to the model before it ({row['previous_win']:.0%} won, {row['previous_loss']:.0%} lost): this "
                "training made the answers worse; lower dpo.lr, raise dpo.beta, or look at the judge"
            )
        if _above(row.get("repetition"), LOOPING):
            found.append(
                f"{name}'s answers repeat themselves ({row['repetition']:.0%} of their runs of four tokens): it loops; lower the "
                "learning rate or the epochs"
            )
    return found


def _above(value: float | None, bound: float) -> bool:
    return value is not None and value > bound
