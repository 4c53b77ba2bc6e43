"""`eval` with models: what it writes, that it goes on where it stopped, and a user's mistakes in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Tokenizer, load_checkpoint, save_checkpoint
from selfreward import context, eval_command, eval_settings, mt_bench
from selfreward.eval_compare import folder_name
from selfreward.evaluation import text_figures
from selfreward.formats import read_jsonl
from selfreward.recipe import PACKAGE, Recipe, recipe_keys
from selfreward.run import main

M0, DATA = PACKAGE / "tiny/m0", PACKAGE / "tiny/data"
TWO = ["--model", f"A={M0}", "--model", f"B={M0}"]
QUESTIONS = [
    {"question_id": 82, "category": "math", "turns": ["reverse a b c", "copy d e"]},
    {"question_id": 81, "category": "writing", "turns": ["copy x y z", "sort c b a"]},
]


def command(out: Path, *words: str) -> int:
    return main(["eval", "--quiet", "--recipe", "tiny", "--out", str(out), *words])


def lines(path: Path, count: int, source: str) -> Path:
    path.write_text("".join((DATA / source).read_text().splitlines(keepends=True)[:count]))
    return path


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_same_prompts_are_answered_by_every_model_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lines(tmp_path / "asked.jsonl", 4, "heldout.jsonl")
    assert command(tmp_path / "out", "--ask", str(file), *TWO, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    folder = tmp_path / "out/eval/answers-asked"
    rows = read_jsonl(folder / "side_by_side.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in read_jsonl(file)] and rows == found["rows"]
    answers = {name: read_jsonl(folder / f"models/{name}/answers.jsonl") for name in "AB"}
    for i, row in enumerate(rows):
        assert row["answers"] == {name: answers[name][i]["text"] for name in "AB"}
        assert row["answers"]["A"] == row["answers"]["B"]  # the seeds are the same, and so is the model
    assert found["models"]["A"] == text_figures([row["token_ids"] for row in answers["A"]])
    before = (folder / "models/A/answers.jsonl").read_bytes()
    (folder / "models/A/answers.jsonl").write_bytes(before[:-7])  # torn by a kill
    assert command(tmp_path / "out", "--ask", str(file), *TWO, "--json") == 0
    assert (folder / "models/A/answers.jsonl").read_bytes() == before
    assert command(tmp_path / "out", "--ask", str(file), *TWO, "seed=1") == 2
    assert "recipe.seed is 0 there, 1 here" in capsys.readouterr().err


def test_outputs_for_alpaca_eval_name_instruction_and_generator(tmp_path: Path) -> None:
    file = write(
        tmp_path / "set.json", [{"instruction": "copy a b", "output": "a b", "generator": "ref", "dataset": "d"}]
    )
    assert command(tmp_path / "out", "--alpaca", str(file), *TWO, "--json") == 0
    (row,) = json.loads((tmp_path / "out/eval/answers-set/model_outputs/B.json").read_text())
    assert (row["instruction"], row["generator"], row["dataset"]) == ("copy a b", "B", "set")
    assert row["output"] == read_jsonl(tmp_path / "out/eval/answers-set/models/B/answers.jsonl")[0]["text"]


def test_both_turns_are_answered_the_second_behind_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(run: Any, name: str, model: Any, groups: Any, real: Any = mt_bench.sample_groups) -> Any:
        asked.append([request for group in groups for request in group])
        return real(run, name, model, groups)

    monkeypatch.setattr(mt_bench, "sample_groups", noted)
    file = write(tmp_path / "question.jsonl", QUESTIONS)
    assert command(tmp_path / "out", "--mt-bench", str(file), "--model", f"A={M0}", "--json") == 0
    rows = read_jsonl(tmp_path / "out/eval/mt-bench-question/model_answer/A.jsonl")
    assert [row["question_id"] for row in rows] == [81, 82]  # as FastChat sorts them
    assert all(row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"} for row in rows)
    tokenizer, first, second = Tokenizer(M0), asked[0], asked[1]
    for number, question in enumerate(QUESTIONS):
        (choice,) = next(row["choices"] for row in rows if row["question_id"] == question["question_id"])
        assert choice["index"] == 0 and len(choice["turns"]) == 2
        user = [{"role": "user", "content": turn} for turn in question["turns"]]
        assert first[number].ids == tokenizer.chat(user[:1])
        said = {"role": "assistant", "content": choice["turns"][0]}
        assert second[number].ids == tokenizer.chat([user[0], said, user[1]])
        assert second[number].params.temperature == (0.0 if question["category"] == "math" else 0.7)


def test_a_first_answer_that_was_cut_is_ended_before_the_second_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "question.jsonl", QUESTIONS)
    words = ("--mt-bench", str(file), "--model", f"A={M0}", "evaluation.max_tokens=1")
    asked = []

    def noted(run: Any, name: str, model: Any, groups: Any, real: Any = mt_bench.sample_groups) -> Any:
        asked.append([request.ids for group in groups for request in group])
        return real(run, name, model, groups)

    monkeypatch.setattr(mt_bench, "sample_groups", noted)
    assert command(tmp_path / "out", *words) == 0
    tokenizer = Tokenizer(M0)
    for ids in asked[1]:
        assert ids.count(tokenizer.bos_id) == 2 and ids[ids.index(tokenizer.bos_id, 1) - 1] == tokenizer.eos_id


def test_models_judge_a_file_of_ranked_answers_beside_its_longer_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lines(tmp_path / "ranked.jsonl", 6, "eft_heldout.jsonl")
    with file.open("a") as out:
        out.write(json.dumps({"instruction": "p", "response1": True, "response2": "b", "annotator1": 1}) + "\n")
    assert command(tmp_path / "out", "--ranked", str(file), "--model", f"A={M0}", "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["rows"], found["used"], found["refused"]) == (7, 6, {"missing": 1})
    assert found["models"]["A"]["pairs"] == found["longer"]["pairs"] == 36
    assert "ranked.jsonl:7: 'annotator2' is missing or null" in printed.err
    assert main(["eval", "--ranked", str(file), "--json"]) == 0
    found.pop("judging")
    assert json.loads(capsys.readouterr().out) == found | {"models": {}}


def test_the_models_and_settings_of_a_run_are_found_in_its_directory(tmp_path: Path) -> None:
    recipe, out = Recipe.load("tiny", ["evaluation.temperature=0.3"]), tmp_path / "run"
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps({"recipe": recipe.dump()}))
    for stage in ("sft/model", "m1/model", "iter_1/model"):
        shutil.copytree(M0, out / stage)
    (out / "stages.json").write_text(json.dumps({"sft/model": {}, "m1/model": {}, "iter_1/model": {}}))
    found = eval_settings.settings("--ask", None, out, ["evaluation.max_tokens=7"])
    assert (found.evaluation.temperature, found.evaluation.max_tokens) == (0.3, 7)
    models = eval_settings.find_models([], out)
    assert list(models) == ["M0", "SFT", "M1", "M2"] and models["M0"] == M0 and models["M2"] == out / "iter_1/model"
    file = write(tmp_path / "one.jsonl", [{"prompt": "copy a b"}])
    assert main(["eval", "--quiet", "--out", str(out), "--ask", str(file)]) == 0
    (row,) = read_jsonl(out / "eval/answers-one/side_by_side.jsonl")
    assert list(row["answers"]) == ["M0", "SFT", "M1", "M2"]
    again = [
        "eval",
        "--quiet",
        "--out",
        str(out),
        "--recipe",
        "llama2-7b",
        "evaluation.max_tokens=7",
    ]
    other = write(tmp_path / "other.jsonl", [{"prompt": "copy a b"}])
    assert main([*again, "--ask", str(other)]) == 0  # another recipe's settings, and still the run's own models
    assert list(read_jsonl(out / "eval/answers-other/side_by_side.jsonl")[0]["answers"]) == ["M0", "SFT", "M1", "M2"]


def test_a_run_is_asked_where_it_was_computed(tmp_path: Path) -> None:
    """Its manifest keeps the device apart; `auto` would move a run of the CPU to a GPU, in bf16."""
    recipe = Recipe.load("tiny").dump()
    del recipe["device"]
    for device in ("cpu", "cuda"):
        (tmp_path / "manifest.json").write_text(json.dumps({"recipe": recipe, "device": device}))
        assert eval_settings.settings("--ask", None, tmp_path, []).device == device
    assert eval_settings.settings("--ask", None, tmp_path, ["device=cpu"]).device == "cpu"


@pytest.mark.parametrize("word", ["sampler.dtype=bfloat16", "sampler.quantization=int8", "sampler.block_size=32"])
def test_rows_of_two_kinds_of_numbers_are_not_mixed(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "one.jsonl", [{"prompt": "copy a b"}])
    words = ("--ask", str(file), "--model", f"A={M0}", "--json")
    assert command(tmp_path / "out", *words) == 0
    assert command(tmp_path / "out", *words, word) == 2
    assert f"recipe.{word.partition('=')[0]} is" in capsys.readouterr().err
    assert command(tmp_path / "out", *words, "sampler.max_sequences=8") == 0  # decides no byte
    manifest = json.loads((tmp_path / "out/eval/answers-one/manifest.json").read_text())
    assert manifest["device"] == "cpu" and {"instructions", "machine", "torch"} < manifest.keys()


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"turns": ["a"]}, "question.jsonl:2: 'turns' has 1 entry; expected 2"),
        ({"turns": ["a", "b", "c"]}, "question.jsonl:2: 'turns' has 3 entries; expected 2"),
        ({"turns": ["a", True]}, "question.jsonl:2: 'turns[1]' is the boolean true"),
        ({"turns": ["a", " "]}, "question.jsonl:2: 'turns[1]' is empty"),
        ({"turns": "ab"}, "question.jsonl:2: 'turns' is a string"),
        ({"question_id": True}, "question.jsonl:2: 'question_id' is the boolean true"),
        ({"question_id": 82}, "question.jsonl:2: question 82 stands at"),
        ({"category": None}, "question.jsonl:2: 'category' is missing or null"),
    ],
)
def test_damaged_questions_are_one_sentence(
    question: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "question.jsonl", [QUESTIONS[0], QUESTIONS[1] | question])
    assert command(tmp_path / "out", "--mt-bench", str(file), *TWO) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "A"], "'A' is not NAME=DIRECTORY"),
        (["--model", f"a/b={M0}"], "is not NAME=DIRECTORY"),
        (["--model", f"A={M0}", "--model", f"A={M0}"], "names 'A' twice"),
        (["--model", "A=nowhere"], "the model A should be in"),
        ([], "holds no finished models"),
        (["evaluation.maxtokens=3"], "evaluation.max_tokens"),
        (["sft.lr=1.0"], "'sft.lr=1.0' has no effect on --ask"),
        (["evaluation.prompts=3"], "'evaluation.prompts=3' has no effect on --ask"),
        (["evaluation={prompts: 3}"], "'evaluation={prompts: 3}' has no effect on --ask"),
        (["evaluation={}"], "'evaluation={}' has no effect on --ask"),
        (["judge.draws=1"], "'judge.draws=1' has no effect on --ask"),
        (["judge.by=random"], "'judge.by=random' has no effect on --ask"),
    ],
)
def test_a_mistake_about_the_models_is_one_sentence(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "one.jsonl", [{"prompt": "copy a b"}])
    assert command(tmp_path / "out", "--ask", str(file), *words) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1


def test_eval_stands_first_and_settings_without_use_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--quiet", "eval"]) == 2
    assert "stands first" in capsys.readouterr().err
    for what in ("--annotations", "--ranked"):
        assert main(["eval", what, "x.json", "seed=3"]) == 2
        assert "leave 'seed=3' out" in capsys.readouterr().err
    assert main(["eval", "--ask", "x.jsonl", "--out", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


# ---- answered once ------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the directories whose models are loaded from now on."""
    names: list[str] = []

    def load(path: Path, *more: Any, real: Any = context.LLM, **options: Any) -> Any:
        names.append(path.name)
        return real(path, *more, **options)

    monkeypatch.setattr(context, "LLM", load)
    return names


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """--model words of three models that differ, and M0's directory is the first's."""
    for seed, name in enumerate(("b", "c"), start=1):
        model = load_checkpoint(M0)
        for i, weights in enumerate(model.parameters()):
            noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(100 * seed + i))
            weights.data += 0.02 * noise
        save_checkpoint(model, tmp_path / name, Tokenizer(M0))
    return [f"--model=A={M0}", f"--model=B={tmp_path / 'b'}", f"--model=C={tmp_path / 'c'}"]


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files but those for times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("timing.jsonl", ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def test_answers_are_sampled_once_whoever_asks_and_a_new_model_samples_its_own(
    tmp_path: Path, three: list[str], loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = lines(tmp_path / "p.jsonl", 5, "heldout.jsonl"), tmp_path / "out"
    assert command(out, "--ask", str(file), *three[:2]) == 0
    assert loaded == ["m0", "b"]
    assert command(out, "--alpaca", str(file), *three[:2]) == 0 and loaded == ["m0", "b"]
    loaded.clear()
    assert command(out, "--ask", str(file), *three) == 0 and loaded == ["c"]
    answers = snapshot(out / "eval/answers-p/models")
    loaded.clear()
    assert command(out, "--compare", str(file), *three) == 0 and loaded == ["c"]  # as the judge
    assert command(out, "--compare", str(file), *three[:2]) == 0 and loaded == ["c", "b"]
    assert command(out, "--compare", str(file), *three, f"judge_model={M0}") == 0 and loaded == ["c", "b", "m0"]
    assert snapshot(out / "eval/answers-p/models") == answers
    assert sorted(str(path.parent.relative_to(out)) for path in out.rglob("head_to_head.jsonl")) == [
        "eval/answers-p/compare/scores-tiny-by-A/A,B,C",
        "eval/answers-p/compare/scores-tiny-by-B/A,B",
        "eval/answers-p/compare/scores-tiny-by-C/A,B,C",
    ]
    capsys.readouterr()
    assert command(out, "--compare", str(file), *three, "judge.draws=1") == 2
    said = capsys.readouterr().err
    assert "C/A,B,C holds another run; remove it to ask anew, or undo: recipe.judge.draws is 3 there, 1 here" in said


@pytest.mark.parametrize("what", ["--ask", "--alpaca", "--compare", "--ranked", "--mt-bench"])
def test_a_finished_eval_loads_no_model_and_says_the_same_again(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lines(tmp_path / "p.jsonl", 3, "eft_heldout.jsonl" if what == "--ranked" else "heldout.jsonl")
    if what == "--mt-bench":
        write(file, QUESTIONS)
    said = []
    for _ in range(2):
        assert command(tmp_path / "out", what, str(file), *TWO, "--json") == 0
        said.append(json.loads(capsys.readouterr().out))
        monkeypatch.setattr(context, "LLM", None)
    assert said[0] == said[1]
    spent = said[0].get("answering") or said[0]["judging"]
    assert spent.keys() == {"A", "B"}
    for each in spent.values():
        assert each["wall_seconds"] >= each["seconds"] > 0 and each["new_tokens"] > 0
        assert abs(each["computed_per_second"] - each["computed_rows"] / each["seconds"]) <= 0.1


def test_whatever_a_kill_left_the_same_command_ends_in_the_same_bytes(tmp_path: Path, three: list[str]) -> None:
    file, out = lines(tmp_path / "p.jsonl", 130, "heldout.jsonl"), tmp_path / "out"
    words = ("--compare", str(file), *three[:2], "judge.draws=1")
    assert command(out, *words) == 0
    whole, folder = snapshot(out), out / "eval/answers-p"
    judged = folder / "compare/scores-tiny-by-B/A,B"
    for torn in (folder / "models/B/answers.jsonl", judged / "judgements.jsonl"):
        for left in (0.0, 0.6, 0.999):
            torn.write_bytes(torn.read_bytes()[: int(left * torn.stat().st_size)])
            for later in (torn.parent / "stages.json", judged / "head_to_head.jsonl"):
                later.unlink(missing_ok=True)
            assert command(out, *words) == 0
            assert snapshot(out) == whole
    shutil.rmtree(judged)
    assert command(out, *words) == 0
    assert snapshot(out) == whole


def test_answers_may_be_judged_by_two_at_once(
    tmp_path: Path, three: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, asked = lines(tmp_path / "p.jsonl", 2, "heldout.jsonl"), tmp_path / "out", list[int]()

    def meanwhile(*given: Any, real: Any = eval_command.compare) -> Any:
        asked.append(command(out, "--ask", str(file), *three[:2]))
        return real(*given)

    monkeypatch.setattr(eval_command, "compare", meanwhile)
    assert command(out, "--compare", str(file), *three[:2]) == 0 and asked == [0]


def test_a_model_that_changed_is_refused_and_so_are_other_prompts_of_that_name(
    tmp_path: Path, three: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "p.jsonl", [{"prompt": "copy a b"}]), tmp_path / "out"
    assert command(out, "--ask", str(file), *three[:2]) == 0
    capsys.readouterr()
    assert command(out, "--ask", str(file), three[0], three[2].replace("C=", "B=")) == 2
    assert "answers-p/models/B holds another run; remove it to ask anew, or undo: model is" in capsys.readouterr().err
    write(file, [{"prompt": "copy a c"}])
    assert command(out, "--ask", str(file), *three[:2]) == 2
    assert (
        "answers-p holds another run; remove it to ask anew, or undo: hash of the file with the questions is"
        in capsys.readouterr().err
    )


def test_a_judge_that_cannot_be_asked_shows_before_the_answers(
    tmp_path: Path, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "p.jsonl", [{"prompt": "copy a b"}]), tmp_path / "out"
    assert command(out, "--compare", str(file), *TWO, "judge_model=nowhere") == 2
    assert "nowhere: there is no such directory" in capsys.readouterr().err
    assert command(out, "--compare", str(file), *TWO, "judge.draws=1") == 0
    shutil.rmtree(out / "eval/answers-p/models")
    loaded.clear()
    assert command(out, "--compare", str(file), *TWO) == 2 and loaded == []
    assert "recipe.judge.draws is 1 there, 3 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("answers.jsonl", {"id": "another"}, "answers.jsonl:1: not the answer to 'p-1'; remove the file to ask anew"),
        ("answers.jsonl", 3, "answers.jsonl:1: not the answer to 'p-1'"),
        ("timing.jsonl", {"seconds": 1}, "timing.jsonl: a row has no 'seconds' or no 'sampler'; remove the file"),
        ("manifest.json", [], "manifest.json is not a JSON object"),
    ],
)
def test_a_damaged_part_is_one_sentence(
    name: str, row: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "p.jsonl", [{"prompt": "copy a b"}]), tmp_path / "out"
    assert command(out, "--ask", str(file), *TWO) == 0
    write(out / "eval/answers-p/models/A" / name, [row])
    capsys.readouterr()
    assert command(out, "--ask", str(file), *TWO, "--json") == 2
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1


def test_prompts_that_leave_no_room_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "copy " + "a b " * 500}, {"prompt": "copy a b"}])
    assert command(tmp_path / "out", "--ask", str(file), *TWO) == 0
    assert "1 of 2 prompts leave A no room for an answer: it counts as empty" in capsys.readouterr().err


def test_a_set_of_models_has_a_directory_that_a_file_system_takes() -> None:
    assert folder_name(["M0", "SFT", "M1"]) == "M0,SFT,M1"
    long = [f"{'m' * 60}{i}" for i in range(5)]
    assert folder_name(long).startswith("5 models ") and folder_name(long) != folder_name(long[::-1])


def test_every_key_of_the_judge_is_used_where_a_judge_model_scores() -> None:
    unused = {key for key in recipe_keys() if key.startswith("judge.")} - set(eval_settings.USED["--compare"])
    assert unused == {"judge.by"}
