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
    assert round_warnings(SOUND, {}) == [] and round_warnings(UNKNOWN, {}) == []
    (sentence,) = round_warnings(SOUND | change, {})
    assert sentence.startswith("round 2: ") and said in sentence


def test_a_gap_in_length_within_its_error_is_none() -> None:
    assert round_warnings(SOUND | {"length_chosen": 20.0, "length_gap": 10.0, "length_gap_se": 5.0}, {}) == []
    assert len(round_warnings(SOUND | {"length_chosen": 20.0, "length_gap": 10.0, "length_gap_se": 4.9}, {})) == 1


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
    assert all(model_warnings(few, {}) == [] for few in (rows(), [], [{"name": "M2"}]))
    (sentence,) = model_warnings(rows(**change), {})
    assert said in sentence


@pytest.mark.parametrize(
    ("change", "recipe", "said"),
    [
        ({"prompts_dropped": {"duplicate": 106}}, {"prompts": {"mode": "file"}}, None),
        ({"answers_cut": 1.0}, {"pairs": {"allow_truncated_chosen": True}}, None),
        (
            {"pairs_dropped": {"tie": 51}},
            {"judge": {"score": "mean", "by": "model"}},
            "set judge.score=expected, or raise",
        ),
        (
            {"pairs_dropped": {"tie": 51}},
            {"judge": {"score": "expected", "by": "model"}},
            "one score; raise judge.draws",
        ),
        ({"pairs_dropped": {"tie": 51}}, {"judge": {"score": "mean", "by": "oracle"}}, "one score; raise judge.draws"),
        ({"length_chosen": 12.6}, {"pairs": {"length_control": None}}, "will grow; set pairs.length_control"),
        ({"length_chosen": 12.6}, {"pairs": {"length_control": 0.1}}, "will grow; raise pairs.length_control"),
        ({"statuses": {"no_score": 1}}, {"judge_model": "/x"}, "give another judge_model or another judge.template"),
        ({"statuses": {"no_score": 1}}, {"m1": "/x"}, "give an m1 that has learned to judge or another"),
        ({"length_chosen": 12.6, "pairs_dropped": {"tie": 51}}, {"method": "positives"}, None),
    ],
)
def test_what_a_round_is_told_has_an_effect_in_its_recipe(
    change: dict[str, Any], recipe: dict[str, Any], said: str | None
) -> None:
    """A prompts.file has its dropped prompts in every round; pairs that are not trained on may tie and be long."""
    found = round_warnings(SOUND | change, recipe)
    assert [said in sentence for sentence in found] == [True] if said else found == []


@pytest.mark.parametrize(
    ("name", "change", "recipe", "said"),
    [
        ("SFT", {"longer_wins": 0.9}, {}, None),  # it has seen no judge data
        ("SFT", {"previous_win_minus_loss": -0.2}, {}, None),
        ("M1", {"previous_win_minus_loss": -0.2}, {}, "give more instructions (data.ift), or lower sft.lr"),
        ("M2", {"previous_win_minus_loss": -0.2}, {"method": "dpo"}, "lower dpo.lr, raise dpo.beta"),
        ("M2", {"previous_win_minus_loss": -0.2}, {"method": "positives"}, "lower sft.lr or sft.epochs"),
        ("M2", {"judge_pairwise_ties_half": 0.7}, {"dpo": {"replay_weight": 0.0}}, "set dpo.replay_weight"),
        ("M2", {"judge_pairwise_ties_half": 0.7}, {"dpo": {"replay_weight": 0.5}}, "raise dpo.replay_weight"),
        ("M2", {"judge_pairwise_ties_half": 0.7}, {"m1": "/x"}, "lower dpo.lr, or raise dpo.beta"),
        (
            "M2",
            {"longer_wins": 0.9},
            {"m1": "/x", "judge_model": "/y"},
            "nothing; give an m1 that has learned to judge",
        ),
        ("M2", {"judge_pairwise_ties_half": 0.7}, {"method": "positives"}, "give more judge data (data.eft)"),
    ],
)
def test_what_a_model_is_told_has_an_effect_in_its_recipe(
    name: str, change: dict[str, Any], recipe: dict[str, Any], said: str | None
) -> None:
    found = model_warnings([row | change if row["name"] == name else row for row in rows()], recipe)
    assert [said in sentence for sentence in found] == [True] if said else found == []


def test_a_judge_without_an_error_may_be_worn_down_too() -> None:
    """Its figure has no interval: of 70 prompts without an error the rate of errors may be up to 3 / 70."""
    models = rows(judge_pairwise_ties_half=0.95)
    models[2] |= {"judge_pairwise_ties_half": 1.0, "judge_pairwise_ties_half_interval": None, "judge_prompts": 70}
    models[3] |= {"judge_pairwise_ties_half": 0.96}
    (sentence,) = model_warnings(models, {})
    assert sentence.startswith(
        "M3 judges worse than M1 (95.0% of the ranked pairs, ties half, below M1's interval from 95.7%)"
    )


def test_a_match_without_an_error_is_lost_only_where_all_of_several_prompts_were() -> None:
    lost = {
        "previous_win_minus_loss": -1.0,
        "previous_win_minus_loss_se": None,
        "previous_unread": 0,
        "previous_same_text": 0,
    }
    assert len(model_warnings(rows(**lost, previous_n=2), {})) == 1
    assert model_warnings(rows(**lost, previous_n=1), {}) == []
    tied = lost | {"previous_win_minus_loss": 0.0}
    assert model_warnings(rows(**tied, previous_n=100), {}) == []


@pytest.mark.parametrize(
    ("how", "said"), [("pairwise", "evaluation.head_to_head=scores"), ("scores", "judge.template")]
)
def test_matches_without_a_verdict_are_said_once(how: str, said: str) -> None:
    recipe = {"evaluation": {"head_to_head": how}}
    models = [row | {"previous_n": 190, "previous_same_text": 100, "previous_unread": 10} for row in rows()]
    assert model_warnings(models, recipe) == []
    models[4] |= {"previous_unread": 11}
    (sentence,) = model_warnings(models, recipe)
    assert sentence.startswith(
        "head to head, 10% of the prompts with different texts have no verdict"
    ) and sentence.endswith(said)


def test_scores_that_cannot_be_read_are_said_to_be_the_reason() -> None:
    assert model_warnings(rows(judge_unread=0.1), {}) == []
    (sentence,) = model_warnings(rows(judge_unread=0.11, longer_wins=0.9), {})
    assert sentence.startswith("11% of the ranked answers have no score by M3 that can be read")
