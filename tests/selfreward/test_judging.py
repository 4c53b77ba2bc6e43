"""Who judges: a model, chance or the truth; each writes the same kind of rows."""

import json
from collections import Counter

import pytest

from engine import Tokenizer
from selfreward import tiny
from selfreward.context import Run
from selfreward.judge import JudgeTemplate
from selfreward.judging import Item, judge_by_model, judge_candidates
from selfreward.recipe import Recipe
from selfreward.report import Reporter
from selfreward.state import RunDir

ANSWERS = {"copy a b c": ["a b c", "a b", ""], "count a b c d": ["4", "here it is 4"], "reverse a b c": ["c b a"]}
PROMPTS = [
    [Item(f"{p}-{i}", prompt, text) for i, text in enumerate(texts)]
    for p, (prompt, texts) in enumerate(ANSWERS.items())
]
ITEMS = [item for items in PROMPTS for item in items]


@pytest.fixture
def run(tmp_path, request):
    recipe = Recipe.load("micro", getattr(request, "param", []))
    with RunDir(tmp_path / "run", {}) as directory:
        yield Run(recipe, directory, Tokenizer(recipe.model), JudgeTemplate("tiny"), Reporter(quiet=True))


BY_CHANCE = pytest.mark.parametrize("run", [["judge.by=random"]], indirect=True)
BY_TRUTH = pytest.mark.parametrize("run", [["judge.by=oracle"]], indirect=True)


def check_rows(run, rows, name):
    assert [(row["candidate_id"], row["draw"]) for row in rows] == [(item.id, d) for item in ITEMS for d in range(3)]
    assert [json.loads(line) for line in run.dir.file(name).read_text().splitlines()] == rows
    for row in rows:
        assert (row["status"] == "ok") == (row["score"] is not None)


def test_a_model_judges_every_answer_as_often_as_asked(run):
    rows = judge_by_model(run, "j.jsonl", run.recipe.model, PROMPTS, run.recipe.judge, (1, "judge"))
    check_rows(run, rows, "j.jsonl")
    again = judge_by_model(run, "k.jsonl", run.recipe.model, PROMPTS, run.recipe.judge, (1, "judge"))
    other = judge_by_model(run, "l.jsonl", run.recipe.model, PROMPTS, run.recipe.judge, (2, "judge"))
    assert again == rows and other != rows  # the seeds follow from round, stage and item


def test_an_answer_that_fills_the_context_is_not_judged(run):
    item = Item("long", "copy a b c", " ".join(["a"] * 200))
    rows = judge_by_model(run, "j.jsonl", run.recipe.model, [[item]], run.recipe.judge, (1, "judge"))
    assert [(row["status"], row["score"]) for row in rows] == [("prompt_too_long", None)] * 3


@BY_TRUTH
def test_the_oracle_judges_by_the_truth(run):
    rows = judge_candidates(run, 1, PROMPTS)
    check_rows(run, rows, "iter_1/judgements.jsonl")
    assert [row["score"] for row in rows[::3]] == [tiny.grade(item.prompt, item.answer) for item in ITEMS]
    assert {row["score"] for row in rows} >= {0.0, 5.0}


@BY_CHANCE
def test_a_random_judge_has_not_read_the_answer(run):
    rows = judge_candidates(run, 1, PROMPTS)
    check_rows(run, rows, "iter_1/judgements.jsonl")
    swapped = [[Item(item.id, item.prompt, "another") for item in items] for items in PROMPTS]
    assert [row["score"] for row in judge_candidates(run, 1, swapped)] == [row["score"] for row in rows]
    assert [row["score"] for row in judge_candidates(run, 2, PROMPTS)] != [row["score"] for row in rows]


@BY_CHANCE
def test_a_random_judge_gives_every_score_equally_often(run):
    many = [[Item(f"{i}", "copy a b c", "a")] for i in range(2000)]
    counts = Counter(row["score"] for row in judge_candidates(run, 1, many))
    assert set(counts) == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
    assert all(abs(count - 1000) < 5 * 29 for count in counts.values())  # five standard deviations


def test_a_fixed_judge_is_asked_instead_of_the_rounds_model(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("selfreward.judging.judge_by_model", lambda run, name, model, *rest: asked.append(model) or [])
    judge_candidates(run, 2, PROMPTS)
    fixed = Recipe.load("micro", [f"judge_model={run.recipe.model}"])
    judge_candidates(Run(fixed, run.dir, run.tokenizer, run.template, run.report), 2, PROMPTS)
    assert asked == [run.model(2), run.recipe.model]
