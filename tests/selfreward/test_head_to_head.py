"""Head to head: outcomes worked out by hand, both orders of an outside judge, its damaged verdicts in one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine import InputError, Tokenizer, load_checkpoint, save_checkpoint
from selfreward import head_to_head
from selfreward.changes import OUTCOME, with_matches
from selfreward.head_to_head import both_orders, compared, figures, matches, read_verdicts
from selfreward.recipe import PACKAGE
from selfreward.run import main

M0 = PACKAGE / "tiny/m0"
LONGER = """import json, sys
for line in reversed(sys.stdin.readlines()):
    row = json.loads(line)
    gap = len(row["first"]) - len(row["second"])
    print(json.dumps({"id": row["id"], "winner": "tie" if gap == 0 else "first" if gap > 0 else "second"}))
"""


def answer(text: str, tokens: int = 1, id: str = "p") -> dict[str, Any]:
    return {"id": id, "prompt": "ask", "text": text, "token_ids": [1] * tokens}


def test_every_model_meets_the_one_before_it_and_the_baseline() -> None:
    assert matches(["M0", "SFT", "M1", "M2"]) == [
        ("SFT", "M0"),
        ("M1", "SFT"),
        ("M2", "M1"),
        ("M2", "SFT"),
    ]
    assert matches(["a", "b", "c"]) == [("b", "a"), ("c", "b")] and matches(["a"]) == []


def test_who_wins_in_both_orders_wins_and_all_else_is_a_tie() -> None:
    wins = {("first", "second"): 1, ("second", "first"): -1}
    for one in head_to_head.WINNERS:
        for other in head_to_head.WINNERS:
            assert both_orders(one, other) == wins.get((one, other), 0)
    assert both_orders(None, "first") is None and both_orders("tie", None) is None


def test_the_same_text_ties_and_an_unread_score_decides_nothing() -> None:
    assert compared(answer("a"), answer("b"), 4.0, 3.0) == 1 and compared(answer("a"), answer("b"), 3.0, 3.0) == 0
    assert compared(answer("a"), answer("b"), 2.5, 3.0) == -1 and compared(answer("a"), answer("b"), None, 3.0) is None
    assert compared(answer("a"), answer("a"), 4.0, 3.0) == 0


def test_figures_by_hand() -> None:
    outcomes = [1] * 5 + [0] * 3 + [-1] * 2 + [None] * 2
    found = figures(outcomes, [answer("x", 4)] * 12, [answer("x", 6)] * 12)
    assert (found["n"], found["unread"], found["win"], found["tie"], found["loss"]) == (10, 2, 0.5, 0.3, 0.2)
    assert found["win_minus_loss"] == 0.3 and (found["mean_length"], found["mean_length_against"]) == (4, 6)
    expected = np.std(outcomes[:10]) / np.sqrt(10)  # what resampling tends to
    assert abs(found["win_minus_loss_se"] - expected) <= 0.05 * expected
    assert figures([None], [answer("x")], [answer("y")])["win"] is None
    tied = figures([0] * 9, [answer("x")] * 9, [answer("y")] * 9)
    assert (tied["tie"], tied["win_minus_loss"], tied["win_minus_loss_se"]) == (1, 0, None)  # no spread is no certainty


def test_the_judges_mean_scores_decide_and_a_prompts_answers_stand_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    templates: list[Any] = []

    def judged(
        run: Any, name: str, judge: Path, groups: Any, options: Any, key: Any, template: Any
    ) -> list[dict[str, Any]]:
        asked.extend(groups)
        templates.append(template)
        scores = {"good": 5.0, "fair": 3.0, "bad": 1.0, "odd": None}
        return [
            {"candidate_id": item.id, "score": None if item.same_as else scores[item.answer], "status": ""}
            for each in groups
            for item in each
        ]

    monkeypatch.setattr(head_to_head, "judge_by_model", judged)
    options = SimpleNamespace(min_valid_draws=1, duplicates="apart")
    run: Any = SimpleNamespace(recipe=SimpleNamespace(judge=options, judge_model=None), judge_model_template=None)
    answers = {
        "A": [answer("good", id="1"), answer("fair", id="2"), answer("bad", id="3")],
        "B": [answer("fair", id="1"), answer("fair", id="2"), answer("odd", id="3")],
    }
    assert head_to_head.by_scores(run, M0, answers) == {("B", "A"): [-1, 0, None]}
    assert [[item.answer for item in each] for each in asked] == [["good", "fair"], ["fair", "fair"], ["bad", "odd"]]
    options.duplicates, run.recipe.judge_model, run.judge_model_template = "once", M0, "its own"
    answers["C"] = [answer("fair", id="1"), answer("bad", id="2"), answer("odd", id="3")]
    asked.clear()
    assert head_to_head.by_scores(run, M0, answers)[("C", "B")] == [0, -1, 0]
    assert [[item.same_as for item in each] for each in asked] == [
        [None, None, "1-B"],
        [None, "2-A", None],
        [None, None, "3-B"],
    ]
    assert templates == [None, "its own"]
    twice = {"b-c": [answer("x", id="a")], "c": [answer("x", id="a-b")]}
    with pytest.raises(InputError, match="two answers would both be called 'a-b-c'"):
        head_to_head.by_scores(run, M0, twice)


def test_a_models_row_has_its_match_with_the_one_before_and_with_the_baseline() -> None:
    models = [{"name": name} for name in ("M0", "SFT", "M1", "M2")]
    found = [
        {"model": a, "against": b, **dict.fromkeys(OUTCOME, number)}
        for number, (a, b) in enumerate(matches([row["name"] for row in models]))
    ]
    rows = with_matches(models, found)
    assert [(row["previous_win"], row["sft_win"]) for row in rows] == [(None, None), (0, None), (1, 1), (2, 3)]
    assert all(f"{prefix}_{key}" in row for row in rows for prefix in ("previous", "sft") for key in OUTCOME)
    assert models == [{"name": row["name"]} for row in models]  # the rows of finished stages stay as they are


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers otherwise than M0."""
    path = tmp_path_factory.mktemp("models") / "noisy"
    model = load_checkpoint(M0)
    for i, weights in enumerate(model.parameters()):
        weights.data += 0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(i))
    save_checkpoint(model, path, Tokenizer(M0))
    return path


