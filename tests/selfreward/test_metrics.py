"""Figures of a judge: against scipy, against groups worked out by hand with ties and unreadable scores, on the real files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from selfreward.formats import as_group, read_file
from selfreward.metrics import (
    FIGURES,
    judge_figures,
    kendall_tau,
    length_figures,
    longer_wins,
    ranked_pairs,
    ratio_and_interval,
    spearman,
)

LISTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9)


def group(*ranks: int, texts: tuple[str, ...] = ()) -> dict[str, Any]:
    texts = texts or tuple("x" * (i + 1) for i in range(len(ranks)))
    return {"answers": [{"text": text, "rank": rank} for text, rank in zip(texts, ranks)]}


@given(LISTS)
def test_rank_correlations_are_scipys_ties_included(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs)
    ordered = len(set(first)) > 1 and len(set(second)) > 1
    for ours, theirs in ((kendall_tau, scipy.stats.kendalltau), (spearman, scipy.stats.spearmanr)):
        found = ours(first, second)
        assert (found is not None) == ordered
        if found is not None:
            assert abs(found - theirs(first, second).statistic) <= 1e-12


def test_figures_worked_out_by_hand() -> None:
    groups = [group(0, 1, 2), group(0, 1), group(1, 0), group(0, 1), group(0, 0)]
    scores = [[5.0, 3.0, 3.0], [5.0, 5.0], [5.0, 1.0], [4.0, None], [5.0, 0.0]]
    found = judge_figures(groups, scores)
    # Pairs: 2 right + 1 tie of 3; a tie; wrong; unreadable. The last group has no order and counts nowhere.
    assert (found["pairs"], found["groups"]) == (6, 4)
    assert found["pairwise"] == 2 / 6
    assert found["pairwise_ties_half"] == (2 + 0.5 + 0.5) / 6
    assert found["five_best"] == 2 / 4  # 5 stands at a best answer, at both of a tied pair (one best), at a worse one
    assert (
        judge_figures([group(3, 1)], [[4.0, 5.0]])["five_best"] == 1
    )  # the lowest rank is the best, whatever its number
    assert found["exact"] == 0
    tau = scipy.stats.kendalltau([0, -1, -2], [5, 3, 3]).statistic
    rho = scipy.stats.spearmanr([0, -1, -2], [5, 3, 3]).statistic
    assert found["kendall"] == pytest.approx((tau + 0 - 1 + 0) / 4)  # no order in the scores is no agreement
    assert found["spearman"] == pytest.approx((rho + 0 - 1 + 0) / 4)


def test_equal_ranks_may_have_any_scores_in_a_whole_order() -> None:
    assert judge_figures([group(0, 1, 1)], [[5.0, 2.0, 3.0]])["exact"] == 1
    assert judge_figures([group(0, 1, 1)], [[5.0, None, 3.0]])["exact"] == 0
    assert judge_figures([group(0, 1, 2)], [[5.0, 3.0, 3.0]])["exact"] == 0


def test_what_cannot_be_measured_is_no_number() -> None:
    empty = judge_figures([], [])
    assert all(empty[name] is None and empty[f"{name}_interval"] is None for name in FIGURES)
    assert longer_wins([group(0, 0)]) is None
    found = judge_figures([group(0, 1)], [[4.0, 3.0]])
    assert found["five_best"] is None and found["pairwise"] == 1  # no perfect score


def test_an_interval_covers_as_often_as_it_says() -> None:
    """Prompts with one to three pairs each, right in 70%: about 95% of the intervals hold the 0.7."""
    generator, held, trials = np.random.default_rng(3), 0, 150
    for _ in range(trials):
        sizes = generator.integers(1, 4, size=150)
        parts = [(float(generator.binomial(size, 0.7)), float(size)) for size in sizes]
        figure, interval = ratio_and_interval(parts)
        assert figure is not None and interval is not None and interval[0] <= figure <= interval[1]
        held += interval[0] <= 0.7 <= interval[1]
    assert 0.89 <= held / trials <= 0.99


@pytest.mark.parametrize("part", [(0.0, 1.0), (3.0, 3.0), (0.7, 1.0)])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_parts_that_all_say_the_same_have_a_figure_and_no_interval(part: tuple[float, float], count: int) -> None:
    """[1, 1] of three perfect scores would claim that the judge never errs."""
    assert ratio_and_interval([part] * count) == (pytest.approx(part[0] / part[1]), None)
    assert ratio_and_interval([part] * count + [(0.0, 0.0)] * 5)[1] is None  # prompts without a perfect score


def test_an_interval_takes_prompts_apart_and_not_their_pairs() -> None:
    """Ten equal pairs of one prompt are one finding, not ten: the width is that of the prompts alone."""
    single = [(float(i % 3 > 0), 1.0) for i in range(60)]
    tenfold = [(10 * right, 10.0) for right, _ in single]
    assert ratio_and_interval(tenfold) == ratio_and_interval(single)


def test_the_real_files(test_data: Path) -> None:
    """The figures of docs/evaluation.md."""
    trees = read_file(test_data / "oasst/en_100_tree.jsonl", as_group).rows
    assert length_figures(trees)["pairs"] == 438
    assert length_figures(trees)["pairwise"] == pytest.approx(0.671, abs=5e-4)
    pandalm = read_file(test_data / "pandalm/testset-v1.json", as_group)
    assert (pandalm.total, len(pandalm.rows), pandalm.reasons()) == (999, 992, {"wrong_type": 6, "empty": 1})
    figures = length_figures(pandalm.rows)
    assert (figures["pairs"], len(ranked_pairs(pandalm.rows))) == (887, 887)
    assert figures["pairwise"] == pytest.approx(598 / 887) and figures["pairwise_ties_half"] == 601.5 / 887
    bar = read_file(test_data / "llmbar/natural.json", as_group)
    assert (bar.total, len(bar.rows)) == (100, 100)
    assert length_figures(bar.rows)["pairs"] == 100
    assert length_figures(bar.rows)["pairwise_ties_half"] == pytest.approx(0.565)
    assert math.isclose(length_figures(bar.rows)["kendall"], 2 * 0.565 - 1)


def test_rows_with_the_same_prompt_are_resampled_together() -> None:
    rows = [
        {"prompt": f"p{n % 4}", "answers": [{"text": "a", "rank": 0}, {"text": "b", "rank": 1}]} for n in range(400)
    ]
    scores = [[1.0, 0.0] if n % 4 < 2 else [0.0, 1.0] for n in range(400)]
    found, apart = (
        judge_figures(rows, scores),
        judge_figures([row | {"prompt": str(n)} for n, row in enumerate(rows)], scores),
    )
    assert found["pairwise"] == apart["pairwise"] == 0.5 and (found["prompts"], apart["prompts"]) == (4, 400)
    low, high = found["pairwise_interval"]
    assert high - low >= 0.5 and apart["pairwise_interval"][1] - apart["pairwise_interval"][0] < 0.12


def test_what_could_not_be_read_is_said() -> None:
    rows = [{"answers": [{"text": "a", "rank": 0}, {"text": "b", "rank": 1}]}] * 2
    assert judge_figures(rows, [[None, 1.0], [None, None]])["unread"] == 0.75
    assert judge_figures([], [])["unread"] is None
