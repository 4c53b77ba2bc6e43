"""The whole command: a short tiny run, resumed and repeated, and a user's mistakes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.train.config import CHECKPOINTING
from selfreward import run as run_module
from selfreward.recipe import PACKAGE, recipe_keys
from selfreward.run import main

FAST = [
    "prompts.count=24",
    "candidates.n=3",
    "judge.draws=2",
    "data.eft_limit=12",
    "eft.attempts=6",
    "eft.required=false",
    "gates.min_pairs=1",
    "evaluation.prompts=20",
    "evaluation.judge_groups=8",
]


MODELS = ("M0", "SFT", "M1", "M2", "M3")
UNMEASURED = ["data.heldout=null", "evaluation.oracle=null", "evaluation.greedy=false", "data.eft_heldout=null"]


def command(out, *more):
    return main(["--quiet", "--out", str(out), *FAST, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert command(out) == 0
    return out


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sampler_and_trainer_agree_in_every_round(finished):
    stages = json.loads((finished / "report.json").read_text())["stages"]
    for k in (1, 2):
        assert 0 < stages[f"iter_{k}/model"]["parity_mean"] <= stages[f"iter_{k}/model"]["parity_max"] <= 2e-5


def test_the_loop_ends_with_a_report_of_every_model(finished):
    report = json.loads((finished / "report.json").read_text())
    assert [row["name"] for row in report["models"]] == ["M0", "SFT", "M1", "M2", "M3"]
    for row in report["models"]:
        assert 0 <= row["true_quality"] <= 5 and row["true_quality_n"] == 20
        assert 0 <= row["judge_pairwise"] <= 1 and 0 <= row["longer_wins"] <= 1
        for name in ("pairwise", "five_best", "exact", "spearman", "kendall"):
            figure, interval = row[f"judge_{name}"], row[f"judge_{name}_interval"]
            assert interval is None or interval[0] <= figure <= interval[1]
        assert row["longer_pairwise"] <= row["longer_wins"] and 0 < row["distinct_2"] <= 1 and row["mean_length"] > 0
    assert rows(finished / "evaluation/metrics.jsonl") == report["models"]
    assert all(0 < row["answer_diversity"] <= 1 for row in report["rounds"])
    assert report["models"][3]["pairs"] >= 1
    assert report["stages"]["m1/model"]["eft"] > 0  # else M1 is the baseline, and its training is not seen here


def test_every_model_meets_the_one_before_it_and_the_baseline(finished):
    report = json.loads((finished / "report.json").read_text())
    assert rows(finished / "evaluation/head_to_head.jsonl") == report["matches"] and len(report["matches"]) == 6
    judged = rows(finished / "evaluation/judgements.jsonl")
    assert len(judged) == 2 * 20 * 5 and report["stages"]["evaluation/head_to_head"]["by"] == "M3"
    for row in report["matches"]:
        assert row["n"] + row["unread"] == 20 and abs(row["win"] + row["tie"] + row["loss"] - 1) < 1e-9
    last = report["models"][-1]
    for prefix, match in (("previous", report["matches"][-2]), ("sft", report["matches"][-1])):
        assert match["model"] == "M3" and last[f"{prefix}_win_minus_loss"] == match["win_minus_loss"]
    sampled = report["timing"]["sampler"]["evaluation/head_to_head"]
    assert sampled["computed_rows"] > 0 and sampled["seconds"] > 0
    assert sampled["prefix_tokens_saved"] + sampled["fork_tokens_saved"] > sampled["computed_rows"]


def test_the_last_model_may_see_two_answers_at_once_in_both_orders(finished, tmp_path):
    template = tmp_path / "pairwise.jinja"
    template.write_text(
        "{% block rubric %}judge :{% endblock %}{% block prompt %} {{ prompt }} |{% endblock %}"
        "{% block first %} {{ first }} |{% endblock %}{% block second %} {{ second }}{% endblock %}"
        "{% block cue %} =>{% endblock %}"
    )
    out, how = tmp_path / "out", ["evaluation.head_to_head=pairwise", f"evaluation.pairwise_template={template}"]
    assert command(out, f"m1={finished / 'm1/model'}", "model=null", "rounds=1", *how) == 0
    compared = rows(out / "evaluation/comparisons.jsonl")
    answers = [rows(out / f"evaluation/{name}/answers.jsonl") for name in ("M1", "M2")]
    differ = sum(a["text"] != b["text"] for a, b in zip(*answers, strict=True))
    assert len(compared) == 2 * 2 * differ > 0  # orders, draws
    (match,) = rows(out / "evaluation/head_to_head.jsonl")
    assert match["n"] >= 20 - differ and match["n"] + match["unread"] == 20
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["pairwise_template"]) == 64


def test_every_prompt_candidate_and_judgement_is_accounted_for(finished):
    for k in (1, 2):
        prompts, candidates, judgements, pairs, dropped = (
            rows(finished / f"iter_{k}/{name}.jsonl")
            for name in ("prompts", "candidates", "judgements", "pairs", "dropped")
        )
        assert len(candidates) == 3 * len(prompts) and len(judgements) == 2 * len(candidates)
        assert len(pairs) + len(dropped) == len(prompts)
        assert {row["id"] for row in pairs} | {row["id"] for row in dropped} == {row["id"] for row in prompts}
        for pair in pairs:
            assert pair["score_chosen"] > pair["score_rejected"] and not pair["chosen_truncated"]
        for row in judgements:
            assert (row["status"] == "ok") == (row["score"] is not None)
    first, second = ({row["prompt"] for row in rows(finished / f"iter_{k}/prompts.jsonl")} for k in (1, 2))
    assert not first & second


def test_an_equal_run_writes_the_same_bytes(finished, tmp_path):
    assert command(tmp_path / "again") == 0
    files = sorted(path.relative_to(finished) for path in finished.rglob("*") if path.is_file())
    compared = [path for path in files if path.name not in ("timing.jsonl", "report.json", "report.html", ".lock")]
    assert len(compared) > 30
    for path in compared:
        assert (finished / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path
    assert untimed_report(finished) == untimed_report(tmp_path / "again")


def untimed_report(out):
    report = json.loads((out / "report.json").read_text())
    assert report.pop("timing")
    return report


def test_a_stopped_run_goes_on_at_the_unfinished_stage(finished, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(run_module.stages, "build_pairs", lambda run, k: (_ for _ in ()).throw(OSError("disk is full")))
        assert command(out) == 2
    stages = json.loads((out / "stages.json").read_text())
    assert "iter_1/judgements" in stages and "iter_1/pairs" not in stages
    before = (out / "iter_1/judgements.jsonl").stat().st_mtime_ns
    assert command(out) == 0
    assert (out / "iter_1/judgements.jsonl").stat().st_mtime_ns == before
    for name in ("iter_2/pairs.jsonl", "iter_2/model/model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_beta_and_rate_of_a_round_are_those_of_its_place_in_the_list(tmp_path, monkeypatch):
    given = []

    def noted(model, data, config, *rest, real=run_module.training.train, **options):
        given.append((config.beta, config.lr))
        return real(model, data, config, *rest, **options)

    monkeypatch.setattr(run_module.training, "train", noted)
    lists = ["dpo.beta=[0.1, 0.4]", "dpo.lr=[3e-5, 1e-5]", "prompts.count=12"]
    assert command(tmp_path / "run", "model=null", f"m1={PACKAGE / 'tiny/m0'}", *lists, *UNMEASURED) == 0
    assert given == [(0.1, 3e-5), (0.4, 1e-5)]
    logged = [rows(tmp_path / f"run/iter_{k}/metrics.jsonl")[0]["learning_rate"] for k in (1, 2)]
    assert logged == [3e-5, 1e-5]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prompts.cuont=3"], 2, "prompts.count"),
        (["dpo.beta=[0.1, 0.2, 0.3]"], 2, "dpo.beta has 3 values, rounds is 2"),
        (["--recipe", "tinny"], 2, "tiny"),
        (["--recipe", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["data.ift=nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["model=nowhere"], 2, "nowhere"),
        (["sft.lr=fast"], 2, "sft.lr"),
        (["frobnicate"], 2, "frobnicate"),
        (["threads=100000000"], 2, "threads"),
        (["dpo.max_pack_tokens=20", "gates.min_pairs=1000"], 3, "too long "),
        (["plan"], 2, "not built"),
        (["gates.min_pairs=1000000"], 3, "gates.min_pairs"),
        (["gates.min_readable=1.0", "judge.max_tokens=1"], 3, "judge.max_tokens"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(arguments, code, message, tmp_path, capsys):
    assert command(tmp_path / "out", *arguments) == code
    err = capsys.readouterr().err.strip()
    assert message in err and "Traceback" not in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--quiet", "gates.min_pairs=1000", "--out", "OUT"],
        ["gates.min_pairs=1000", "--out", "OUT", "--quiet"],
        ["run", "--out", "OUT", "gates.min_pairs=1000", "--quiet"],
        ["run", "rounds=1", "--out", "OUT", "gates.min_pairs=1000"],
    ],
)
def test_action_options_and_keys_come_in_any_order(words, monkeypatch):
    seen = []
    monkeypatch.setattr(run_module, "_run", lambda recipe, out, report, stop: seen.append((recipe, out)))
    assert main(words) == 0
    ((recipe, out),) = seen
    assert recipe.gates.min_pairs == 1000 and out == "OUT"


def test_gates_may_be_moved_after_they_stopped_a_run(finished, tmp_path, capsys):
    out = tmp_path / "gated"
    assert command(out, "gates.min_pairs=1000") == 3
    assert command(out) == 0
    assert untimed_report(out) == untimed_report(finished)


def test_a_run_is_resumed_with_the_training_threads_that_it_began_with(finished, tmp_path):
    out, before = tmp_path / "run", torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert command(out, "gates.min_pairs=1000") == 3
        torch.set_num_threads(2)
        assert command(out) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert json.loads((out / "manifest.json").read_text())["training_threads"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_and_says_how_to_go_on(number, finished, tmp_path, capsys, monkeypatch):
    out = tmp_path / "stopped"

    def and_then_a_signal(run, k, real=run_module.stages.sample_candidates):
        signal.raise_signal(number)
        return real(run, k)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.stages, "sample_candidates", and_then_a_signal)
        assert command(out) == 128 + number
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().err
    assert signal.getsignal(number) is not None and command(out) == 0
    assert untimed_report(out) == untimed_report(finished)


def test_ctrl_c_during_the_imports_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "selfreward.run", "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        command, cwd=Path(run_module.__file__).parent.parent, env=os.environ | {"PYTHONPATH": path}, capture_output=True
    )
    assert ended.returncode == 130 and ended.stdout == b""
    assert ended.stderr == b"stopped by SIGINT; the same command goes on with what was saved\n"


def test_a_changed_recipe_is_refused_with_the_difference(finished, capsys):
    assert command(finished, "dpo.beta=0.2") == 2
    assert "recipe.dpo.beta is 0.1 there, 0.2 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gone", "stage"),
    [
        ("eft/train.jsonl", "eft"),
        ("m1/model", "m1/model"),
        ("iter_1/candidates.jsonl", "iter_1/candidates"),
        ("iter_2/dropped.jsonl", "iter_2/pairs"),
    ],
)
def test_what_a_finished_stage_wrote_and_is_gone_is_named_and_can_be_made_again(
    gone, stage, finished, tmp_path, capsys
):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (shutil.rmtree if gone.endswith("model") else os.unlink)(out / gone)
    assert command(out) == 2
    said = capsys.readouterr().err
    assert f"{out / gone} is missing" in said and f"the finished stage {stage!r} wrote it" in said
    stages = json.loads((out / "stages.json").read_text())
    (out / "stages.json").write_text(json.dumps({k: v for k, v in stages.items() if k != stage}))
    assert command(out) == 0  # the advice
    for name in (gone, "iter_2/model/model.safetensors"):
        if (out / name).is_file():
            assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(
    ("edited", "stage"),
    [
        ("eft/train.jsonl", "eft"),
        ("iter_1/judgements.jsonl", "iter_1/judgements"),
        ("evaluation/M1/answers.jsonl", "evaluation/M1"),
        ("evaluation/M1/judgements.jsonl", "evaluation/M1"),
    ],
)
def test_what_a_finished_stage_wrote_and_was_changed_is_named_and_can_be_made_again(
    edited, stage, finished, tmp_path, capsys
):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / edited).write_text((out / edited).read_text().replace('": ', '":  ', 1))
    assert (out / edited).read_bytes() != (finished / edited).read_bytes()
    assert command(out) == 2
    said = capsys.readouterr().err
    assert f"{out / edited} was changed after the finished stage {stage!r}" in said and "Traceback" not in said
    stages = json.loads((out / "stages.json").read_text())
    (out / "stages.json").write_text(json.dumps({k: v for k, v in stages.items() if k != stage}))
    (out / edited).unlink()
    assert command(out) == 0  # the advice
    assert (out / edited).read_bytes() == (finished / edited).read_bytes()


def test_a_run_of_a_version_that_recorded_no_hashes_goes_on(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    stages = json.loads((out / "stages.json").read_text())
    assert "files" in stages["iter_1/judgements"]
    old = {name: {key: value for key, value in counts.items() if key != "files"} for name, counts in stages.items()}
    (out / "stages.json").write_text(json.dumps(old))
    assert command(out) == 0
    assert untimed_report(out) == untimed_report(finished)


def test_the_report_counts_and_does_not_hash(finished):
    report, stages = (json.loads((finished / name).read_text()) for name in ("report.json", "stages.json"))
    counts = {name: {key: value for key, value in row.items() if key != "files"} for name, row in stages.items()}
    assert report["stages"] == counts
    assert {name for row in stages.values() for name in row.get("files", {})} == {
        "eft/train.jsonl",
        "evaluation/head_to_head.jsonl",
        *(f"evaluation/{name}/{file}.jsonl" for name in MODELS for file in ("answers", "judgements")),
        *(
            f"iter_{k}/{name}.jsonl"
            for k in (1, 2)
            for name in ("prompts", "candidates", "judgements", "pairs", "dropped")
        ),
    }


def test_a_tokenizer_larger_than_the_model_is_named_before_anything_is_computed(tmp_path, capsys):
    larger, package = tmp_path / "larger.model", Path(run_module.__file__).parent
    proto = (package / "tiny/m0/tokenizer.model").read_bytes()
    larger.write_bytes(proto + bytes([0x0A, 0x0A, 0x0A, 3]) + b"zzz" + bytes([0x15, 0, 0, 0, 0]))  # one more piece
    assert command(tmp_path / "out", f"tokenizer={larger}") == 2
    said = capsys.readouterr().err
    assert "larger.model has 55 pieces" in said and f"model ({package / 'tiny/m0'}) 54 embeddings" in said
    assert not (tmp_path / "out").exists()


def test_a_directory_of_something_else_is_no_model(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    assert command(tmp_path / "out", f"model={tmp_path}") == 2
    assert "config.json is missing; HF's layout has config.json, Meta's has params.json" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["model", "m1", "judge_model", "prompt_model", "tokenizer"])
def test_a_path_that_leads_to_no_model_or_tokenizer_is_named_with_its_key(key, tmp_path, capsys):
    (tmp_path / "file").write_text("nothing")
    (tmp_path / "empty").mkdir()
    more = ["model=null"] if key == "m1" else []
    for name in ("file", "empty"):
        assert command(tmp_path / "out", *more, f"{key}={tmp_path / name}") == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {key}: {tmp_path / name}") and f"give {key}=PATH" in said
    assert not (tmp_path / "out").exists()


def test_the_vocabulary_of_a_model_from_elsewhere_is_looked_at_first(tmp_path, capsys):
    shutil.copytree(PACKAGE / "tiny/m0", tmp_path / "judge")
    (tmp_path / "judge/tokenizer.model").write_bytes(b"nothing")
    assert command(tmp_path / "out", f"judge_model={tmp_path / 'judge'}") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: judge_model: ") and "tokenizer.model is not a SentencePiece model" in said


def test_what_decides_no_result_may_be_changed_before_a_resume(finished, tmp_path, monkeypatch):
    out, again = tmp_path / "run", []
    full = CHECKPOINTING["full"]
    monkeypatch.setitem(CHECKPOINTING, "full", lambda *given: (again.append(1), full(*given))[1])
    assert command(out, "gates.min_pairs=1000") == 3
    changed = [
        "sampler.max_batch_tokens=200",
        "sampler.kv_cache_gb=0.05",
        "sampler.max_sequences=60",
        "dpo.save_every=3",
        "dpo.activation_checkpointing=full",
    ]
    assert command(out, *changed, f"threads={torch.get_num_threads()}") == 0
    assert again  # the rounds were trained with it
    assert untimed_report(out) == untimed_report(finished)


@pytest.mark.parametrize("threads", ["one", 0, True])
def test_a_damaged_count_of_threads_is_named(threads, tmp_path, capsys):
    assert command(tmp_path / "run", "gates.min_pairs=1000") == 3
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest | {"training_threads": threads}))
    capsys.readouterr()
    assert command(tmp_path / "run") == 2
    assert f"training_threads is {threads!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["eft.required=true", "eft.max_tokens=1"], 3, ["unreadable 72", "raise eft.max_tokens", "judge_tiny.jinja"]),
        (["gates.min_pairs=1000"], 3, ["tie", "or raise prompts.count, or lower gates.min_pairs"]),
        (["prompts.max_tokens=1"], 3, ["prompts left after the filters (truncated ", "raise prompts.count"]),
        (["sft.lr=1e30", "sft.min_lr=0"], 2, ["sft/model: step ", "a changed sft.lr needs a new --out directory"]),
        (["data.max_tokens=3"], 2, ["no prompt is shorter than 3 tokens", "raise data.max_tokens, in a new --out"]),
        (["sampler.kv_cache_gb=0.00001"], 2, ["raise sampler.kv_cache_gb"]),
        (
            ["sampler.block_size=8", "sampler.kv_cache_gb=0.0001"],
            2,
            ["eft/judgements.jsonl: prompt ", "raise sampler.kv_cache_gb"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else "",
)
def test_what_stops_a_run_says_what_would_help_and_where(arguments, code, parts, tmp_path, capsys):
    assert command(tmp_path / "run", *arguments) == code
    said = capsys.readouterr().err
    for part in parts:
        assert part in said
    assert "{" not in said and "None" not in said
    if code == 3:
        assert "gates.* and eft.required may be changed" in said and "any other key needs a new --out directory" in said


def test_a_gate_is_in_the_json_too(tmp_path, capsys):
    assert command(tmp_path / "run", "gates.min_pairs=1000", "--json") == 3
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert f"stopped: {report['stopped']}\n" == err and "gates.min_pairs" in report["stopped"]
    assert report == json.loads((tmp_path / "run/report.json").read_text())


def test_the_time_of_a_stage_that_was_interrupted_counts(tmp_path):
    out = tmp_path / "run"
    assert command(out, "gates.min_pairs=1000") == 3
    assert command(out, "gates.min_pairs=1000") == 3
    spent = [row["seconds"] for row in rows(out / "timing.jsonl") if row["stage"] == "iter_1/pairs"]
    assert len(spent) == 2
    assert json.loads((out / "report.json").read_text())["timing"]["seconds"]["iter_1/pairs"] == sum(spent)


def test_the_last_line_says_where_the_report_is(finished, capsys):
    assert command(finished) == 0
    assert capsys.readouterr().err == f"report: {finished / 'report.html'}\n"
    assert command(finished, "--json") == 0
    assert json.loads(capsys.readouterr().out)["stopped"] is None


def test_help_shows_actions_recipes_and_keys(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert main(["frobnicate"]) == 2
    complaint = capsys.readouterr().err
    for action in ("run", "validate", "sft", "eft", "prompts", "sample", "judge", "pairs", "dpo", "report", "eval"):
        assert re.search(rf"^    (\w+, )*{action}[,:]", said, re.MULTILINE) and action in complaint
    for part in (
        "llama2-7b",
        "tiny",
        "rounds",
        "prompts.count",
        "dpo.beta",
        "python -m selfreward.run --out",
    ):
        assert part in said
    shown = set(re.findall(r"\b(?:data|prompts|candidates|judge|sft|dpo|sampler|gates)\.[a-z_]+", said))
    assert len(shown) >= 10 and shown <= set(recipe_keys())


def next_command(capsys):
    said = capsys.readouterr().out.strip()
    return said, shlex.split(said.partition("next: ")[2])[3:]


def test_a_stage_at_a_time_makes_the_same_run(finished, tmp_path, capsys, monkeypatch):
    out, actions, words = tmp_path / "run", [], []
    monkeypatch.setattr(run_module, "_append_time", lambda *given: 0.0)
    assert command(out, "sft") == 0
    order = list(json.loads((finished / "stages.json").read_text()))
    for number in range(13):
        assert list(json.loads((out / "stages.json").read_text())) == order[: number + 1]
        said, words = next_command(capsys)
        assert said.startswith(f"{order[number]} is finished; next: python -m selfreward.run ")
        actions.append(words[0])
        if number < 12:
            assert main(["--quiet", *words]) == 0
    each = ["sample", "judge", "pairs", "dpo"]
    assert actions == ["eft", "sft", "prompts", *each, "prompts", *each, "run"]
    assert main(["--json", *words[1:]]) == 0
    for name in ("stages.json", "evaluation/metrics.jsonl", "iter_2/model/model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    capsys.readouterr()
    assert command(out, "judge") == 0
    said, words = next_command(capsys)
    assert said.startswith("every stage 'judge' was finished before; next: ") and words[0] == "run"


def test_a_later_stage_runs_what_comes_before_it_and_stops_there(tmp_path, capsys):
    assert command(tmp_path / "run", "prompts", "--json", "model=null", f"m1={PACKAGE / 'tiny/m0'}") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["stage"] == "iter_1/prompts" and said["counts"]["kept"] == 24
    assert shlex.split(said["next"])[3] == "sample"
    assert list(json.loads((tmp_path / "run/stages.json").read_text())) == ["iter_1/prompts"]
    assert command(tmp_path / "other", "eft", "model=null", f"m1={PACKAGE / 'tiny/m0'}") == 2
    assert "a run with m1 has no stage 'eft'" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_the_report_can_be_written_once_more_from_the_files_of_a_run(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    written = {path: path.read_bytes() for path in [*out.glob("report.*"), *out.glob("plots/*")]}
    assert len(written) > 3
    for path in written:
        path.unlink()
    assert main(["report", "--out", str(out)]) == 0
    assert capsys.readouterr().err == f"report: {out / 'report.html'}\n"
    assert {path: path.read_bytes() for path in [*out.glob("report.*"), *out.glob("plots/*")]} == written


def test_the_report_of_a_run_that_is_not_finished_says_so(tmp_path, capsys):
    out = tmp_path / "run"
    m1 = ["model=null", f"m1={PACKAGE / 'tiny/m0'}"]
    assert command(out, *m1, "gates.min_pairs=1000") == 3
    stopped = json.loads((out / "report.json").read_text())
    assert main(["report", "--out", str(out)]) == 0
    assert json.loads((out / "report.json").read_text()) == stopped and "gates.min_pairs" in stopped["stopped"]
    assert command(out, *m1, "pairs") == 0
    assert main(["report", "--out", str(out)]) == 0
    later = json.loads((out / "report.json").read_text())
    assert "the run is not finished" in later["stopped"] and "iter_1/pairs" in later["stages"]


@pytest.mark.parametrize("gone", [False, True])
def test_the_report_is_of_what_the_stages_wrote(gone, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "iter_1/model")  # the report needs no models
    assert main(["report", "--out", str(out)]) == 0
    file = out / "iter_1/pairs.jsonl"
    file.unlink() if gone else file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[1:]))
    written = (out / "report.json").read_bytes()
    capsys.readouterr()
    assert main(["report", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"{file} {'is missing' if gone else 'was changed'}" in said and "'iter_1/pairs'" in said
    assert (out / "report.json").read_bytes() == written


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", "seed=1"], "leave 'seed=1' out"),
        (["report", "--recipe", "tiny"], "leave '--recipe' out"),
        (["report"], "holds no run"),
    ],
)
def test_the_report_takes_a_run_and_nothing_else(words, said, tmp_path, capsys):
    assert main([*words, "--out", str(tmp_path / "nowhere")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "nowhere").exists()


def test_replay_without_judge_data_is_a_gate(tmp_path, capsys):
    few = ["data.eft_limit=1", "eft.attempts=1", "dpo.replay_weight=1"]
    assert command(tmp_path / "run", *few) == 3
    assert "dpo.replay_weight=0" in capsys.readouterr().err


def test_replay_of_judge_data_that_is_all_too_long_is_a_gate_before_the_first_round(tmp_path, capsys):
    assert command(tmp_path / "run", "dpo.replay_weight=1", "dpo.max_pack_tokens=18") == 3
    err = capsys.readouterr().err
    assert re.search(r"all \d+ rows of judge data are longer than dpo.max_pack_tokens \(18\): raise it", err)
    assert not (tmp_path / "run/iter_1").exists()


def test_judge_data_that_no_forward_pass_takes_is_left_out_and_counted(tmp_path, capsys):
    long = ["sft.max_pack_tokens=18", "data.max_tokens=18", "gates.min_pairs=1000"]
    assert command(tmp_path / "run", *long) == 3
    counts = json.loads((tmp_path / "run/stages.json").read_text())
    assert counts["m1/model"]["eft_too_long"] > 0
    assert counts["m1/model"].get("eft", 0) + counts["m1/model"]["eft_too_long"] == counts["eft"]["train"]


def test_changed_weights_data_and_threads_are_refused_with_the_difference(tmp_path, capsys):
    package, out = Path(run_module.__file__).parent, tmp_path / "out"
    shutil.copytree(package / "tiny/m0", tmp_path / "m0")
    shutil.copy(package / "tiny/data/ift.jsonl", tmp_path / "ift.jsonl")
    given = [f"model={tmp_path / 'm0'}", f"data.ift={tmp_path / 'ift.jsonl'}", "gates.min_pairs=1000"]
    assert command(out, *given) == 3
    weights = load_file(tmp_path / "m0/model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, tmp_path / "m0/model.safetensors", metadata={"format": "pt"})
    with (tmp_path / "ift.jsonl").open("a") as file:
        file.write('{"prompt": "copy a", "response": "a"}\n')
    capsys.readouterr()
    other = torch.get_num_threads() + 1
    try:
        assert command(out, *given, f"threads={other}") == 2
    finally:
        torch.set_num_threads(other - 1)
    said = capsys.readouterr().err
    for difference in (
        "models.model is ",
        "inputs.data.ift is ",
        f"training_threads is {other - 1} there, {other} here",
    ):
        assert difference in said


def test_inputs_may_move_as_long_as_they_hold_the_same(tmp_path, capsys):
    package, out = Path(run_module.__file__).parent, tmp_path / "out"
    for place in ("here", "there"):
        shutil.copytree(package / "tiny/m0", tmp_path / place / ("m0" if place == "here" else "base"))
        shutil.copy(package / "tiny/data/ift.jsonl", tmp_path / place)

    def given(model, ift):
        return [f"model={tmp_path / model}", f"data.ift={tmp_path / ift}", "gates.min_pairs=1000"]

    assert command(out, *given("here/m0", "here/ift.jsonl")) == 3
    shutil.rmtree(tmp_path / "here")
    capsys.readouterr()
    assert command(out, *given("there/base", "there/ift.jsonl")) == 3
    shutil.copy(tmp_path / "there/ift.jsonl", tmp_path / "seed.jsonl")
    capsys.readouterr()
    assert command(out, *given("there/base", "seed.jsonl")) == 2  # rows without an id are named after their file
    assert 'recipe.data.ift is "ift.jsonl" there, "seed.jsonl" here' in capsys.readouterr().err
    assert command(out, *given("there/base", "there/ift.jsonl"), "data.eft_heldout=null") == 2
    assert "recipe.data.eft_heldout" in capsys.readouterr().err


def test_a_bad_row_and_a_truncated_checkpoint_are_named(tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "copy a b c", "response": "a b c"}\n{"prompt": true, "response": "x"}\n')
    assert command(tmp_path / "a", f"data.ift={bad}") == 2
    assert "bad.jsonl:2" in capsys.readouterr().err
    source = Path(run_module.__file__).parent / "tiny/m0"
    model = tmp_path / "m0"
    model.mkdir()
    for path in source.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    assert command(tmp_path / "b", f"model={model}") == 2
    assert "model.safetensors is truncated or corrupt" in capsys.readouterr().err
