"""What is odd in a run's figures and yet no reason to stop it; what stops one is in gates.py.

A sentence for each says what was found, what it may mean and which key to turn: one that has an effect in this recipe, which
is that of Recipe.dump() or of a manifest. The bounds are wide: ten seeds of the tiny recipe give none, its random judge does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfreward.recipe_file import at

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


def round_warnings(row: Row, recipe: dict[str, Any]) -> list[str]:
    """Of a row of report_rounds.round_figures; a figure that the round does not have yet is looked at later."""
    found, k = list[str](), row["round"]
    dropped = row["prompts_dropped"] or {}
    by_file = at(recipe, "prompts.mode") == "file"  # what was dropped is then of the whole file, and enough are left
    written = row["prompts_kept"] + sum(count for name, count in dropped.items() if name != "enough")
    alike = sum(dropped.get(name, 0) for name in REPEATED)
    if alike > ALIKE * written and not by_file:
        found.append(
            f"{alike} of {written} new prompts repeat others: the model that writes them runs out of them; raise "
            "prompts.temperature, or give more instructions (data.ift), another prompt_model or a prompts.file"
        )
    if _above(row["answers_cut"], CUT) and not at(recipe, "pairs.allow_truncated_chosen"):
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
            f"{1 - asked.get('ok', 0) / total:.0%} of the judgements cannot be read; raise judge.max_tokens, or give "
            f"{'another judge_model' if at(recipe, 'judge_model') else _judge_data(recipe)} or another judge.template"
        )
    if _by_pairs(recipe):
        found += _pair_warnings(row, recipe)
    return [f"round {k}: {sentence}" for sentence in found]


def _pair_warnings(row: Row, recipe: dict[str, Any]) -> list[str]:
    """Of a round that trains on its pairs."""
    found, prompts = list[str](), row["prompts_kept"]
    tied = (row["pairs_dropped"] or {}).get("tie", 0)
    if row["pairs"] is not None and tied > TIED * prompts:
        drawn = at(recipe, "judge.score") != "expected" and at(recipe, "judge.by") in (None, "model")
        found.append(
            f"{tied} of {prompts} prompts have no pair because all answers have one score; "
            f"{'set judge.score=expected, or ' if drawn else ''}raise judge.draws"
        )
    if row["length_gap_se"] is not None and row["length_gap"] > ERRORS * row["length_gap_se"]:
        ratio = row["length_chosen"] / max(row["length_rejected"], 1.0)
        if ratio > LONGER:
            turn = "set" if at(recipe, "pairs.length_control") is None else "raise"
            found.append(
                f"chosen answers are {ratio:.2f} times as long as rejected ones: the judge may be rewarding length, and answers "
                f"will grow; {turn} pairs.length_control (0.1 to 0.4)"
            )
    return found


def model_warnings(models: Sequence[Row], recipe: dict[str, Any]) -> list[str]:
    """Of the models' rows, M0 first; what only the base model does is not looked at, nor how the SFT baseline judges, which
    has seen no judge data."""
    found, trained = list[str](), [row for row in models if row["name"] != "M0"]
    first = next((row for row in models if row["name"] == "M1"), {})
    for row in trained:
        name, judged, longer = row["name"], row.get("judge_pairwise_ties_half"), row.get("longer_wins")
        if _above(row.get("judge_unread"), UNREADABLE) and name != "SFT":
            found.append(
                f"{row['judge_unread']:.0%} of the ranked answers have no score by {name} that can be read, and are wrong in its "
                f"figures as a judge; raise judge.max_tokens, or give {_judge_data(recipe)} or another judge.template"
            )
        elif judged is not None and longer is not None and judged <= longer and name != "SFT":
            found.append(
                f"{name} orders {judged:.1%} of the ranked pairs rightly (ties half), the longer answer alone {longer:.1%}: as a "
                f"judge it has learned nothing; give {_judge_data(recipe)}"
            )
        low = _low(first)
        if judged is not None and low is not None and name not in ("SFT", "M1") and judged < low:
            found.append(
                f"{name} judges worse than M1 ({judged:.1%} of the ranked pairs, ties half, below M1's interval from "
                f"{low:.1%}): {_wear_advice(recipe)}"
            )
        if _loses(row) and name != "SFT":
            found.append(
                f"{name} loses to the model before it ({row['previous_win']:.0%} won, {row['previous_loss']:.0%} lost): this "
                f"training made the answers worse; {_loss_advice(name, recipe)}"
            )
        if _above(row.get("repetition"), LOOPING):
            found.append(
                f"{name}'s answers repeat themselves ({row['repetition']:.0%} of their runs of four tokens): it loops; lower the "
                "learning rate or the epochs"
            )
    return found + _unread_matches(models, recipe)


def _unread_matches(models: Sequence[Row], recipe: dict[str, Any]) -> list[str]:
    """Of the matches of every model against the one before it, together: the judge is the same in all."""
    compared = [row for row in models if row.get("previous_n") is not None]
    unread = sum(row["previous_unread"] for row in compared)
    asked = unread + sum(row["previous_n"] - row["previous_same_text"] for row in compared)
    if unread <= UNREADABLE * asked:
        return []
    pairwise = at(recipe, "evaluation.head_to_head") == "pairwise"
    other = "evaluation.pairwise_template, or evaluation.head_to_head=scores" if pairwise else "judge.template"
    return [
        f"head to head, {unread / asked:.0%} of the prompts with different texts have no verdict that can be read; raise "
        "judge.max_tokens, or give "
        f"another judge_model or {other}"
    ]


def _loses(row: Row) -> bool:
    """Against the model before it, by more than chance. Where all prompts have one outcome there is no error."""
    margin, error = row.get("previous_win_minus_loss"), row.get("previous_win_minus_loss_se")
    if margin is None:
        return False
    return margin < -ERRORS * error if error is not None else margin < 0 and row.get("previous_n", 0) > 1


def _low(row: Row) -> float | None:
    """The lower end of the interval of a judge's accuracy. One without an error has none: by the rule of three."""
    interval, prompts = row.get("judge_pairwise_ties_half_interval"), row.get("judge_prompts")
    if interval is not None:
        return float(interval[0])
    return max(0.0, 1 - 3 / prompts) if row.get("judge_pairwise_ties_half") == 1 and prompts else None


def _judge_data(recipe: dict[str, Any]) -> str:
    return "an m1 that has learned to judge" if at(recipe, "m1") else "more judge data (data.eft)"


def _wear_advice(recipe: dict[str, Any]) -> str:
    if at(recipe, "m1"):  # has no judge data to replay
        return "DPO wears judging down; lower dpo.lr, or raise dpo.beta"
    if not _by_pairs(recipe):
        return "the answers that were added wear judging down; give more judge data (data.eft)"
    turn = "raise" if at(recipe, "dpo.replay_weight") else "set"
    return f"DPO wears judging down; {turn} dpo.replay_weight to train judge data beside the pairs"


def _loss_advice(name: str, recipe: dict[str, Any]) -> str:
    if name == "M1":  # against the baseline: the same instructions, and judge data
        return "give more instructions (data.ift), or lower sft.lr or sft.epochs"
    if not _by_pairs(recipe):
        return "lower sft.lr or sft.epochs, or look at the judge"
    return "lower dpo.lr, raise dpo.beta, or look at the judge"


def _by_pairs(recipe: dict[str, Any]) -> bool:
    return at(recipe, "method") in (None, "dpo")


def _above(value: float | None, bound: float) -> bool:
    return value is not None and value > bound
