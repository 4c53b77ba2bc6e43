"""The 14 tasks: right answers worked out by hand, and what counts as an instruction."""

import random

import pytest

from selfreward.tiny import is_valid
from selfreward.tiny.tasks import (
    MAX_ITEMS,
    MIN_ITEMS,
    TASK_NAMES,
    parse,
    random_instruction,
    random_instructions,
    solve,
)

BY_HAND = [
    ("copy b a b", "b a b"),
    ("copy 3 1 4 1 5 9 2", "3 1 4 1 5 9 2"),
    ("reverse a b c d", "d c b a"),
    ("sort d b a b", "a b b d"),
    ("sort 9 0 5", "0 5 9"),
    ("drop a b a c a", "b c"),
    ("drop 7 7 3", "3"),
    ("count a a a", "3"),
    ("count 9 8 7 6 5 4 3", "7"),
    ("double a b c", "a a b b c c"),
    ("swap a b c d", "d b c a"),
    ("rotate a b c d", "b c d a"),
    ("next a k l", "b l a"),
    ("largest 3 9 0 9", "9"),
    ("add 3 0 7 9", "3 0 2"),
    ("unique b a b c a", "b a c"),
    ("last a b c", "a b c"),
    ("last 1 2 3 4 5", "3 4 5"),
    ("rest a b c d", "b c d"),
]


@pytest.mark.parametrize(("text", "answer"), BY_HAND)
def test_solve_gives_the_answer_worked_out_by_hand(text: str, answer: str) -> None:
    instruction = parse(text)
    assert instruction is not None
    assert solve(instruction) == answer


def test_every_task_has_a_case_worked_out_by_hand() -> None:
    assert len(TASK_NAMES) == 14
    assert {text.split()[0] for text, _ in BY_HAND} == set(TASK_NAMES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "copy",
        "shuffle a b c",  # no such task
        "copy a b",  # too few
        "copy a b c d e f g h",  # too many
        "copy a 1 b",  # two alphabets
        "copy a b m",  # outside the alphabet
        "copy a b 10",
        "copy A b c",
        "next 1 2 3",
        "largest a b c",
        "add a b c",
        "drop a b c",  # nothing to drop
        "drop a a a",  # nothing left
        "a b c copy",
    ],
)
def test_parse_rejects_what_is_not_an_instruction(text: str) -> None:
    assert parse(text) is None
    assert not is_valid(text)


def test_is_valid_rejects_other_spellings_of_an_instruction() -> None:
    assert parse("copy  a b c ") is not None
    assert not is_valid("copy  a b c ")
    assert is_valid("copy a b c")


def test_random_instructions_are_well_formed_and_cover_tasks_lengths_and_alphabets() -> None:
    rng = random.Random(1)
    drawn = [random_instruction(rng) for _ in range(3000)]
    assert all(parse(instruction.text) == instruction for instruction in drawn)
    assert {instruction.task for instruction in drawn} == set(TASK_NAMES)
    assert {len(instruction.items) for instruction in drawn} == set(range(MIN_ITEMS, MAX_ITEMS + 1))
    assert {item for instruction in drawn for item in instruction.items} == set("abcdefghijkl0123456789")


def test_new_instructions_seldom_meet_old_ones() -> None:
    rng = random.Random(2)
    old = {random_instruction(rng).text for _ in range(3000)}
    new = [random_instruction(rng).text for _ in range(3000)]
    assert sum(text in old for text in new) < 0.1 * len(new)


def test_random_instructions_leave_out_the_excluded_and_never_repeat() -> None:
    first = random_instructions(random.Random(3), 500)
    second = random_instructions(random.Random(3), 500, exclude={instruction.text for instruction in first})
    assert len({instruction.text for instruction in first + second}) == 1000
