"""Verdicts as judges write them."""

from __future__ import annotations

import pytest

from selfreward.verdict import parse_verdict
from tests.selfreward.linear_time import assert_linear

FIRST = """
Verdict: A
verdict: A.
**Verdict:** A
**Verdict: A**
Final verdict: Response A
Verdict = A
Verdict: <A>
Both are relevant. B is longer.\\nVerdict: A
[[A]]
My final verdict is: [[A]]
The winner is A.
Winner: Assistant A
Winner: A, because it is complete
The better response is Response A.
The better answer is the first.
Preference: first
Response A is better.
Response A is clearly better than Response B.
I think that answer 1 is slightly better.
The first response is stronger.
A is better because it answers the question
Both try.\\nA
Response A
Verdict: A\\n\\nVerdict: A
Verdict: A is better
"""
TIE = """
Verdict: tie
Verdict: Tie.
Verdict: **tie**
Verdict: a draw
[[C]]
[[tie]]
Winner: neither
Verdict: both
Verdict: equally good
tie
"""
NO_VERDICT = """
The better response is a short one.
Verdict: A clear case of two weak answers
Response A is not better than Response B.
I cannot say whether response B is better.
If response A is better, say A.
A good answer would explain more.
Response A mentions Paris, response B does not.
B and A are both fine.
5
"""
AMBIGUOUS = """
Verdict: A\\nVerdict: B
[[A]] [[B]]
Response A is better. Response B is better.
Verdict: tie. Winner: B
"""


def lines(table: str) -> list[str]:
    return [line.replace("\\n", "\n") for line in table.strip().split("\n")]


@pytest.mark.parametrize("text", lines(FIRST))
def test_a_verdict_for_the_first_and_its_mirror_image(text: str) -> None:
    assert parse_verdict(text) == ("first", "ok")
    swaps = {"A": "B", "B": "A", "first": "second", "1": "2", "a": "a"}
    mirrored = " ".join(_swapped(word, swaps) for word in text.split(" "))
    assert parse_verdict(mirrored) == ("second", "ok"), mirrored


def _swapped(word: str, swaps: dict[str, str]) -> str:
    for old, new in swaps.items():
        bare = word.strip("*.<>[],\n")
        if bare == old or bare.endswith(f"\n{old}") or bare.startswith(f"{old}\n"):
            return word.replace(old, new)
    return word


@pytest.mark.parametrize("text", lines(TIE))
def test_a_tie(text: str) -> None:
    assert parse_verdict(text) == ("tie", "ok")


@pytest.mark.parametrize("text", lines(NO_VERDICT))
def test_nothing_is_guessed(text: str) -> None:
    assert parse_verdict(text) == (None, "no_verdict")


@pytest.mark.parametrize("text", lines(AMBIGUOUS))
def test_verdicts_that_differ(text: str) -> None:
    assert parse_verdict(text) == (None, "ambiguous")


def test_cut_and_empty() -> None:
    assert parse_verdict("Response A is", "length") == (None, "truncated")
    assert parse_verdict("Verdict: B", "length") == ("second", "ok")
    assert parse_verdict(" \n") == (None, "empty")


@pytest.mark.parametrize(
    "unit", ["Response A is better ", "Verdict: ", "Verdict is the ", "A\n", "not the ", "[[", "*"]
)
def test_the_parser_takes_linear_time_on_hostile_text(unit: str) -> None:
    assert_linear(parse_verdict, unit)
