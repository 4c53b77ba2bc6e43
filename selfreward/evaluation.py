"""The stage that measures a model: its answers to held-out instructions, its judgements of held-out ranks."""

from __future__ import annotations

from pathlib import Path

from engine import RequestOutput, SamplingParams
from selfreward import tiny
from selfreward.context import Row, Run
from selfreward.judging import by_answer, judge_by_model, mean_of_draws, ranked_items
from selfreward.metrics import judge_accuracy, longer_wins, mean_and_error
from selfreward.sampling import Request, in_groups, sample_groups
from selfreward.seeds import heldout_groups, heldout_prompts
from selfreward.state import row_seed


def evaluate_model(run: Run, name: str, path: Path) -> Row:
    """One row of the report: truth on held-out instructions, accuracy as a judge on held-out ranks, mean length."""
    options, folder = run.recipe.evaluation, f"evaluation/{name}"
    row: Row = {"name": name, "mean_length": None}
    row |= dict.fromkeys(("true_quality", "true_quality_se", "true_quality_greedy", "true_quality_greedy_se"))
    row["true_quality_n"] = 0
    if run.recipe.data.heldout is not None:
        answers = _answers(run, path, f"{folder}/answers.jsonl", options.temperature)
        row["mean_length"], _ = mean_and_error([len(answer["token_ids"]) for answer in answers])
        greedy = _answers(run, path, f"{folder}/greedy.jsonl", 0.0) if options.greedy else []
        if options.oracle is not None:
            row["true_quality"], row["true_quality_se"] = mean_and_error([a["grade"] for a in answers])
            row["true_quality_greedy"], row["true_quality_greedy_se"] = mean_and_error([a["grade"] for a in greedy])
            row["true_quality_n"] = len(answers)
    groups = heldout_groups(run.recipe)
    if groups:
        file, judge = f"{folder}/judgements.jsonl", run.recipe.judge
        drawn = by_answer(groups, judge_by_model(run, file, path, ranked_items(groups), judge, (0, "evaluation")))
        scores = [[mean_of_draws(run, draws) for draws in drawn[group["id"]]] for group in groups]
        row |= judge_accuracy(groups, scores) | {"longer_wins": longer_wins(groups)}
    return row


def _answers(run: Run, path: Path, name: str, temperature: float) -> list[Row]:
    """One answer to every held-out instruction; the seeds are the same for all models."""
    options = run.recipe.evaluation

    def request(prompt: Row) -> Request:
        seed = row_seed(run.recipe.seed, 0, "evaluation", prompt["id"])
        params = SamplingParams(temperature=temperature, max_tokens=options.max_tokens, seed=seed)
        ids = run.tokenizer.chat_prompt(prompt["prompt"])
        return Request(ids, params, lambda output: [_answer_row(run, prompt, output)])

    prompts = heldout_prompts(run.recipe)
    return sample_groups(run, name, run.llm(path), in_groups([request(prompt) for prompt in prompts]))


def _answer_row(run: Run, prompt: Row, output: RequestOutput | None) -> Row:
    """An instruction that leaves no room for an answer has none."""
    text, ids, finish = "", list[int](), "prompt_too_long"
    if output is not None:
        (answer,) = output.outputs
        text, ids, finish = answer.text, answer.token_ids, answer.finish_reason
    row: Row = {"id": prompt["id"], "prompt": prompt["prompt"], "text": text, "token_ids": ids, "finish_reason": finish}
    return row | {"grade": tiny.grade(prompt["prompt"], text)} if run.recipe.evaluation.oracle else row