def compare(tmp_path: Path, *more: str, other: Path = M0) -> int:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"copy a b {letter}"}) + "\n" for letter in "cdef"))
    two = ["--model", f"A={M0}", "--model", f"B={other}"]
    words = ["eval", "--quiet", "--recipe", "tiny", "--out", str(tmp_path / "out"), "--compare", str(file), *two]
    return main([*words, *more])


def test_a_model_ties_with_itself_and_the_engine_shares_what_both_were_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (match,) = found["matches"]
    assert (match["model"], match["against"], match["n"], match["tie"]) == ("B", "A", 4, 1.0)
    assert found["judging"]["new_tokens"] > 0 and found["judging"]["seconds"] > 0
    assert match == json.loads(
        (tmp_path / "out/eval/answers-p/compare/scores-tiny-by-B/A,B/head_to_head.jsonl").read_text()
    )


def test_an_outside_judge_is_asked_in_both_orders_and_once(
    tmp_path: Path, noisy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, log = tmp_path / "judge.py", tmp_path / "log"
    script.write_text(LONGER + f"open({str(log)!r}, 'a').write('asked ')\n")
    command = f"{sys.executable} {script}"
    for _ in range(2):
        assert compare(tmp_path, "--json", "--judge-command", command, other=noisy) == 0
        (match,) = json.loads(capsys.readouterr().out)["matches"]
        assert match["n"] == 4 and match["same_text"] == 0
    assert log.read_text() == "asked "
    folder = tmp_path / "out/eval/answers-p/compare"
    (file,) = folder.glob("command-*/A,B/verdicts.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert compare(tmp_path, "--judge-command", f"{command} again", other=noisy) == 0
    assert log.read_text() == "asked asked " and len(list(folder.glob("command-*/A,B/verdicts.jsonl"))) == 2
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[1:]))
    capsys.readouterr()
    assert compare(tmp_path, "--judge-command", command, other=noisy) == 2
    assert "verdicts.jsonl lacks 1 of 8 verdicts" in capsys.readouterr().err
    assert len(rows) == 8 and [row["first"] for row in rows[::2]] == [row["second"] for row in rows[1::2]]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("print('no json')", "command_output.jsonl:1: not JSON"),
        ('print(\'{"id": "x", "winner": "tie"}\')', "'id' is 'x'; expected one that was asked"),
        (LONGER.replace('"first" if', '"both" if'), "'winner' is 'both'; expected first, second, tie or null"),
        (LONGER.replace('"winner"', '"won"'), "command_output.jsonl:1: 'winner' is missing; expected first"),
        (LONGER.replace("sys.stdin.readlines()", "sys.stdin.readlines()[1:]"), "lacks 1 of 8 verdicts"),
    ],
)
def test_what_an_outside_judge_does_wrong_is_one_sentence(
    script: str, said: str, tmp_path: Path, noisy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "judge.py").write_text(script)
    assert compare(tmp_path, "--judge-command", f"{sys.executable} {tmp_path / 'judge.py'}", other=noisy) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1


