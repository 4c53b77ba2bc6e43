"""What is odd in a run is said, once, where it is beyond its bound; a sound run has nothing to say."""

from typing import Any

import pytest

from selfreward.health import model_warnings, round_warnings

SOUND: dict[str, Any] = {
    "round": 2,
    "prompts_kept": 100,
    "prompts_dropped": {"duplicate": 50, "known": 50, "enough": 900, "malformed": 5},
    "answers_cut": 0.1,
    "answer_diversity": 0.2,
    "statuses": {"ok": 90, "no_score": 10, "duplicate": 500},
    "pairs": 50,
    "pairs_dropped": {"tie": 50},
    "length_chosen": 12.5,
    "length_rejected": 10.0,
    "length_gap": 2.5,
    "length_gap_se": 0.1,
}
UNKNOWN = dict.fromkeys(SOUND) | {"round": 1, "prompts_kept": 3}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts_dropped": {"duplicate": 60, "similar": 46}}, "106 of 206 new prompts repeat others"),
        ({"answers_cut": 0.11}, "11% of the answers were cut at candidates.max_tokens"),
        ({"answer_diversity": 0.19}, "mostly one text (variety 19%)"),
        ({"statuses": {"ok": 89, "no_score": 11, "duplicate": 500}}, "11% of the judgements cannot be read"),
        ({"pairs_dropped": {"tie": 51}}, "51 of 100 prompts have no pair because all answers have one score"),
        ({"length_chosen": 12.6}, "chosen answers are 1.26 times as long"),
    ],
)
def test_each_figure_of_a_round_at_its_bound_and_beyond(change: dict[str, Any], said: str) -> None:
    assert round_warnings(SOUND) == [] and round_warnings(UNKNOWN) == []
    (sentence,) = round_warnings(SOUND | change)
    assert sentence.startswith("round 2: ") and said in sentence


def test_a_gap_in_length_within_its_error_is_none() -> None:
    assert round_warnings(SOUND | {"length_chosen": 20.0, "length_gap": 10.0, "length_gap_se": 5.0}) == []
    assert len(round_warnings(SOUND | {"length_chosen": 20.0, "length_gap": 10.0, "length_gap_se": 4.9})) == 1


def rows(**last: Any) -> list[dict[str, Any]]:
    judge = {"judge_pairwise_ties_half": 0.8, "judge_pairwise_ties_half_interval": [0.75, 0.85], "longer_wins": 0.67}
    sound = judge | {"previous_win_minus_loss": -0.1, "previous_win_minus_loss_se": 0.05, "repetition": 0.3}
    sound |= {"previous_win": 0.2, "previous_loss": 0.3}
    return [{"name": "M0", "judge_pairwise_ties_half": 0.5, "longer_wins": 0.67}] + [
        {"name": name, **sound, **(last if name == "M3" else {})} for name in ("SFT", "M1", "M2", "M3")
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"longer_wins": 0.8},
            "M3 orders 80.0% of the ranked pairs rightly (ties half), the longer answer alone 80.0%",
        ),
        ({"judge_pairwise_ties_half": 0.74}, "M3 judges worse than M1 (74.0%"),
        ({"previous_win_minus_loss": -0.11}, "M3 loses to the model before it (20% won, 30% lost)"),
        ({"repetition": 0.31}, "M3's answers repeat themselves (31%"),
    ],
)
def test_each_figure_of_a_model_at_its_bound_and_beyond(change: dict[str, Any], said: str) -> None:
    assert model_warnings(rows()) == [] and model_warnings([]) == [] and model_warnings([{"name": "M2"}]) == []
    (sentence,) = model_warnings(rows(**change))
    assert said in sentence
