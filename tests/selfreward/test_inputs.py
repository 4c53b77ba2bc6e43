"""What a run is given and cannot use, or can use less of than one might think, is said before anything is computed."""

import json

import pytest

from selfreward.recipe import PACKAGE
from selfreward.run import main

DATA = PACKAGE / "tiny/data"
STOP = ["gates.min_pairs=1000000", "prompts.count=8", "data.eft_limit=12", "evaluation.prompts=5", "rounds=1"]


def said(capsys, out, *more, code=2):
    """What the command prints to standard error."""
    assert main(["--quiet", "--out", str(out), *STOP, *more]) == code
    assert code != 2 or not out.exists()
    return capsys.readouterr().err


def ranked(path, ranks):
    """A file of ranked answers, a group for each tuple of ranks."""
    groups = [
        {"prompt": f"copy {'abcdef'[i]} b", "answers": [{"text": "a b", "rank": rank} for rank in group]}
        for i, group in enumerate(ranks)
    ]
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    return path


@pytest.mark.parametrize("key", ["ift", "eft", "heldout"])
def test_a_file_in_words_that_the_tokenizer_does_not_know_is_refused(key, tmp_path, capsys):
    row = {"prompt": "Wer malte das Bild?", "response": "Das war Vermeer."}
    row["answers"] = [{"text": "Das war Vermeer.", "rank": 0}, {"text": "Niemand", "rank": 1}]
    (tmp_path / "german.jsonl").write_text(json.dumps(row))
    err = said(capsys, tmp_path / "out", f"data.{key}={tmp_path / 'german.jsonl'}")
    assert "german.jsonl: " in err and " are unknown to " in err and "first 'Wer' in german-1; give text" in err
    assert len(err.splitlines()) == 1 and err.startswith("error: ")


def test_a_few_unknown_words_are_counted_and_said_once(tmp_path, capsys):
    lines = (DATA / "ift.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ift.jsonl").write_text("".join(lines[:10]) + '{"prompt": "copy a zebra", "response": "a"}\n')
    err = said(capsys, tmp_path / "out", f"data.ift={tmp_path / 'ift.jsonl'}", code=3)
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "ift.jsonl: 1 of " in warning and "first 'zebra' in ift-11; the model sees <unk> there" in warning


def test_a_tokenizer_without_the_digits_is_refused_before_expected_scores_need_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("selfreward.expected.SCORES", range(7))
    for judge in ([], ["judge_model=package:tiny/m0"]):
        err = said(capsys, tmp_path / "out", "judge.score=expected", *judge)
        assert "judge.score is 'expected', and " in err and "has no token for 6: set it to mean" in err


def test_a_template_of_the_judge_model_is_read_before_it_is_needed(tmp_path, capsys):
    keys = ["judge_model=package:tiny/m0", "judge.model_template=lama2"]
    assert "judge template 'lama2' is not shipped" in said(capsys, tmp_path / "out", *keys)
    assert "judge template 'lama2' is not shipped" in said(capsys, tmp_path / "out", "validate", *keys)


def test_a_template_that_the_tokenizer_does_not_know_is_refused(tmp_path, capsys):
    err = said(capsys, tmp_path / "out", "judge.template=llama2")
    assert "judge_llama2.jinja: " in err and "in the rubric" in err


def few_shot(tmp_path, *more):
    (tmp_path / "tiny.jinja").write_text("{% for i in instructions %}[INST] {{ i }} [/INST] {% endfor %}[INST]\n")
    return ["prompts.mode=few_shot", f"prompts.template={tmp_path / 'tiny.jinja'}", "prompts.filter=none", *more]


def test_too_few_instructions_to_show_are_refused(tmp_path, capsys):
    lines = (DATA / "ift.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ift.jsonl").write_text("".join([*lines[:4], lines[0].replace("ift-", "again-")]))
    err = said(
        capsys, tmp_path / "out", *few_shot(tmp_path), f"data.ift={tmp_path / 'ift.jsonl'}", "data.ift_limit=null"
    )
    assert "ift.jsonl has 4 different instructions of at most 150 words, and prompts.shots_seed is 6; give more" in err


