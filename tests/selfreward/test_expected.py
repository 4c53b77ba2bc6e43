"""Which token wrote the score, and what its distribution says."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import InputError, Tokenizer
from selfreward.expected import distribution, score_labels, score_step
from selfreward.judge import parse_score
from selfreward.tiny import DATA as TINY_DATA

DATA = os.environ.get("SELFREWARD_TEST_DATA")
needs_llama2 = pytest.mark.skipif(DATA is None, reason="SELFREWARD_TEST_DATA is not set: no genuine tokenizer")


@functools.cache
def llama2() -> Tokenizer:
    return Tokenizer(Path(DATA or "") / "llama2" / "tokenizer.model")


@functools.cache
def tiny() -> Tokenizer:
    return Tokenizer(TINY_DATA.parent / "m0")


@functools.cache
def labels_of(tokenizer: Tokenizer) -> dict[int, int]:
    return score_labels(tokenizer)


def wrote(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, str] | None:
    """(text before the token that wrote the score, what that token spells), by the parser and score_step."""
    text = tokenizer.decode(ids)
    span = parse_score(text).span
    if span is None:
        return None
    step = score_step(text, span, ids, labels_of(tokenizer), tokenizer.decode)
    return None if step is None else (tokenizer.decode(ids[:step]), tokenizer.decode([ids[step]]))


PLACES = [
    ("Score: 4", "Score: "),
    ("Score:4", "Score:"),
    ("4", ""),
    ("4/5\n\nIt is relevant and it has 3 of the 5 steps.", ""),
    (
        "It lists 5 things in 2 lines, 1 of them wrong.\n\nScore: 4",
        "It lists 5 things in 2 lines, 1 of them wrong.\n\nScore: ",
    ),
    ("**Score:**\n\n4\n", "**Score:**\n\n"),
    ("Score: **4/5**", "Score: **"),
    ("<score>4</score>", "<score>"),
    ("Score: 1 + 1 + 1 + 1 = 4", "Score: 1 + 1 + 1 + 1 = "),
    ("caf\u00e9 \u2728\u2728 \U0001f600 Score: 4 \U0001f600", "caf\u00e9 \u2728\u2728 \U0001f600 Score: "),
    ("  Score:   4", "  Score:   "),
    (
        "\U0001f600\U0001f6004/5",
        "\U0001f600\U0001f600",
    ),  # the bytes before it decode to more characters while some are missing
    ("Score: 4\n\nScore: 4/5", "Score: "),  # what follows repeats it
    ("I'd give it a 3; no, I'd give it a 4. So 4 points.", "I'd give it a 3; no, I'd give it a "),
]


@needs_llama2
@pytest.mark.parametrize(("text", "before"), PLACES)
def test_the_token_of_the_score_is_found(text: str, before: str) -> None:
    assert wrote(llama2(), llama2().encode(text)) == (before, "4")


@needs_llama2
@pytest.mark.parametrize("text", ["Score: 4.5", "Score: 4.0/5", "Score: 05", "Score: 8/10", "Score: 3-4", "fine", ""])
def test_a_score_that_is_no_single_digit_has_no_place(text: str) -> None:
    assert wrote(llama2(), llama2().encode(text)) is None


@needs_llama2
def test_all_spellings_of_a_digit_are_its_label_and_nothing_else_is() -> None:
    labels = score_labels(llama2())
    assert len(labels) == 12  # a piece and a byte for each: Llama 2 splits digits, so none holds its space
    four = [token for token, score in labels.items() if score == 4]
    assert [llama2().decode([token]) for token in four] == ["4", "4"]
    byte = next(token for token in four if token < 259)
    assert wrote(llama2(), [*llama2().encode("Score: "), byte]) == ("Score: ", "4")


@needs_llama2
def test_bytes_that_are_no_character_do_not_move_the_place() -> None:
    lone = llama2().encode("\U0001f600")[1:3]  # two of its four bytes
    ids = [*llama2().encode("ab"), *lone, *llama2().encode("Score: 4")]
    text = llama2().decode(ids)
    assert "\ufffd" in text
    assert wrote(llama2(), ids) == (text[: text.index("4")], "4")


WORDS = st.lists(
    st.sampled_from(
        ["Score: ", "4", "3", "/5", " points", "\n", " ", "**", "\u00e9", "\U0001f600", "\u2728", "total ", ".5", "a"]
    ),
    max_size=12,
)


@needs_llama2
@given(words=WORDS)
def test_a_place_that_is_found_is_the_right_one(words: list[str]) -> None:
    ids = llama2().encode("".join(words))
    text = llama2().decode(ids)
    judgement = parse_score(text)
    found = wrote(llama2(), ids)
    if found is not None:
        assert judgement.span is not None
        before, digit = found
        assert before == text[: judgement.span[0]] and float(digit) == judgement.score
    elif (
        judgement.span is not None
    ):  # a digit of ASCII behind any bytes is a token of its own: only fractions are left out
        assert judgement.span[1] - judgement.span[0] > 1


def test_in_a_vocabulary_of_words_the_digit_holds_its_space() -> None:
    assert wrote(tiny(), tiny().encode("yes no Score: 4")) == ("yes no Score:", "4")


class Pieces:
    """A vocabulary of given pieces, where decoding joins them."""

    def __init__(self, *pieces: str) -> None:
        self.pieces, self.vocab_size, self.path = pieces, len(pieces), "pieces"

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[token] for token in ids)


def test_a_piece_of_several_characters_is_no_place() -> None:
    pieces = Pieces("Score:", " 4", "4", "4/", "5", "0", "1", "2", "3", ": 4", "Score")
    assert wrote(pieces, [0, 1]) == ("Score:", " 4")
    assert wrote(pieces, [0, 2]) == ("Score:", "4")
    assert wrote(pieces, [0, 3, 4]) is None
    assert wrote(pieces, [10, 9]) is None


def test_a_vocabulary_without_the_digits_is_refused() -> None:
    with pytest.raises(InputError, match="has no token for 0, 2: set it to mean"):
        score_labels(Pieces("1", "3", "4", "5", "20"))  # type: ignore[arg-type]


def test_spellings_of_a_score_add_up_and_the_mass_is_what_they_hold() -> None:
    probabilities = [0.1, 0.2, 0.05, 0.15, 0.1, 0.1, 0.1]  # 0, 1, 2, 3, 4, 5 and another 4: 0.8 in all
    found = distribution([math.log(p) for p in probabilities], [0, 1, 2, 3, 4, 5, 4])
    assert found.mass == pytest.approx(0.8)
    assert found.probabilities == pytest.approx([0.125, 0.25, 0.0625, 0.1875, 0.25, 0.125])
    assert found.expected == pytest.approx(0.25 + 2 * 0.0625 + 3 * 0.1875 + 4 * 0.25 + 5 * 0.125)
    sure = distribution([-math.inf, -math.inf, -math.inf, -math.inf, 0.0, -math.inf], range(6))
    assert (sure.expected, sure.mass) == (4.0, 1.0)
