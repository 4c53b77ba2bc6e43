"""What `validate` prints is what a run would do with the files, and everything that is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import Tokenizer
from selfreward.context import Run
from selfreward.recipe import Recipe
from selfreward.run import main
from selfreward.training import ift_examples
from selfreward.validate import masked, spread

NOTHING: Any = None


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def validated(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main(["validate", "--json", *words]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["usable"] == (code == 0)
    return {part["part"]: part for part in found["parts"]}


IFT = [
    {"prompt": "copy a b c", "response": "a b c"},
    {"messages": [{"role": "user", "content": "copy a b c d e f g"}, {"role": "assistant", "content": "a"}]},
    {"instruction": "copy a", "input": "b c", "output": "a b c d e f g a b c d"},
    {"prompt": "COPY  a b c", "response": "a"},
]


def test_counts_lengths_and_truncations_are_those_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "ift.jsonl", *IFT)
    words = [f"data.ift={file}", "data.ift_limit=null", "data.max_tokens=11", "gates.min_pairs=1"]
    part = validated(capsys, *words)["data.ift"]
    recipe = Recipe.load("tiny", words)
    tokenizer = Tokenizer(recipe.model)
    _, counts = ift_examples(Run(recipe, NOTHING, tokenizer, NOTHING, NOTHING))
    assert (part["used"] - part["prompt_too_long"], part["cut"]) == (counts["ift"], counts["ift_cut"]) == (3, 1)
    assert part["prompt_too_long"] == counts["ift_prompt_too_long"] == 1
    assert part["formats"] == {"prompt_completion": 2, "messages": 1, "alpaca": 1} and part["refused"] == {}
    assert (part["duplicate_prompts"], part["same_prompt_and_answer"]) == (2, 0)
    prompt, answer = part["example"]["shown"]
    assert prompt == [False, "<s>[INST] copy a b c [/INST]"] and answer == [True, "a b c</s>"]
    assert part["tokens"]["prompt"]["all"] == sum(
        len(tokenizer.chat_prompt(prompt))
        for prompt in ("copy a b c", "copy a b c d e f g", "copy a\nb c", "COPY  a b c")
    )


def test_everything_that_is_wrong_is_listed_and_the_code_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "ift.jsonl", *IFT, {"prompt": True, "response": "a"}, {"odd": 1}, "text")
    (tmp_path / "eft.jsonl").write_text("no JSON\n")
    words = [f"data.ift={file}", f"data.eft={tmp_path / 'eft.jsonl'}", "data.ift_limit=null"]
    parts = validated(capsys, *words, code=2)
    found = [error.removeprefix(str(tmp_path)) for error in parts["data.ift"]["errors"]]
    assert [error.split(";")[0] for error in found] == [
        "/ift.jsonl:5: 'prompt' is the boolean true",
        "/ift.jsonl:6: the row is an object with the keys odd, a format that is not read",
        "/ift.jsonl:7: the row has a prompt and no answer",
    ]
    assert parts["data.eft"]["errors"][0].startswith(f"{tmp_path}/eft.jsonl:1: not JSON at column 1")
    assert parts["data.heldout"]["errors"] == []
    assert main(["validate", *words]) == 2
    text = capsys.readouterr().out
    assert "rows 7 (alpaca 1, messages 1, none 1, prompt_completion 3, text 1), refused: no_answer 1, unknown" in text
    assert "    error: " in text


def test_prompts_that_two_parts_share_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [{"text": "a", "rank": 0}, {"text": "b", "rank": 1}]
    write(tmp_path / "eft.jsonl", *({"prompt": p, "answers": answers} for p in ("copy a", "copy b")))
    write(tmp_path / "ift.jsonl", {"prompt": "Copy a", "response": "a"})
    parts = validated(capsys, f"data.ift={tmp_path / 'ift.jsonl'}", f"data.eft={tmp_path / 'eft.jsonl'}")
    assert parts["data.eft"]["shared"] == {"data.ift": 1} and parts["data.heldout"]["shared"] == {}
    assert (parts["data.eft"]["answers"], parts["data.eft"]["ranked_pairs"], parts["data.eft"]["longer_wins"]) == (
        4,
        2,
        0.5,
    )


def test_the_shipped_data_is_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    parts = validated(capsys)
    assert list(parts) == ["data.ift", "data.eft", "data.eft_heldout", "data.heldout"]
    assert main(["validate"]) == 0
    assert "    = " in capsys.readouterr().out


def test_the_open_assistant_trees_in_three_parts(
    test_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *("--recipe", "trial", f"tokenizer={test_data / 'llama2/tokenizer.model'}"),
        *("data.ift_limit=null", "data.eft_limit=null", "evaluation.judge_groups=null"),
        f"data.ranked={test_data / 'oasst/en_100_tree.jsonl'}",
        f"prompts.file={test_data / 'oasst/prompt_lottery_en_250_text.jsonl'}",
    ]
    assert main(["validate", *words]) == 0
    assert "\n\nrows of data.ranked: duplicate 0, eft 15, eft_heldout 5, ift 79\n" in capsys.readouterr().out
    parts = validated(capsys, *words)
    assert [parts[f"data.{key}"]["used"] for key in ("ift", "eft", "eft_heldout")] == [79, 15, 5]
    assert all(not part["shared"] for part in parts.values())
    assert parts["data.ift"]["refused"] == {"no_ranked_reply": 1} and parts["prompts.file"]["formats"] == {"text": 250}
    filters = parts["prompts.file"]["filters"]
    assert (filters["filter"], filters["asked"], filters["rows"]) == ("self_instruct", False, 250)
    assert filters["kept"] + sum(filters["dropped"].values()) == 250
    asked = validated(capsys, *words, "prompts.filter=similar")["prompts.file"]["filters"]
    assert (asked["filter"], asked["asked"], asked["rows"]) == ("similar", True, 250) and asked["kept"] > filters[
        "kept"
    ]
    assert main(["validate", *words]) == 0
    assert (
        f"prompts.filter=self_instruct, which is not asked for, keeps {filters['kept']} of 250; it"
        in capsys.readouterr().out
    )


def test_spread_names_lengths_that_occur() -> None:
    assert spread([7]) == {"least": 7, "median": 7, "p95": 7, "most": 7, "all": 7}
    figures = spread(list(range(1, 101)))
    assert figures == {"least": 1, "median": 51, "p95": 96, "most": 100, "all": 5050}


def test_the_mask_is_shown_as_it_is(tmp_path: Path) -> None:
    tokenizer = Tokenizer(Recipe.load("tiny").model)
    ids = [tokenizer.bos_id, *tokenizer.encode("a b c"), tokenizer.eos_id]
    shown = masked(tokenizer, ids, [False, True, False, True, True])
    assert [on for on, _ in shown] == [False, True, False, True] and shown[-1][1].endswith("</s>")
    assert shown[0] == (False, "<s>")
