"""Which prompts a round takes: new ones, well-formed ones, and no more than asked for."""

import json

import pytest

from engine import InputError
from selfreward.prompts import choose, take_prompts, usable_prompts
from selfreward.recipe import Recipe


def attempt(number, text, finish="stop"):
    return {"id": f"1-{number}", "text": text, "finish_reason": finish}


def test_every_attempt_is_kept_or_dropped_for_one_reason():
    texts = ["a", "old", "a", "", "bad", "b", "c"]
    attempts = [attempt(i, text) for i, text in enumerate(texts)] + [attempt(7, "d", "length")]
    rows, dropped = choose(attempts, 9, {"old"}, lambda text: text != "bad")
    assert rows == [{"id": f"1-{i}", "prompt": text} for i, text in ((0, "a"), (5, "b"), (6, "c"))]
    assert dropped == {"duplicate": 2, "invalid": 2, "truncated": 1}
    assert len(rows) + sum(dropped.values()) == len(attempts)


def test_what_comes_after_enough_is_counted_as_such():
    rows, dropped = choose([attempt(i, f"p{i}") for i in range(5)], 3, set(), bool)
    assert [row["prompt"] for row in rows] == ["p0", "p1", "p2"] and dropped == {"enough": 2}


def test_a_choice_from_more_attempts_begins_with_the_choice_from_fewer():
    attempts = [attempt(i, f"p{i % 7}") for i in range(20)]
    assert choose(attempts, 9, set(), bool)[0][:4] == choose(attempts[:4], 9, set(), bool)[0]


def test_every_prompt_of_a_file_is_usable_once_or_dropped_for_a_reason():
    pool = [{"id": str(i), "prompt": text} for i, text in enumerate(["x ", "old", "x", "bad", "z"])]
    rows, dropped = usable_prompts(pool, {"old"}, lambda text: text != "bad")
    assert rows == [{"id": "0", "prompt": "x"}, {"id": "4", "prompt": "z"}]
    assert dropped == {"known": 1, "duplicate": 1, "invalid": 1}


@pytest.fixture
def plain(tmp_path):
    """A recipe whose prompts come from a file."""

    def make(texts, *overrides):
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(text) + "\n" for text in texts))
        data = Recipe.load("micro").data
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: package:tiny/m0\ndata: {{ift: {data.ift}}}\neft: {{required: false}}\n"
            "prompts: {mode: file, file: prompts.jsonl}\n"
        )
        return Recipe.load(recipe, overrides)

    return make


@pytest.mark.parametrize(("override", "share"), [("rounds=2", 3), ("prompts.count=2", 2)])
def test_every_round_takes_its_own_share_of_a_file(plain, override, share):
    run = plain([f"p{i}" for i in range(7)], override)
    first, second = (take_prompts(run, k, {"p0"})[0] for k in (1, 2))
    assert [row["prompt"] for row in first + second] == [f"p{i}" for i in range(1, 1 + 2 * share)]
    assert first[0]["id"] == "1-prompts-2" and second[0]["id"].startswith("2-")


@pytest.mark.parametrize("override", ["rounds=8", "prompts.count=4"])
def test_a_file_with_too_few_prompts_is_refused_before_anything_is_computed(plain, override):
    with pytest.raises(InputError, match=r"prompts\.jsonl has 6 usable prompts \(known 1: in seed or held-out data\)"):
        take_prompts(plain([f"p{i}" for i in range(7)], override), 1, {"p0"})
