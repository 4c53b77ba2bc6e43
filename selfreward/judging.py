"""Judgements of answers, by a model, or by one of the tiny world's two stand-ins that the controls need."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from engine import RequestOutput, SamplingParams
from selfreward import tiny
from selfreward.context import Row, Run
from selfreward.judge import TOP_SCORE, Judgement, judge_status, mean_score
from selfreward.recipe import EFT, Judge
from selfreward.sampling import Request, in_groups, sample_groups
from selfreward.state import row_seed


class Item(NamedTuple):
    """One answer to be judged. `id` names it in the run, and its draws' seeds follow from it."""

    id: str
    prompt: str
    answer: str


def judge_by_model(
    run: Run, name: str, model: Path, prompts: Sequence[Sequence[Item]], options: Judge | EFT, key: tuple[int, str]
) -> list[Row]:
    """`options.draws` judgements of every answer, in order, into the file `name`.

    prompts: the answers of each prompt; a group is 64 prompts. The rubric, each prompt and each answer are computed once.
    key: (round, stage) of the draws' seeds.
    """
    llm = run.llm(model)
    tokenizer = llm.tokenizer
    assert tokenizer is not None

    def request(item: Item) -> Request:
        ids = run.template.token_ids(tokenizer, item.prompt, item.answer)
        params = SamplingParams(
            n=options.draws,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            seed=row_seed(run.recipe.seed, *key, item.id),
        )
        return Request(ids, params, lambda output: _model_rows(item, options.draws, output))

    groups = [[request(item) for items in group for item in items] for group in in_groups(prompts)]
    return sample_groups(run, name, llm, groups)


def judge_candidates(run: Run, k: int, prompts: Sequence[Sequence[Item]]) -> list[Row]:
    """The judgements of round k, by the judge that the recipe names."""
    options, name = run.recipe.judge, f"iter_{k}/judgements.jsonl"
    if options.by == "model":
        return judge_by_model(run, name, run.recipe.judge_model or run.model(k), prompts, options, (k, "judge"))
    items = [item for items in prompts for item in items]
    score = _random_score(run, k) if options.by == "random" else _true_score
    rows = [_row(item, draw, Judgement(score(item, draw), "ok")) for item in items for draw in range(options.draws)]
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


def _model_rows(item: Item, draws: int, output: RequestOutput | None) -> list[Row]:
    if output is None:
        return [_row(item, draw, Judgement(None, "prompt_too_long")) for draw in range(draws)]
    return [
        _row(item, one.index, judge_status(one.text, one.finish_reason), one.text, one.token_ids)
        for one in output.outputs
    ]


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


def scored_candidates(run: Run, k: int) -> dict[str, list[Row]]:
    """Prompt id -> its candidates with the mean score of their judgements (None: too few are readable)."""
    draws: dict[str, list[Row]] = {}
    for row in run.rows(f"iter_{k}/judgements.jsonl"):
        draws.setdefault(row["candidate_id"], []).append(row)
    scored: dict[str, list[Row]] = {}
    for row in run.rows(f"iter_{k}/candidates.jsonl"):
        judged = draws[row["id"]]
        scored.setdefault(row["prompt_id"], []).append(
            row | {"score": mean_of_draws(run, judged), "draws": [each["score"] for each in judged]}
        )
    return scored


def mean_of_draws(run: Run, rows: Sequence[Row]) -> float | None:
    return mean_score([Judgement(row["score"], row["status"]) for row in rows], run.recipe.judge.min_valid_draws)


def ranked_items(groups: Sequence[Row]) -> list[list[Item]]:
    return [[Item(f"{g['id']}-{i}", g["prompt"], a["text"]) for i, a in enumerate(g["answers"])] for g in groups]


def by_answer(groups: Sequence[Row], judgements: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """Group id -> for each of its answers the judgement rows, in order of the draws."""
    drawn: dict[str, list[Row]] = {}
    for row in judgements:
        drawn.setdefault(row["candidate_id"], []).append(row)
    return {group["id"]: [drawn[f"{group['id']}-{i}"] for i in range(len(group["answers"]))] for group in groups}
