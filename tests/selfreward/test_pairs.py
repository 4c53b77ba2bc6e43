"""Best against worst, and every way not to have a pair."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward.metrics import kendall_tau
from selfreward.pairs import NO_MORE, REASONS, Rules, build_pairs, consistency, pair_id, positive

PROMPT = {"id": "p7", "prompt": "Why?"}


def build_pair(prompt: dict[str, Any], candidates: Sequence[dict[str, Any]], **rules: Any) -> Any:
    (found,) = build_pairs(prompt, candidates, Rules(**rules))
    return found


def candidate(
    index: int,
    score: float | None,
    text: str | None = None,
    finish: str = "stop",
    draws: list[float | None] | None = None,
    tokens: int = 2,
) -> dict[str, Any]:
    return {
        "id": f"p7-{index}",
        "prompt_id": "p7",
        "prompt": "Why?",
        "index": index,
        "text": f"answer {index}" if text is None else text,
        "token_ids": [10 + index] * (tokens - 1) + [2],
        "finish_reason": finish,
        "score": score,
        "draws": [score] if draws is None else draws,
    }


def indices(*candidates: dict[str, Any], **options: Any) -> tuple[int, int] | str | None:
    """(chosen, rejected) of the pair, or the reason why there is none."""
    pair, reason = build_pair(PROMPT, candidates, **options)
    return (pair["chosen_index"], pair["rejected_index"]) if pair else reason


def test_pair_row_is_trls_conversational_preference_format_plus_scores_and_ids() -> None:
    pair, reason = build_pair(PROMPT, [candidate(0, 2.5, finish="length"), candidate(1, 14 / 3), candidate(2, 3.0)])
    assert reason is None
    assert pair == {
        "id": "p7",
        "prompt_id": "p7",
        "prompt": [{"role": "user", "content": "Why?"}],
        "chosen": [{"role": "assistant", "content": "answer 1"}],
        "rejected": [{"role": "assistant", "content": "answer 0"}],
        "score_chosen": 14 / 3,
        "score_rejected": 2.5,
        "chosen_index": 1,
        "rejected_index": 0,
        "chosen_token_ids": [11, 2],
        "rejected_token_ids": [10, 2],
        "chosen_truncated": False,
        "rejected_truncated": True,
        "consistency": None,
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
    pair, reason = build_pair(PROMPT, candidates, allow_truncated_chosen=allow)
    assert build_pair(PROMPT, data.draw(st.permutations(candidates)), allow_truncated_chosen=allow) == (pair, reason)
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


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_variance_breaks_ties_before_the_index_where_it_is_asked_to() -> None:
    best = [
        candidate(0, 4.0, draws=[3, 4, 5]),
        candidate(1, 4.0, draws=[4, 4, 4]),
        candidate(2, 4.0, draws=[4, None, 4]),
    ]
    worst = [candidate(3, 1.0, draws=[0, 1, 2]), candidate(4, 1.0, draws=[1, 1, 1])]
    assert indices(*best, *worst) == (0, 3)
    assert indices(*best, *worst, tie_break="variance") == (1, 4)
    assert indices(candidate(9, 5.0, draws=[3, 9]), *best, *worst, tie_break="variance") == (9, 4)  # scores come first


def test_length_control_takes_the_shortest_of_the_top_tier_and_the_longest_of_the_bottom_tier() -> None:
    scores, lengths = (5.0, 4.5, 4.0, 2.0, 1.0), (90, 40, 10, 70, 30)
    answers = [candidate(i, s, tokens=n) for i, (s, n) in enumerate(zip(scores, lengths, strict=True))]
    assert indices(*answers) == (0, 4)
    assert indices(*answers, length_control=0.0) == (0, 4)  # among equals only
    assert indices(*answers, length_control=0.125) == (1, 4)  # 4.5 and more; 1.5 and less
    assert indices(*answers, length_control=0.25) == (2, 3)  # 4 and more; 2 and less
    assert indices(candidate(9, 5.0, tokens=3), *answers, length_control=0.0) == (9, 4)


def test_equal_lengths_are_chosen_between_by_score_and_then_as_ties_are() -> None:
    answers = [candidate(0, 4.5), candidate(1, 5.0), candidate(2, 5.0), candidate(3, 1.0), candidate(4, 1.5)]
    assert indices(*answers, length_control=0.25) == (1, 3)


TWENTIETHS = st.integers(0, 100).map(lambda n: n / 20)


@given(
    scores=st.lists(TWENTIETHS, min_size=2, max_size=7),
    lengths=st.lists(st.integers(1, 4), min_size=7, max_size=7),
    rho=st.sampled_from([0.0, 0.1, 0.32, 0.4, 0.49]),
)
def test_length_control_against_its_definition(scores: list[float], lengths: list[int], rho: float) -> None:
    answers = [candidate(i, s, tokens=lengths[i]) for i, s in enumerate(scores)]
    found = indices(*answers, length_control=rho)
    top, bottom = max(scores), min(scores)
    if top == bottom:
        assert found == "tie"
        return
    assert isinstance(found, tuple)
    high = [i for i, s in enumerate(scores) if s >= top - rho * (top - bottom)]
    low = [i for i, s in enumerate(scores) if s <= bottom + rho * (top - bottom)]
    assert found[0] in high and lengths[found[0]] == min(lengths[i] for i in high)
    assert found[1] in low and lengths[found[1]] == max(lengths[i] for i in low)


def test_a_prompt_gives_as_many_pairs_as_it_may_each_of_other_answers() -> None:
    answers = [candidate(i, s) for i, s in enumerate((1.0, 5.0, 3.0, 2.0, 4.0))]
    found = build_pairs(PROMPT, answers, Rules(per_prompt=4))
    assert [(pair["id"], pair["chosen_index"], pair["rejected_index"]) for pair, _ in found[:2] if pair] == [
        ("p7", 1, 0),
        ("p7+2", 4, 3),
    ]
    assert [reason for _, reason in found] == [None, None, NO_MORE, NO_MORE]
    assert all(pair["prompt_id"] == "p7" for pair, _ in found if pair) and pair_id("p7", 0) == "p7"
    assert build_pairs(PROMPT, [], Rules(per_prompt=2)) == [(None, "too_few_scored"), (None, NO_MORE)]


def test_a_hook_may_choose_otherwise() -> None:
    second = lambda choosable, scored, rules: (choosable[1], scored[2])
    answers = [candidate(0, 5.0), candidate(1, 4.0), candidate(2, 1.0), candidate(3, 0.0)]
    ((pair, _),) = build_pairs(PROMPT, answers, pick=second)
    assert pair and (pair["chosen_index"], pair["rejected_index"]) == (1, 2)
    with pytest.raises(AssertionError, match="p7"):  # a pair must be a preference
        build_pairs(PROMPT, answers, pick=lambda choosable, scored, rules: (scored[3], scored[0]))


def test_consistency_is_one_half_by_chance_and_one_where_all_draws_agree() -> None:
    agreeing = [candidate(0, 4.0, draws=[5, 3, 4]), candidate(1, 2.0, draws=[3, 1, 2])]
    opposed = [candidate(0, 3.0, draws=[4, 2]), candidate(1, 3.0, draws=[2, 4])]
    flat = [candidate(0, 4.0, draws=[4, 4]), candidate(1, 4.0, draws=[4, 4])]
    partly = [candidate(0, 4.0, draws=[4, None, 4]), candidate(1, 2.0, draws=[2, 3, 2])]
    assert [consistency(rows) for rows in (agreeing, opposed, flat, partly)] == [1.0, 0.0, 0.5, 1.0]
    assert consistency([candidate(0, 4.0), candidate(1, 2.0)]) is None  # one draw has nothing to agree with
    assert consistency(agreeing[:1]) is None
    pair, _ = build_pair(PROMPT, agreeing)
    assert pair["consistency"] == 1.0


@settings(deadline=None)  # scipy takes its time to be imported
@given(
    data=st.data(), n=st.integers(0, 6), score=st.sampled_from([st.integers(0, 5), st.sampled_from([0.0, 1 / 3, 4.5])])
)
def test_kendalls_tau_is_scipys(data: st.DataObject, n: int, score: Any) -> None:
    scipy = pytest.importorskip("scipy.stats")
    first, second = (data.draw(st.lists(score, min_size=n, max_size=n)) for _ in range(2))
    ours = kendall_tau(first, second)
    if len(set(first)) < 2 or len(set(second)) < 2:
        assert ours is None
    else:
        assert ours == pytest.approx(scipy.kendalltau(first, second).statistic, abs=1e-12)


def test_a_perfect_answer_is_found_as_before() -> None:
    answers = [candidate(0, 5.0, finish="length"), candidate(1, 5.0), candidate(2, 5.0)]
    assert positive(answers) is answers[1] and positive(answers, allow_truncated=True) is answers[0]


def test_the_rounding_of_means_breaks_no_tie() -> None:
    copies = [candidate(0, 4.0, "a", draws=[4.0, 4.0, 4.0]), candidate(1, 14 / 3, "a", draws=[5.0, 5.0, 4.0])]
    assert (4.0 + 14 / 3) / 2 > 13 / 3
    other = candidate(2, 13 / 3, "b", draws=[5.0, 4.0, 4.0])
    assert build_pairs(PROMPT, [*copies, other], Rules()) == [(None, "tie")]
