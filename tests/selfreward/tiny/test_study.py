"""The study's figures on runs made by hand, and what it asks of the command."""

import json

import numpy as np
import pytest

from engine import InputError
from selfreward.formats import read_jsonl
from selfreward.opening import deciding
from selfreward.recipe import Recipe
from selfreward.tiny import DATA, study
from selfreward.tiny.oracle import checks
from selfreward.tiny.study import BEGIN, END, VARIANTS, bootstrap, directory, insert, read, tables

# of the first held-out group's four answers: yes to everything, no to everything, and the first two again
VERDICTS = ["yes yes yes yes yes Score: 5", "no no no no no Score: 0"] * 2


def finished_run(path, grades):
    """A run of which only the report and the grades of M1, M2 and M3 stand."""
    rows = []
    for name, values in grades.items():
        folder = path / "evaluation" / name
        folder.mkdir(parents=True)
        (folder / "answers.jsonl").write_text("".join(json.dumps({"grade": v}) + "\n" for v in values))
        judged = [
            {"candidate_id": f"eft-heldout-0000-{i}", "status": "ok", "text": text} for i, text in enumerate(VERDICTS)
        ]
        (folder / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
        row = {"name": name, "true_quality": float(np.mean(values)), "true_quality_greedy": 5.0}
        rows.append(row | {"judge_pairwise": 0.5, "judge_pairwise_ties_half": 0.6, "longer_wins": 0.55})
    (path / "report.json").write_text(json.dumps({"models": rows}))


@pytest.fixture
def studied(tmp_path):
    rng = np.random.default_rng(0)
    for variant in VARIANTS:
        for seed in range(2):
            rise = 0 if variant.name == "random" else 1
            m1 = rng.integers(0, 4, 200)
            grades = {"M1": m1, "M2": m1 + rise * (rng.random(200) < 0.8), "M3": m1 + rise}
            if variant.name == "self":
                grades = {"M0": m1 * 0, "SFT": m1 * 0} | grades
            finished_run(directory(tmp_path, variant, seed), {k: [int(v) for v in g] for k, g in grades.items()})
    return tmp_path


def test_the_bootstrap_agrees_with_the_textbook_error_of_a_mean():
    values = np.random.default_rng(1).normal(0.3, 1.0, 400)
    error, low, high = bootstrap(values)
    plain = values.std(ddof=1) / 20
    assert error == pytest.approx(plain, rel=0.05)
    assert low == pytest.approx(values.mean() - 1.96 * plain, abs=0.02) and low < values.mean() < high


def test_a_constant_gain_has_no_error():
    assert bootstrap(np.ones(50)) == (0.0, 1.0, 1.0)


def test_the_tables_hold_the_runs_figures(studied):
    text = tables(read(studied, 10))
    m1, m2 = (study.grades(directory(studied, VARIANTS[0], 1), name) for name in ("M1", "M2"))
    assert f"| 1 | 0.00 | 0.00 | {m1.mean():.2f} | {m2.mean():.2f} |" in text
    error = np.std(m2 - m1, ddof=1) / 200**0.5
    stated = float(text.split("| 1 | 0.00")[1].split("(")[1].split(" se")[0])
    assert stated == pytest.approx((m2 - m1).mean() / error, rel=0.05)
    assert "The random judge's gain M3 - M1 over 2 seeds is +0.000" in text and "0% of the" in text
    assert "| self | 2 |  |" not in text and "0.500 (0.600)" in text


def test_ties_are_counted_over_different_texts(studied):
    folder = directory(studied, VARIANTS[0], 0) / "iter_1"
    folder.mkdir()
    scores = {"p": {"a": 5, "b": 5, "c": 1}, "q": {"a": 4, "b": 4}, "r": {"a": 4.5, "b": 0, "c": 2}}
    candidates = [{"id": p + t, "prompt_id": p, "text": t} for p, texts in scores.items() for t in texts]
    candidates.append({"id": "rA", "prompt_id": "r", "text": "a"})  # a copy, whose own mean of 4 makes it 4.25 together
    judged = [
        {"candidate_id": p + t, "score": score, "expected": None}
        for p, texts in scores.items()
        for t, score in texts.items()
    ]
    judged += [{"candidate_id": "rA", "score": 3, "expected": 4.0}, {"candidate_id": "rA", "score": None}]
    pairs = [{"prompt_id": "p", "score_chosen": 5, "score_rejected": 1}]
    pairs.append({"prompt_id": "r", "score_chosen": 4.25, "score_rejected": 0})
    dropped = [{"prompt_id": "q", "reason": "tie"}, {"reason": "duplicate"}, {"reason": "none_choosable"}]
    for name, rows in (("candidates", candidates), ("judgements", judged), ("pairs", pairs), ("dropped", dropped)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = study.tie_figures(folder.parent, 1)
    assert figures == {
        "pairs": 0.4,
        "tie": 0.2,
        "duplicate": 0.2,
        "other": 0.2,
        "score_chosen": 0.2,
        "score_rejected": 0.0,
    }
    assert "| self | 1 | 1 | 40.0% | 20.0% | 20.0% | 20.0% | 20.0% | 0.0% |" in tables(read(studied, 10))


def test_the_share_of_yes_is_told_apart_by_whether_the_check_holds(studied):
    group = read_jsonl(DATA / "eft_heldout.jsonl")[0]
    truth = [checks(group["prompt"], answer["text"]) for answer in group["answers"]]
    said = np.array([[True] * 5, [False] * 5] * 2)
    found = study.says_yes(directory(studied, VARIANTS[0], 0), "M1")
    for check in range(5):
        for holds in (False, True):
            answers = [said[i, check] for i in range(4) if truth[i][check] == holds]
            assert found[int(holds), check] == (np.mean(answers) if answers else 0)
    assert 0 < found.mean() < 1


def test_the_plot_is_a_png_that_does_not_change(studied):
    runs = read(studied, 10)
    assert study.plot(runs) == study.plot(runs) and study.plot(runs).startswith(b"\x89PNG")


def test_a_run_without_a_report_is_not_counted(studied):
    (directory(studied, VARIANTS[0], 0) / "report.json").unlink()
    assert list(read(studied, 10)["self"]) == [1] and list(read(studied, 1)["self"]) == []


def test_a_run_that_a_gate_stopped_is_not_finished(studied):
    path = directory(studied, VARIANTS[0], 1)
    (path / "report.json").write_text(json.dumps({"models": [], "stopped": "too few pairs"}))
    assert not study.finished(path) and list(read(studied, 10)["self"]) == [0]


def test_a_finished_run_of_another_recipe_is_refused(studied):
    path, overrides = directory(studied, VARIANTS[0], 0), ["seed=0", "threads=1"]
    manifest = {"recipe": deciding(Recipe.load("tiny", overrides))}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert study._run(studied, VARIANTS[0], 0, []) == "self-0: finished before"
    with pytest.raises(InputError, match="another 'dpo'"):
        study._run(studied, VARIANTS[0], 0, ["dpo.beta=0.2"])


def test_a_key_that_is_new_since_a_run_has_its_default_there(studied):
    path, recipe = directory(studied, VARIANTS[0], 0), deciding(Recipe.load("tiny", ["seed=0", "threads=1"]))
    older = json.loads(json.dumps(recipe))
    del older["judge"]["score"], older["dpo"]["betas"], older["judge_model"], older["lora"]
    older["gone"] = older["judge"]["gone"] = 1  # a key that there is no more had the value that is built in now
    (path / "manifest.json").write_text(json.dumps({"recipe": older}))
    assert study._run(studied, VARIANTS[0], 0, []) == "self-0: finished before"
    for overrides in (["judge.score=expected"], ["dpo.betas=[0.8, 0.9]"], ["lora.rank=2"]):
        with pytest.raises(InputError, match="holds a run with another"):
            study._run(studied, VARIANTS[0], 0, overrides)
    del older["judge"]["draws"], older["prompts"]["count"]  # tiny's 800 is not the default
    (path / "manifest.json").write_text(json.dumps({"recipe": older}))
    with pytest.raises(InputError, match="another 'prompts'"):
        study._run(studied, VARIANTS[0], 0, [])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_variant_is_a_recipe_that_can_be_asked_for(variant, tmp_path):
    plain = Recipe.load("tiny", check_files=False).dump()
    recipe = Recipe.load("tiny", variant.overrides(tmp_path), check_files=False).dump()
    assert (recipe == plain) == (variant.name == "self")


def test_tables_go_between_the_marks_and_nowhere_else():
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert insert(document, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(InputError, match="needs the marks"):
        insert("no marks", "new")
