"""Judgements of answers, by a model, or by one of the tiny world's two stand-ins that the controls need."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from engine import CompletionOutput, RequestOutput, SamplingParams, Tokenizer
from selfreward import tiny
from selfreward.context import Row, Run
from selfreward.expected import distribution, score_labels, score_step
from selfreward.judge import TOP_SCORE, Judgement, JudgeTemplate, judge_status, mean_score
from selfreward.recipe_stages import EFT, Judge
from selfreward.sampling import Request, in_groups, sample_groups
from selfreward.state import row_seed


class Item(NamedTuple):
    """One answer to be judged. `id` names it in the run, and its draws' seeds follow from it.

    same_as: another answer to the prompt, with the same text, whose judgements are this one's too.
    """

    id: str
    prompt: str
    answer: str
    same_as: str | None = None


def once(items: Sequence[Item]) -> list[Item]:
    """The answers to a prompt, where those with the text of an earlier one are judged with it."""
    first: dict[str, str] = {}
    return [
        item if (earlier := first.setdefault(item.answer, item.id)) == item.id else item._replace(same_as=earlier)
        for item in items
    ]


def judge_by_model(
    run: Run,
    name: str,
    model: Path,
    prompts: Sequence[Sequence[Item]],
    options: Judge | EFT,
    key: tuple[int, str],
    template: JudgeTemplate | None = None,
) -> list[Row]:
    """`options.draws` judgements of every answer, in order, into the file `name`.

    prompts: the answers of each prompt; a group is 64 prompts. The rubric, each prompt and each answer are computed once.
    key: (round, stage) of the draws' seeds. template: None is the run's.
    """
    tokenizer, asking = run.tokenizer_of(model), template or run.template
    labels = score_labels(tokenizer) if options.score == "expected" else {}

    def request(item: Item) -> Request:
        ids = [] if item.same_as is not None else asking.token_ids(tokenizer, item.prompt, item.answer)
        params = SamplingParams(
            n=options.draws,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            seed=row_seed(run.recipe.seed, *key, item.id),
            label_token_ids=tuple(labels),
        )
        return Request(ids, params, lambda output: _model_rows(item, options.draws, output, labels, tokenizer))

    groups = [[request(item) for items in group for item in items] for group in in_groups(prompts)]
    return sample_groups(run, name, model, groups)


def judge_candidates(run: Run, k: int, prompts: Sequence[Sequence[Item]]) -> list[Row]:
    """The judgements of round k, by the judge that the recipe names."""
    options, name = run.recipe.judge, f"iter_{k}/judgements.jsonl"
    if options.duplicates == "once":
        prompts = [once(items) for items in prompts]
    if options.by == "model":
        model, template = run.recipe.judge_model or run.model(k), run.judge_model_template
        return judge_by_model(run, name, model, prompts, options, (k, "judge"), template)
    score = _random_score(run, k) if options.by == "random" else _true_score
    rows = [
        _row(item, draw, Judgement(score(item, draw), "ok")) if item.same_as is None else _copy_row(item, draw)
        for items in prompts
        for item in items
        for draw in range(options.draws)
    ]
    run.dir.write_jsonl(name, rows)
    return rows


def _random_score(run: Run, k: int) -> Callable[[Item, int], float]:
    """A judge that has not read the answer: the control that says how much of a gain is not the judge's."""

    def score(item: Item, draw: int) -> float:
        seed = row_seed(run.recipe.seed, k, "random judge", f"{item.id}-{draw}")
        return float(random.Random(seed).randint(0, int(TOP_SCORE)))

    return score


def _true_score(item: Item, draw: int) -> float:
    """The oracle as judge: the bound."""
    return float(tiny.grade(item.prompt, item.answer))


def _model_rows(
    item: Item, draws: int, output: RequestOutput | None, labels: dict[int, int], tokenizer: Tokenizer
) -> list[Row]:
    if item.same_as is not None:
        return [_copy_row(item, draw) for draw in range(draws)]
    if output is None:
        return [_row(item, draw, Judgement(None, "prompt_too_long")) for draw in range(draws)]
    rows = []
    for one in output.outputs:
        judgement = judge_status(one.text, one.finish_reason)
        row = _row(item, one.index, judgement, one.text, one.token_ids)
        rows.append(row | _expected(one, judgement, labels, tokenizer) if labels else row)
    return rows


def _expected(one: CompletionOutput, judgement: Judgement, labels: dict[int, int], tokenizer: Tokenizer) -> Row:
    """The distribution of a draw's score; all None where it cannot be told which token wrote the score."""
    step = None
    if judgement.span is not None:
        step = score_step(one.text, judgement.span, one.token_ids, labels, tokenizer.decode)
    if step is None:
        return {"expected": None, "score_probabilities": None, "score_mass": None}
    assert one.label_logprobs is not None
    found = distribution(one.label_logprobs[step], list(labels.values()))
    return {"expected": found.expected, "score_probabilities": found.probabilities, "score_mass": found.mass}


def _copy_row(item: Item, draw: int) -> Row:
    return _row(item, draw, Judgement(None, "duplicate")) | {"same_as": item.same_as}


def _row(item: Item, draw: int, judgement: Judgement, text: str = "", token_ids: Sequence[int] = ()) -> Row:
    return {
        "id": f"{item.id}-{draw}",
        "candidate_id": item.id,
        "draw": draw,
        "score": judgement.score,
        "status": judgement.status,
        "text": text,
        "token_ids": list(token_ids),
    }


def scored_candidates(run: Run, k: int, drawn: bool = False) -> dict[str, list[Row]]:
    """Prompt id -> its candidates with the mean score of their judgements (None: too few are readable).

    drawn: the scores as they were drawn, whole numbers mostly, also where the recipe takes the expected ones.
    """
    value = drawn_score if drawn else draw_score
    draws: dict[str, list[Row]] = {}
    for row in run.rows(f"iter_{k}/judgements.jsonl"):
        draws.setdefault(row["candidate_id"], []).append(row)
    scored: dict[str, list[Row]] = {}
    for row in run.rows(f"iter_{k}/candidates.jsonl"):
        judged = draws[row["id"]]
        if judged[0]["status"] == "duplicate":
            judged = draws[judged[0]["same_as"]]
        scored.setdefault(row["prompt_id"], []).append(
            row | {"score": mean_of_draws(run, judged, value), "draws": [value(each) for each in judged]}
        )
    return scored


def draw_score(row: Row) -> float | None:
    """What a judgement counts as: its expected score if it has one, else the score that was drawn."""
    expected = row.get("expected")
    return drawn_score(row) if expected is None else float(expected)


def drawn_score(row: Row) -> float | None:
    score: float | None = row["score"]
    return score


def mean_of_draws(run: Run, rows: Sequence[Row], value: Callable[[Row], float | None] = draw_score) -> float | None:
    return mean_score([Judgement(value(row), row["status"]) for row in rows], run.recipe.judge.min_valid_draws)


def ranked_items(groups: Sequence[Row]) -> list[list[Item]]:
    return [[Item(f"{g['id']}-{i}", g["prompt"], a["text"]) for i, a in enumerate(g["answers"])] for g in groups]


def by_answer(groups: Sequence[Row], judgements: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """Group id -> for each of its answers the judgement rows, in order of the draws."""
    drawn: dict[str, list[Row]] = {}
    for row in judgements:
        drawn.setdefault(row["candidate_id"], []).append(row)
    return {group["id"]: [drawn[f"{group['id']}-{i}"] for i in range(len(group["answers"]))] for group in groups}