def test_a_command_that_failed_may_be_corrected_and_no_answer_is_lost(tmp_path: Path, noisy: Path) -> None:
    (tmp_path / "judge.py").write_text("import sys\nif len(sys.argv) < 2:\n    sys.exit(3)\n" + LONGER)
    command = f"{sys.executable} {tmp_path / 'judge.py'}"
    assert compare(tmp_path, "--judge-command", command, other=noisy) == 2
    file = tmp_path / "out/eval/answers-p/models/A/answers.jsonl"
    marked = file.read_text().replace('"prompt": "copy a b c"', '"prompt": "COPY a b c"')
    file.write_text(marked)
    assert compare(tmp_path, "--judge-command", f"{command} now", other=noisy) == 0
    assert file.read_text() == marked and "COPY" in marked  # not answered again


def test_equal_texts_tie_and_nobody_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "judge.py").write_text("import sys; sys.exit(3)")
    assert compare(tmp_path, "--json", "--judge-command", f"{sys.executable} {tmp_path / 'judge.py'}") == 0
    (match,) = json.loads(capsys.readouterr().out)["matches"]
    assert match["tie"] == 1.0 and match["same_text"] == match["n"] == 4 and match["win_minus_loss_se"] is None


def test_a_script_that_was_changed_is_another_judge(
    tmp_path: Path, noisy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, margins = tmp_path / "judge.py", []
    for text in (LONGER, LONGER.replace("gap > 0", "gap < 0")):
        script.write_text(text)
        assert compare(tmp_path, "--json", "--judge-command", f"{sys.executable} {script}", other=noisy) == 0
        margins.append(json.loads(capsys.readouterr().out)["matches"][0]["win_minus_loss"])
    assert margins[0] == -margins[1] != 0


def test_ctrl_c_while_the_command_works_is_no_failure_of_the_command(
    tmp_path: Path, noisy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text("import os, sys\nos.kill(os.getppid(), 2)\nsys.exit(1)\n")
    assert compare(tmp_path, "--judge-command", f"{sys.executable} {script}", other=noisy) == 130
    said = capsys.readouterr().err
    assert "stopped by SIGINT" in said and "exit code" not in said


def test_more_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, "--judge-command", "nowhere-to-be-found") == 2
    assert "cannot be started" in capsys.readouterr().err
    assert compare(tmp_path, "--judge-command", "an 'open quote") == 2
    assert "cannot be started (No closing quotation)" in capsys.readouterr().err
    one = ["eval", "--recipe", "tiny", "--out", str(tmp_path / "out"), "--compare", str(tmp_path / "p.jsonl")]
    assert main([*one, "--model", f"A={M0}"]) == 2
    assert "needs two models or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # so that the corrected command finds no other run there
    assert main(["eval", "--ask", "x", "--judge-command", "x"]) == 2
    assert "of --compare" in capsys.readouterr().err
    path = tmp_path / "verdicts.jsonl"
    path.write_text('{"id": "a", "winner": "tie"}\n' * 2)
    with pytest.raises(InputError, match="stands twice"):
        read_verdicts(path, {"a"})
    path.write_text('{"id": "a", "winner": true}\n')
    with pytest.raises(InputError, match="'winner' is the boolean true"):
        read_verdicts(path, {"a"})
