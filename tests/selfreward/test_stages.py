"""What single stages do with odd rows; the loop as a whole is in test_run."""

from types import SimpleNamespace
from typing import Any

import pytest

from engine import Tokenizer
from selfreward import stages
from selfreward.context import GateError, Run
from selfreward.recipe import Recipe

NOTHING: Any = None  # the parts of a run that these stages do not touch


@pytest.fixture
def judged_round(tmp_path):
    """A run whose round 1 has two prompts with four judged answers each: `build(*overrides)` makes its pairs."""

    def build(*overrides, agree=True):
        recipe = Recipe.load("tiny", ["gates.min_pairs=1", *overrides])
        files, counts = {}, {}
        names = ("prompts", "candidates", "judgements")
        data = {f"iter_1/{name}.jsonl": [] for name in names}
        for p in ("p", "q"):
            data["iter_1/prompts.jsonl"].append({"id": p, "prompt": "copy a"})
            for i, score in enumerate((5.0, 4.0, 2.0, 1.0)):
                row = {
                    "id": f"{p}-{i}",
                    "prompt_id": p,
                    "prompt": "copy a",
                    "index": i,
                    "text": f"a{i}",
                    "finish_reason": "stop",
                }
                data["iter_1/candidates.jsonl"].append(row | {"token_ids": [9] * (4 - i)})
                for draw in range(3):
                    value = score if agree or draw == 0 else 6 - score
                    data["iter_1/judgements.jsonl"].append(
                        {
                            "id": f"{p}-{i}-{draw}",
                            "candidate_id": f"{p}-{i}",
                            "draw": draw,
                            "score": value,
                            "status": "ok",
                        }
                    )
        directory = SimpleNamespace(write_jsonl=files.__setitem__, file=lambda name: tmp_path / name)
        run = Run(recipe, directory, Tokenizer(recipe.model), NOTHING, NOTHING)
        run.rows = data.__getitem__
        counts = stages.build_pairs(run, 1)
        return counts, files

    return build


def test_every_pair_that_a_prompt_may_have_is_a_row(judged_round):
    counts, files = judged_round("pairs.per_prompt=3")
    assert counts == {"prompts": 2, "pairs": 4, "dropped": {"no_more": 2}}
    assert [row["id"] for row in files["iter_1/pairs.jsonl"]] == ["p", "p+2", "q", "q+2"]
    assert [row["id"] for row in files["iter_1/dropped.jsonl"]] == ["p+3", "q+3"]


def test_length_control_takes_the_rounds_own_rho(judged_round):
    chosen = {}
    for rho in ("null", "[0.3, 0.0]", "[0.0, 0.3]", "0.3"):
        _, files = judged_round(f"pairs.length_control={rho}")
        chosen[rho] = [(row["chosen_index"], row["rejected_index"]) for row in files["iter_1/pairs.jsonl"]]
    assert chosen["null"] == chosen["[0.0, 0.3]"] == [(0, 3)] * 2
    assert chosen["[0.3, 0.0]"] == chosen["0.3"] == [(1, 2)] * 2


def test_consistency_is_measured_or_stops_the_round(judged_round):
    counts, _ = judged_round("pairs.consistency=true")
    assert counts["consistency"] == 1.0
    with pytest.raises(GateError, match=r"no more alike than by chance \(consistency 0.33 of 2 pairs\)"):
        judged_round("pairs.consistency=true", agree=False)
