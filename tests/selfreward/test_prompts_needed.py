"""The table against simulated comparisons, and the page against the table."""

from pathlib import Path

import numpy as np
import pytest

from selfreward.prompts_needed import prompts_needed, table


@pytest.mark.parametrize(("difference", "ties"), [(0.2, 0.0), (0.1, 0.4), (0.3, 0.2)])
def test_so_many_prompts_show_the_difference_in_four_cases_of_five(difference, ties):
    n, generator = prompts_needed(difference, ties), np.random.default_rng(0)
    win, loss = (1 - ties + difference) / 2, (1 - ties - difference) / 2
    drawn = generator.choice([1, -1, 0], p=[win, loss, ties], size=(4000, n))
    shown = drawn.mean(axis=1) > 1.96 * drawn.std(axis=1, ddof=1) / n**0.5
    assert 0.77 <= shown.mean() <= 0.83


def test_what_cannot_be_is_refused():
    for difference, ties in ((0.5, 0.6), (0.0, 0.0), (-0.1, 0.0)):
        with pytest.raises(ValueError, match="cannot be"):
            prompts_needed(difference, ties)


def test_the_page_holds_the_table():
    page = Path(__file__).parents[2] / "docs/evaluation.md"
    assert table() in page.read_text()
