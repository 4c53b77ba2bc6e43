"""Variety of texts, worked out by hand, and what collapse looks like."""

from selfreward.variety import distinct, diversity, repetition


def test_distinct_runs_are_counted_over_all_texts_and_never_across_them():
    assert distinct([[1, 2, 1], [1, 2]], 1) == 2 / 5
    assert distinct([[1, 2, 1], [1, 2]], 2) == 2 / 3  # (1, 2), (2, 1), and (1, 2) again
    assert distinct([[1], []], 2) is None


def test_a_loop_repeats_and_a_text_without_one_does_not():
    assert repetition([[1, 2, 3, 4, 5]]) == 0
    assert repetition([[7] * 10]) == 1 - 1 / 7
    assert repetition([[7] * 10, [1, 2, 3, 4], [1, 2]]) == (1 - 1 / 7) / 2
    assert repetition([[1, 2]]) is None


def test_answers_to_one_prompt_differ_or_not():
    assert diversity([["a", "a", "a"]]) == 0
    assert diversity([["a", "b", "c"], ["a", "b", "a"]]) == (1 + 1 / 2) / 2
    assert diversity([["a"]]) is None
