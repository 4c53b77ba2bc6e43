"""The human data of a run: three parts of one file share nothing, and what became of every row is counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import InputError
from selfreward.eft import agrees
from selfreward.formats import as_example, as_group, read_file
from selfreward.metrics import longer_wins, ranked_pairs
from selfreward.recipe import Recipe
from selfreward.seeds import eft_groups, heldout_groups, ift_rows, known_prompts, same, split, split_file


def trees_recipe(path: Path, *overrides: str) -> Recipe:
    unset = ("ift", "eft", "eft_heldout", "heldout", "ift_limit", "eft_limit")
    parts = [*(f"data.{key}=null" for key in unset), "evaluation.judge_groups=null", "evaluation.oracle=null"]
    return Recipe.load("tiny", [*parts, f"data.ranked={path}", *overrides])


def test_the_open_assistant_trees_step_by_step(test_data: Path) -> None:
    path = test_data / "oasst/en_100_tree.jsonl"
    ranked, best = read_file(path, as_group), read_file(path, as_example)
    assert (ranked.total, len(ranked.rows), ranked.reasons()) == (100, 99, {"no_ranked_reply": 1})
    assert (len(best.rows), best.matched) == (99, {"open_assistant": 100})
    assert sum(len(group["answers"]) for group in ranked.rows) == 330
    assert len(ranked_pairs(ranked.rows)) == 438
    assert longer_wins(ranked.rows) == pytest.approx(0.671, abs=5e-4)
    seeds = split_file(trees_recipe(path))
    assert seeds.counts == {"ift": 79, "eft": 15, "eft_heldout": 5, "duplicate": 0}


def test_training_held_out_and_instructions_share_nothing(test_data: Path) -> None:
    recipe = trees_recipe(test_data / "oasst/en_100_tree.jsonl", "data.split=[0.4, 0.2]")
    ift, eft, heldout = ift_rows(recipe), eft_groups(recipe), heldout_groups(recipe)
    assert (len(ift), len(eft), len(heldout)) == (39, 40, 20)
    for what in (lambda row: row["id"], lambda row: same(row["prompt"])):
        sets = [{what(row) for row in part} for part in (ift, eft, heldout)]
        assert sum(map(len, sets)) == len(set.union(*sets)) == 99
    judged = {answer["text"] for group in (*eft, *heldout) for answer in group["answers"]}
    assert not judged & {row["response"] for row in ift}
    assert known_prompts(recipe) == {row["prompt"].strip() for row in (*ift, *eft, *heldout)}


def test_any_ranked_format_divides_and_the_limits_hold(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"copy {i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = trees_recipe(
        path, "data.split=[0.5, 0.25]", "data.ift_limit=3", "data.eft_limit=2", "evaluation.judge_groups=1"
    )
    assert [len(part) for part in (ift_rows(recipe), eft_groups(recipe), heldout_groups(recipe))] == [3, 2, 1]
    assert len(known_prompts(recipe)) == 20


PROMPTS = st.lists(
    st.tuples(st.sampled_from(["a", "A ", "b", "c  d", "C d", "e", "f", "g"]), st.integers(0, 2)), max_size=12
)


@given(rows=PROMPTS, shares=st.sampled_from([(0.15, 0.05), (0.5, 0.4), (0.0, 0.0), (0.0, 0.9)]), seed=st.integers(0, 9))
def test_every_row_goes_to_one_part_and_equal_prompts_to_the_same(
    rows: list[tuple[str, int]], shares: tuple[float, float], seed: int
) -> None:
    answers = {"answers": [{"text": "r", "rank": 0}, {"text": "s", "rank": 1}]}
    examples: list[dict[str, Any]] = [
        {"id": str(i), "prompt": p, "response": "r"} | (answers if n else {}) for i, (p, n) in enumerate(rows)
    ]
    seeds = split(examples, shares, seed)
    parts = [seeds.ift, seeds.eft, seeds.eft_heldout]
    placed = Counter(row["id"] for part in parts for row in part) + Counter(seeds.duplicates)
    assert placed == Counter(row["id"] for row in examples)
    prompts = [same(row["prompt"]) for part in parts for row in part]
    assert len(prompts) == len(set(prompts))
    first = {same(row["prompt"]): row["id"] for row in reversed(examples)}
    n = sum("answers" in examples[int(identity)] for identity in first.values())
    assert (len(seeds.eft), len(seeds.eft_heldout)) == (round(shares[0] * n), round(shares[1] * n))


def test_another_seed_divides_differently_and_the_same_seed_alike(test_data: Path) -> None:
    path = test_data / "oasst/en_100_tree.jsonl"
    ids = [[row["id"] for row in eft_groups(trees_recipe(path, f"seed={seed}"))] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.ift=x.jsonl", "ranked gives ift, eft and eft_heldout, and ift is set too"),
        ("data.split=[0.5, 0.5]", r"split is \[0.5, 0.5\], which leaves nothing for ift"),
        ("data.split=[0.5]", r"data.split: found .*expected a list of two shares"),
        ("data.split=[0.5, 2]", "data.split: found 2; expected a list of two shares"),
        ("data.format.ranked=csv", "ranked is 'csv', which is not read; use one of text, open_assistant"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(override: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "trees.jsonl").write_text("{}")
    with pytest.raises(InputError, match=message):
        trees_recipe(tmp_path / "trees.jsonl", override)
    with pytest.raises(InputError, match="split says how `ranked` is divided, which is not set"):
        Recipe.load("tiny", ["data.split=[0.3, 0.1]"])


def test_agreement_is_the_order_of_the_ranks() -> None:
    assert agrees([5.0, 3.0, 3.0], [0, 1, 1]) is None
    assert agrees([3.0, 3.0], [0, 1]) == "tie" and agrees([2.0, 3.0], [0, 1]) == "order"


def test_prompts_that_differ_in_case_or_blanks_are_one_and_the_first_row_has_it() -> None:
    rows = [{"id": str(i), "prompt": p, "response": "r"} for i, p in enumerate(("Why ?", "why\n  ?", "why?", "WHY ? "))]
    seeds = split(rows, (0.15, 0.05), seed=0)
    assert [row["id"] for row in seeds.ift] == ["0", "2"] and seeds.duplicates == ["1", "3"]