def test_shots_without_room_are_refused_and_scarce_room_is_said(tmp_path, capsys):
    err = said(capsys, tmp_path / "out", *few_shot(tmp_path, "prompts.shots_seed=20"))
    assert "above the context of 128; lower prompts.shots_seed and prompts.shots_generated" in err
    assert main(["validate", "--json", *few_shot(tmp_path, "prompts.count=8", "prompts.max_tokens=60")]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith("8 of the instructions of ")
    assert "prompts.max_tokens is 60 and the context 128: what has no room is cut or left out" in warning


def test_a_prompts_template_that_the_tokenizer_does_not_know_is_refused(tmp_path, capsys):
    err = said(capsys, tmp_path / "out", "prompts.mode=few_shot", "prompts.filter=none")
    assert "prompts_chat.jinja: " in err and "are unknown to " in err


def test_a_prompts_template_may_name_single_instructions(tmp_path, capsys):
    (tmp_path / "two.jinja").write_text(
        "[INST] {{ instructions[0] }} [/INST] [INST] {{ instructions | last }} [/INST] [INST]"
    )
    words = ["prompts.mode=few_shot", f"prompts.template={tmp_path / 'two.jinja'}", "prompts.filter=none"]
    assert main(["validate", "--json", *words, "prompts.count=8", "prompts.max_tokens=9"]) == 0
    assert json.loads(capsys.readouterr().out)["usable"]


def test_a_prompt_model_with_too_few_embeddings_is_refused(tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((PACKAGE / "tiny/m0/config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 9}))
    (other / "model.safetensors").symlink_to(PACKAGE / "tiny/m0/model.safetensors")
    err = said(capsys, tmp_path / "out", f"prompt_model={other}")
    assert f"prompt_model ({other}) 9 embeddings: they do not belong together" in err


def test_lengths_beyond_the_context_are_said(tmp_path, capsys):
    err = said(capsys, tmp_path / "out", "candidates.max_tokens=500", "judge.max_tokens=128", code=3)
    assert "warning: candidates.max_tokens is 500, above the model's context of 128 tokens: longer texts are cut" in err


@pytest.mark.parametrize("key", ["eft", "eft_heldout"])
def test_ranks_that_say_nothing_are_refused(key, tmp_path, capsys):
    path = ranked(tmp_path / "tied.jsonl", [(0, 0), (3, 3, 3)])
    err = said(capsys, tmp_path / "out", f"data.{key}={path}")
    assert "tied.jsonl: in each of the 2 groups all answers have the same rank" in err
    assert f"or set data.{key} to null" in err


def test_groups_of_one_rank_among_others_are_counted(tmp_path, capsys):
    path = ranked(tmp_path / "some.jsonl", [(0, 1), (0, 0), (1, 0)])
    err = said(capsys, tmp_path / "out", f"data.eft={path}", "eft.required=false", code=3)
    assert (
        "warning: " in err
        and "some.jsonl: 1 of 3 groups are of no use, first some-2: their answers have one rank" in err
    )


def test_prompts_that_are_trained_on_and_measured_on_are_said(tmp_path, capsys):
    (first, *rest) = (DATA / "heldout.jsonl").read_text().splitlines(keepends=True)
    prompt = json.loads(first)["prompt"]
    (tmp_path / "heldout.jsonl").write_text("".join([first, *rest[:9]]))
    lines = (DATA / "ift.jsonl").read_text().splitlines(keepends=True)[:8]
    row = json.dumps({"prompt": prompt.replace(" ", "  "), "response": "a"})
    (tmp_path / "ift.jsonl").write_text("".join(lines) + row + "\n")
    given = [f"data.heldout={tmp_path / 'heldout.jsonl'}", f"data.ift={tmp_path / 'ift.jsonl'}"]
    assert main(["validate", "--json", *given]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert warnings == ["1 prompts of data.ift are in data.heldout too; keep them apart"]


def test_a_division_without_judge_data_is_refused(tmp_path, capsys):
    path = ranked(tmp_path / "few.jsonl", [(0, 1), (1, 0)])
    unset = [f"data.{key}=null" for key in ("ift", "eft", "eft_heldout", "eft_limit")]
    err = said(capsys, tmp_path / "out", *unset, f"data.ranked={path}")
    assert "few.jsonl: a share of 0.15 of its prompts with ranks is no judge data at all; raise the first number" in err
