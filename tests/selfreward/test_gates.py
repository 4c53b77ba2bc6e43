"""A round stops where it makes no sense to go on, and says what to do; at the bound itself it goes on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfreward.context import GateError, Run
from selfreward.gates import check_judgements, length_drift
from selfreward.recipe import Recipe

NOTHING: Any = None


@pytest.fixture
def run_with():
    def build(*gates: str) -> Run:
        recipe = Recipe.load("tiny", list(gates))
        run = Run(recipe, SimpleNamespace(file=Path), NOTHING, NOTHING, NOTHING)  # type: ignore[arg-type]
        run.rows = {"iter_1/candidates.jsonl": [{"token_ids": [0] * n} for n in (2, 4)]}.__getitem__  # type: ignore
        return run

    return build


def judged(*scores: float | None, copies: int = 0) -> list[dict[str, Any]]:
    read = [(score, "no_score" if score is None else "ok") for score in scores] + [(None, "duplicate")] * copies
    return [{"candidate_id": "p-0", "score": score, "status": status} for score, status in read]


def test_unreadable_judgements_stop_a_round_below_the_floor(run_with) -> None:
    check_judgements(run_with(), 1, judged(None, 1.0, None, 3.0))
    check_judgements(run_with(), 1, judged(None, 1.0, None, 3.0, copies=9))  # what was not asked for is not counted
    with pytest.raises(GateError, match=r"round 1: 33.3% of 3 judgements are readable \(no score 2, ok 1\), .* 50%"):
        check_judgements(run_with(), 1, judged(None, 3.0, None, copies=5))
    with pytest.raises(GateError, match=r"0\.0% of 2"):
        check_judgements(run_with(), 1, judged(None, None))


def test_a_judge_of_one_score_stops_a_round(run_with) -> None:
    nearly = judged(*[4.0] * 24, 3.0)  # 0.242 bits
    check_judgements(run_with(), 2, judged(*[4.0] * 22, 3.0))  # 0.258 bits
    with pytest.raises(GateError, match=r"round 2: the judge gives nearly one score only \(3: 1, 4: 24; 0.24 bits"):
        check_judgements(run_with(), 2, nearly)
    with pytest.raises(GateError, match=r"0\.00 bits"):
        check_judgements(run_with(), 2, judged(4.0, 4.0))
    check_judgements(run_with("gates.min_score_entropy=0"), 2, judged(4.0, 4.0))


def test_answers_that_grow_too_long_stop_a_round(run_with) -> None:
    assert length_drift(run_with(), 1, [100]) is None
    assert length_drift(run_with(), 2, [9, 9]) == 3.0
    with pytest.raises(
        GateError, match=r"9.5 tokens on average, 3.17 times those of round 1 \(3.0\), the ceiling is 3"
    ):
        length_drift(run_with(), 2, [9, 10])
    assert length_drift(run_with("gates.max_length_drift=4"), 2, [9, 10]) == pytest.approx(9.5 / 3)
