"""Who judges: a model, chance or the truth; each writes the same kind of rows."""

import json
import math
from collections import Counter

import pytest

from engine import Tokenizer
from selfreward import stages, tiny
from selfreward.context import Run
from selfreward.expected import score_labels
from selfreward.judge import JudgeTemplate
from selfreward.judging import Item, draw_score, judge_by_model, judge_candidates, once, scored_candidates
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


BY_M0 = "judge_model=package:tiny/m0"
EXPECTED = pytest.mark.parametrize("run", [["judge.score=expected", BY_M0]], indirect=True)
ONCE = ["judge.duplicates=once"]
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


@EXPECTED
def test_expected_scores_change_no_draw_and_are_the_distributions_means(run):
    """The reference: the log-probs that the engine gives to the judgement continued with each of the scores instead."""
    judge = run.recipe.judge.model_copy(update={"max_tokens": 16})
    plain = judge_by_model(
        run, "j.jsonl", run.recipe.model, PROMPTS, judge.model_copy(update={"score": "mean"}), (1, "judge")
    )
    rows = judge_by_model(run, "k.jsonl", run.recipe.model, PROMPTS, judge, (1, "judge"))
    added = ("expected", "score_probabilities", "score_mass")
    assert [{key: row[key] for key in row if key not in added} for row in rows] == plain
    assert json.loads(run.dir.file("k.jsonl").read_text().splitlines()[0]) == rows[0]
    llm, of = run.llm(run.recipe.model), {score: token for token, score in score_labels(run.tokenizer).items()}
    read = [row for row in rows if row["status"] == "ok"]
    assert len(read) > 5 and all(row["expected"] is not None for row in read)
    for row in read:
        item = next(item for item in ITEMS if item.id == row["candidate_id"])
        ids = row["token_ids"]
        step = next(number for number, token in enumerate(ids) if token == of[row["score"]])
        prompt = run.template.token_ids(run.tokenizer, item.prompt, item.answer)
        scored = llm.score(prompt, [[*ids[:step], of[score]] for score in range(6)])
        exact = [math.exp(logprobs[-1]) for logprobs in scored]
        assert row["score_mass"] == pytest.approx(sum(exact), abs=1e-5)
        assert row["score_probabilities"] == pytest.approx([p / sum(exact) for p in exact], abs=1e-5)
        assert row["expected"] == pytest.approx(sum(s * p for s, p in enumerate(exact)) / sum(exact), abs=1e-4)
        assert draw_score(row) == row["expected"] != row["score"]


@EXPECTED
def test_a_draw_without_a_place_counts_as_the_score_that_was_drawn(run):
    drawn = {"score": 4.5, "status": "ok", "expected": None}
    assert draw_score(drawn) == 4.5
    assert draw_score(drawn | {"expected": 4.25}) == 4.25
    assert draw_score({"score": None, "status": "no_score", "expected": None}) is None


def judged_candidates(run, texts):
    """Candidates with these texts for one prompt, in the files of round 1, and their judgements by the recipe's judge."""
    run.dir.write_jsonl(
        "iter_1/candidates.jsonl",
        [{"id": f"p-{i}", "prompt_id": "p", "index": i, "text": text} for i, text in enumerate(texts)],
    )
    return judge_candidates(run, 1, [[Item(f"p-{i}", "copy a b c", text) for i, text in enumerate(texts)]])


@EXPECTED
def test_scores_of_candidates_are_means_of_expected_scores_or_of_drawn_ones(run):
    rows = judged_candidates(run, ["a b c", "a b"])
    for drawn, value in ((False, draw_score), (True, lambda row: row["score"])):
        (found,) = scored_candidates(run, 1, drawn).values()
        for number, candidate in enumerate(found):
            draws = [value(row) for row in rows[3 * number : 3 * number + 3]]
            assert candidate["draws"] == draws
            read = [score for score in draws if score is not None]
            assert candidate["score"] == pytest.approx(sum(read) / len(read))


