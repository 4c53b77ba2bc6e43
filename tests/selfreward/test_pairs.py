"""Best against worst, and every way not to have a pair."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfreward.pairs import REASONS, build_pair

PROMPT = {"id": "p7", "prompt": "Why?"}


def candidate(index: int, score: float | None, text: str | None = None, finish: str = "stop") -> dict[str, Any]:
    return {
        "id": f"p7-{index}",
        "prompt_id": "p7",
        "prompt": "Why?",
        "index": index,
        "text": f"answer {index}" if text is None else text,
        "token_ids": [10 + index, 2],
        "finish_reason": finish,
        "score": score,
    }


def indices(*candidates: dict[str, Any], **options: bool) -> tuple[int, int] | str | None:
    """(chosen, rejected) of the pair, or the reason why there is none."""
    pair, reason = build_pair(PROMPT, candidates, **options)
    return (pair["chosen_index"], pair["rejected_index"]) if pair else reason


def test_pair_row_is_trl_preference_format_plus_scores_and_ids() -> None:
    pair, reason = build_pair(PROMPT, [candidate(0, 2.5, finish="length"), candidate(1, 14 / 3), candidate(2, 3.0)])
    assert reason is None
    assert pair == {
        "id": "p7",
        "prompt": "Why?",
        "chosen": "answer 1",
        "rejected": "answer 0",
        "score_chosen": 14 / 3,
        "score_rejected": 2.5,
        "chosen_index": 1,
        "rejected_index": 0,
        "chosen_token_ids": [11, 2],
        "rejected_token_ids": [10, 2],
        "chosen_truncated": False,
        "rejected_truncated": True,
    }


def test_equal_best_or_worst_goes_to_the_lowest_index() -> None:
    assert indices(candidate(0, 3), candidate(1, 5), candidate(2, 1), candidate(3, 5), candidate(4, 1)) == (1, 2)


def test_equal_scores_are_a_tie() -> None:
    assert indices(candidate(0, 4.0), candidate(1, 4.0), candidate(2, None)) == "tie"


def test_a_third_of_a_point_decides() -> None:
    assert indices(candidate(0, 11 / 3), candidate(1, 4.0)) == (1, 0)


def test_fewer_than_two_scores_give_no_pair() -> None:
    assert indices() == "too_few_scored"
    assert indices(candidate(0, 5), candidate(1, None)) == "too_few_scored"


def test_a_score_of_zero_is_a_score() -> None:
    assert indices(candidate(0, 0.0), candidate(1, 1.0)) == (1, 0)


def test_a_cut_answer_may_be_rejected_but_not_chosen() -> None:
    assert indices(candidate(0, 5, finish="length"), candidate(1, 4), candidate(2, 3)) == (1, 2)
    assert indices(candidate(0, 1, finish="length"), candidate(1, 4)) == (1, 0)
    assert indices(candidate(0, 5, finish="length"), candidate(1, 4, finish="length")) == "none_choosable"
    assert indices(candidate(0, 5, finish="length"), candidate(1, 4)) == "none_better"  # 1 is the best and the worst


def test_the_recipe_can_allow_a_cut_answer_to_be_chosen() -> None:
    cut = candidate(0, 5, finish="length")
    pair, _ = build_pair(PROMPT, [cut, candidate(1, 4)], allow_truncated_chosen=True)
    assert pair is not None and pair["chosen_index"] == 0 and pair["chosen_truncated"]


def test_an_empty_answer_is_never_chosen() -> None:
    assert indices(candidate(0, 5, text=" \n"), candidate(1, 4), candidate(2, 1)) == (1, 2)
    assert indices(candidate(0, 1, text=""), candidate(1, 4)) == (1, 0)
    assert indices(candidate(0, 5, text=""), candidate(1, 4, text=" ")) == "none_choosable"


def test_an_aborted_answer_is_never_chosen() -> None:
    assert indices(candidate(0, 5, finish="abort"), candidate(1, 4), candidate(2, 1), allow_truncated_chosen=True) == (
        1,
        2,
    )


def test_the_same_text_twice_is_no_preference() -> None:
    assert indices(candidate(0, 5, text="same"), candidate(1, 4, text="same")) == "duplicate"


def test_copies_of_a_text_are_one_candidate_with_their_mean_score() -> None:
    same = [candidate(0, 4.0, text="same"), candidate(1, 3.5), candidate(2, 2.0, text="same")]
    assert indices(*same) == (1, 0)  # judged once each, the first copy would have won and the last one lost
    pair, _ = build_pair(PROMPT, same)
    assert pair is not None and (pair["score_chosen"], pair["score_rejected"]) == (3.5, 3.0)


def test_of_copies_the_one_that_ended_stands_for_all() -> None:
    cut = candidate(0, 5.0, text="same", finish="length")
    assert indices(cut, candidate(1, 1.0), candidate(2, 5.0, text="same")) == (2, 1)


def test_a_candidate_of_another_prompt_is_refused() -> None:
    with pytest.raises(AssertionError, match="p7"):
        build_pair(PROMPT, [candidate(0, 5), {**candidate(1, 4), "prompt_id": "p8"}])


CANDIDATES = st.lists(
    st.tuples(
        st.sampled_from([None, 0.0, 1.0, 4 / 3, 5.0]),
        st.sampled_from(["", "a", "b"]),
        st.sampled_from(["stop", "length"]),
    ),
    max_size=5,
).map(lambda rows: [candidate(i, *row) for i, row in enumerate(rows)])


@given(candidates=CANDIDATES, allow=st.booleans(), data=st.data())
def test_a_pair_keeps_every_rule_and_no_order_matters(
    candidates: list[dict[str, Any]], allow: bool, data: st.DataObject
) -> None:
    pair, reason = build_pair(PROMPT, candidates, allow)
    assert build_pair(PROMPT, data.draw(st.permutations(candidates)), allow) == (pair, reason)
    assert (pair is None) == (reason in REASONS)
    if pair is None:
        return
    chosen, rejected = candidates[pair["chosen_index"]], candidates[pair["rejected_index"]]
    assert chosen["text"] != rejected["text"] and pair["score_chosen"] > pair["score_rejected"]
    assert chosen["text"] and (allow or chosen["finish_reason"] == "stop")
    scored = [c for c in candidates if c["score"] is not None]
    means = {text: fmean(c["score"] for c in scored if c["text"] == text) for text in {c["text"] for c in scored}}
    choosable = {c["text"] for c in scored if c["text"] and (allow or c["finish_reason"] == "stop")}
    assert pair["score_rejected"] == pytest.approx(min(means.values()))
    assert pair["score_chosen"] == pytest.approx(max(means[text] for text in choosable))
