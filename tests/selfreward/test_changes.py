"""Differences from model to model, paired by prompt, against values worked out by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from selfreward import changes
from selfreward.changes import judging_change, quality_change
from selfreward.metrics import judge_change, judge_figures

GROUPS = [
    {"id": str(number), "prompt": f"p{number % 3}", "answers": [{"text": "a", "rank": 0}, {"text": "b", "rank": 1}]}
    for number in range(6)
]
RIGHT, TIE, WRONG, UNREAD = [5.0, 1.0], [3.0, 3.0], [1.0, 5.0], [None, 2.0]


def test_judging_changes_by_what_is_decided_otherwise() -> None:
    before, after = [RIGHT, RIGHT, WRONG, TIE, WRONG, UNREAD], [RIGHT, TIE, RIGHT, RIGHT, WRONG, TIE]
    found = judge_change(GROUPS, after, before)
    assert found["change"] == pytest.approx((0 - 0.5 + 1 + 0.5 + 0 + 0.5) / 6)
    low, high = found["change_interval"]
    assert low <= found["change"] <= high
    both = [judge_figures(GROUPS, scores)["pairwise_ties_half"] for scores in (after, before)]
    assert found["change"] == pytest.approx(both[0] - both[1])


def test_what_is_hard_for_both_is_no_doubt_about_the_change() -> None:
    """Two judges that differ in nothing differ by 0 for certain, however uncertain their accuracy is."""
    scores = [RIGHT, WRONG, TIE, RIGHT, WRONG, WRONG]
    assert judge_change(GROUPS, scores, scores) == {"change": 0.0, "change_interval": None}
    assert judge_figures(GROUPS, scores)["pairwise_ties_half_interval"] is not None


def test_groups_without_an_order_are_left_out() -> None:
    alike = [{"id": "x", "prompt": "x", "answers": [{"text": "a", "rank": 0}, {"text": "b", "rank": 0}]}]
    assert judge_change(alike, [RIGHT], [WRONG]) == {"change": None, "change_interval": None}
    assert judge_change(alike + GROUPS, [WRONG] + [RIGHT] * 6, [RIGHT] + [WRONG] * 6)["change"] == 1.0


def test_quality_is_paired_by_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    grades = {"M0": [1, 2, 3, 4], "SFT": [2, 3, 4, 5], "M1": [2, 4, 4, 5]}
    files = {f"evaluation/{name}/answers.jsonl": [{"grade": g} for g in each] for name, each in grades.items()}
    run: Any = SimpleNamespace(rows=files.__getitem__, recipe=None)
    models = [{"name": name, "true_quality_n": 4} for name in grades]
    found = quality_change(run, models)
    assert found[0] == {"true_quality_change": None, "true_quality_change_se": None}
    assert found[1] == {"true_quality_change": 1.0, "true_quality_change_se": 0.0}
    assert found[2]["true_quality_change"] == 0.25
    assert found[2]["true_quality_change_se"] == pytest.approx(np.std([0, 1, 0, 0], ddof=1) / 2)
    ungraded = [{"name": name, "true_quality_n": 0} for name in grades]
    assert all(row["true_quality_change"] is None for row in quality_change(run, ungraded))
    monkeypatch.setattr(changes, "heldout_groups", lambda recipe: [])
    assert all(row == {"judge_change": None, "judge_change_interval": None} for row in judging_change(run, models))