@pytest.mark.parametrize("run", [[BY_M0, "judge.score=expected", *ONCE]], indirect=True)
def test_the_round_counts_expected_scores_places_that_are_not_found_and_copies(run, monkeypatch):
    rows = [
        {"id": f"p-{i}", "prompt_id": "p", "prompt": "copy a b c", "text": text}
        for i, text in enumerate(["a b c", "a", "a b", "a"])
    ]
    run.dir.write_jsonl("iter_1/candidates.jsonl", rows)
    counts = stages.judge_round(run, 1)
    assert counts["judgements"] == 12 and counts["statuses"]["duplicate"] == 3
    assert counts["expected"] == counts["statuses"]["ok"] and counts["without_place"] == 0
    monkeypatch.setattr("selfreward.judging.score_step", lambda *rest: None)
    run.dir.file("iter_1/judgements.jsonl").unlink()
    none = stages.judge_round(run, 1)
    assert none["statuses"] == counts["statuses"] and (none["expected"], none["without_place"]) == (
        0,
        counts["expected"],
    )


def test_copies_point_to_the_first_with_their_text():
    items = [Item(str(i), "p", text) for i, text in enumerate(["x", "y", "x", "x", "y", ""])]
    assert [item.same_as for item in once(items)] == [None, None, "0", "0", "1", None]


@pytest.mark.parametrize(
    "run", [[*ONCE, BY_M0], [*ONCE, "judge.by=random"], [*ONCE, BY_M0, "judge.score=expected"]], indirect=True
)
def test_copies_are_judged_once_and_share_the_scores(run):
    rows = judged_candidates(run, ["a b", "c", "a b"])
    assert [(row["candidate_id"], row["draw"]) for row in rows] == [(f"p-{i}", d) for i in range(3) for d in range(3)]
    assert [row["status"] == "duplicate" for row in rows] == [False] * 6 + [True] * 3
    assert {(row["same_as"], row["score"], row["text"]) for row in rows[6:]} == {("p-0", None, "")}
    ((first, other, copy),) = scored_candidates(run, 1).values()
    assert copy["score"] == first["score"] and copy["draws"] == first["draws"] and other["draws"] != []


@pytest.mark.parametrize("run", [[*ONCE, BY_M0, "judge.score=expected"]], indirect=True)
def test_a_stage_with_copies_that_was_cut_ends_with_the_same_bytes(run, monkeypatch):
    monkeypatch.setattr("selfreward.sampling.GROUP", 1)
    prompts = [[Item(f"{p}-{i}", "copy a b c", text) for i, text in enumerate("aba")] for p in range(3)]
    judge_candidates(run, 1, prompts)
    file = run.dir.file("iter_1/judgements.jsonl")
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 27
    for kept in (0, 8, 9, 17, 26):  # a group is 9 rows, the last 3 of them copies
        file.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        judge_candidates(run, 1, prompts)
        assert file.read_bytes() == whole


@pytest.mark.parametrize("run", [[BY_M0]], indirect=True)
def test_copies_are_judged_apart_unless_asked(run):
    rows = judged_candidates(run, ["a b", "a b"])
    assert {"duplicate"}.isdisjoint(row["status"] for row in rows) and len({row["text"] for row in rows[3:]} | {""}) > 1


@pytest.mark.parametrize("run", [ONCE], indirect=True)
def test_copies_draw_no_tokens_and_leave_the_others_draws(run):
    llm = run.llm(run.recipe.model)
    rows = {}
    for number, ids in enumerate((["a b", "c"], ["a b", "a b+", "c", "a b++"])):
        items = once([Item(name, "copy a b c", name.strip("+")) for name in ids])
        before = llm.stats()["new_tokens"]
        judge_by_model(run, f"{number}.jsonl", run.recipe.model, [items], run.recipe.judge, (1, "judge"))
        rows[number] = [row for row in run.rows(f"{number}.jsonl") if row["status"] != "duplicate"]
        rows[number].append(llm.stats()["new_tokens"] - before)
    assert rows[0] == rows[1]


def test_the_judge_model_has_a_template_of_its_own_in_the_rounds_only(run, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(JudgeTemplate("tiny").path.read_text().replace("=>", "=> yes no yes yes no"))
    recipe = Recipe.load("micro", [f"judge_model={run.recipe.model}", f"judge.model_template={own}"])
    fixed = Run(recipe, run.dir, run.tokenizer, run.template, run.report, judge_model_template=JudgeTemplate(own))
    rows = judge_candidates(fixed, 1, PROMPTS)
    usual = judge_by_model(fixed, "j.jsonl", recipe.judge_model, PROMPTS, recipe.judge, (1, "judge"))
    assert usual != rows
    assert rows == judge_by_model(
        fixed, "k.jsonl", recipe.judge_model, PROMPTS, recipe.judge, (1, "judge"), JudgeTemplate(own)
    )
