"""A model's row of the report, whatever a run has to measure it on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfreward import evaluation
from selfreward.recipe import Recipe


def row(*overrides: str) -> dict[str, Any]:
    run: Any = SimpleNamespace(recipe=Recipe.load("micro", overrides))
    return evaluation.evaluate_model(run, "M1", Path("nowhere"))


def test_a_row_has_the_same_keys_in_every_run_and_nothing_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"token_ids": [1, 2, 3, 4, 2], "grade": 3}, {"token_ids": [1, 2], "grade": 5}]
    monkeypatch.setattr(evaluation, "sample_answers", lambda *given: answers)
    monkeypatch.setattr(
        evaluation,
        "judge_answers",
        lambda run, path, name, groups: ([[1.0] * len(group["answers"]) for group in groups],) * 2,
    )
    full = row()
    assert full["true_quality"] == 4.0 and full["mean_length"] == 3.5 and full["judge_pairwise"] == 0.0
    bare = row(
        "data.heldout=null", "data.eft_heldout=null", "evaluation={oracle: null, greedy: false, judge_groups: null}"
    )
    assert bare.keys() == full.keys()
    counts = {
        "name",
        "true_quality_n",
        *(f"{judge}_{of}" for judge in ("judge", "longer") for of in ("pairs", "groups", "prompts")),
    }
    assert {key for key, value in bare.items() if value is not None} == counts
    assert all(bare[key] == 0 for key in counts - {"name"})
