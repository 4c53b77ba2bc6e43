"""The stage that measures a model: its answers to held-out instructions, its judgements of held-out ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine import RequestOutput, SamplingParams
from selfreward import tiny
from selfreward.context import Row, Run
from selfreward.head_to_head import by_scores, match_rows
from selfreward.judging import by_answer, draw_score, drawn_score, judge_by_model, mean_of_draws, ranked_items
from selfreward.metrics import judge_figures, length_figures, mean_and_error
from selfreward.pairwise import by_pairs
from selfreward.sampling import Request, in_groups, sample_groups
from selfreward.seeds import heldout_groups, heldout_prompts
from selfreward.state import row_seed
from selfreward.variety import distinct, repetition

Scored = list[list[float | None]]


def evaluate_model(run: Run, name: str, path: Path) -> Row:
    """One row of the report: truth on held-out instructions, accuracy as a judge on held-out ranks, mean length. The same keys
    in every run: None for what it has no data for."""
    options, folder, answers = run.recipe.evaluation, f"evaluation/{name}", list[Row]()
    row: Row = {"name": name, "mean_length": None}
    row |= dict.fromkeys(("true_quality", "true_quality_se", "true_quality_greedy", "true_quality_greedy_se"))
    row["true_quality_n"] = 0
    if run.recipe.data.heldout is not None:
        prompts, graded = heldout_prompts(run.recipe), options.oracle is not None
        answers = sample_answers(run, path, f"{folder}/answers.jsonl", prompts, options.temperature, graded)
        greedy = sample_answers(run, path, f"{folder}/greedy.jsonl", prompts, 0.0, graded) if options.greedy else []
        if graded:
            row["true_quality"], row["true_quality_se"] = mean_and_error([a["grade"] for a in answers])
            row["true_quality_greedy"], row["true_quality_greedy_se"] = mean_and_error([a["grade"] for a in greedy])
            row["true_quality_n"] = len(answers)
    row |= text_figures([answer["token_ids"] for answer in answers])
    groups = heldout_groups(run.recipe)
    scores, drawn = judge_answers(run, path, f"{folder}/judgements.jsonl", groups) if groups else ([], [])
    row |= prefixed("judge", judge_figures(groups, scores, drawn)) | prefixed("longer", length_figures(groups))
    return row | {"longer_wins": row["longer_pairwise_ties_half"]}


def judge_answers(run: Run, path: Path, name: str, groups: Sequence[Row]) -> tuple[Scored, Scored]:
    """What a model gives ranked answers, and, for 5-best, the same as it was drawn: expected scores, where the recipe takes
    them, are never perfect. Its judgements go into the file `name`."""
    judged = judge_by_model(run, name, path, ranked_items(groups), run.recipe.judge, (0, "evaluation"))
    return mean_scores(run, groups, judged), mean_scores(run, groups, judged, drawn_score)


def mean_scores(
    run: Run, groups: Sequence[Row], judged: Sequence[Row], value: Callable[[Row], float | None] = draw_score
) -> Scored:
    """[group][answer]: the mean of the draws."""
    drawn = by_answer(groups, judged)
    return [[mean_of_draws(run, draws, value) for draws in drawn[group["id"]]] for group in groups]


def compare_models(run: Run, models: Mapping[str, Path]) -> Row:
    """Head to head on the held-out instructions, by `judge_model` or the last model: evaluation/head_to_head.jsonl."""
    judge, how = run.recipe.judge_model or list(models.values())[-1], run.recipe.evaluation.head_to_head
    answers = {name: run.rows(f"evaluation/{name}/answers.jsonl") for name in models}
    if how == "pairwise":
        assert run.pairwise_template is not None
        outcomes = by_pairs(run, judge, run.pairwise_template, answers, "evaluation/comparisons.jsonl")
    else:
        outcomes = by_scores(run, judge, answers, "evaluation/judgements.jsonl")
    rows = match_rows(outcomes, answers)
    run.dir.write_jsonl("evaluation/head_to_head.jsonl", rows)
    by = "judge_model" if run.recipe.judge_model else list(models)[-1]
    return {
        "by": by,
        "how": how,
        "prompts": len(answers[list(models)[-1]]),
        "unread": sum(row["unread"] for row in rows),
    }


def text_figures(texts: Sequence[Sequence[int]]) -> Row:
    """Length in tokens and variety of a model's answers, one to each instruction."""
    length, error = mean_and_error([len(ids) for ids in texts])
    figures = {"mean_length": length, "mean_length_se": error, "repetition": repetition(texts)}
    return figures | {f"distinct_{n}": distinct(texts, n) for n in (1, 2)}


def prefixed(prefix: str, figures: Row) -> Row:
    return {f"{prefix}_{name}": value for name, value in figures.items()}


def sample_answers(
    run: Run, path: Path, name: str, prompts: Sequence[Row], temperature: float, graded: bool = False
) -> list[Row]:
    """One answer to every prompt, into the file `name`; the seeds are the same for all models.

    graded: with the tiny world's truth, for its own instructions.
    """
    options = run.recipe.evaluation

    def request(prompt: Row) -> Request:
        seed = row_seed(run.recipe.seed, 0, "evaluation", prompt["id"])
        params = SamplingParams(temperature=temperature, max_tokens=options.max_tokens, seed=seed)
        ids = run.tokenizer.chat_prompt(prompt["prompt"])
        return Request(ids, params, lambda output: [_answer_row(prompt, output, graded)])

    return sample_groups(run, name, path, in_groups([request(prompt) for prompt in prompts]))


def _answer_row(prompt: Row, output: RequestOutput | None, graded: bool) -> Row:
    """An instruction that leaves no room for an answer has none."""
    text, ids, finish = "", list[int](), "prompt_too_long"
    if output is not None:
        (answer,) = output.outputs
        text, ids, finish = answer.text, answer.token_ids, answer.finish_reason
    row: Row = {"id": prompt["id"], "prompt": prompt["prompt"], "text": text, "token_ids": ids, "finish_reason": finish}
    return row | {"grade": tiny.grade(prompt["prompt"], text)} if graded else row
