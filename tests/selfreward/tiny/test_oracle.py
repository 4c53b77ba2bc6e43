"""The oracle: five points for the right answer only, and what each point depends on."""

import random

import pytest

from selfreward.tiny import grade
from selfreward.tiny.corpus import corruption, habit
from selfreward.tiny.oracle import checks
from selfreward.tiny.tasks import random_instruction, solve

Y, N = True, False


def test_the_right_answer_has_five_points_and_no_wrong_one_does() -> None:
    rng = random.Random(4)
    for _ in range(5000):
        instruction = random_instruction(rng)
        assert grade(instruction.text, solve(instruction)) == 5
        for wrong in (habit(instruction), corruption(instruction, rng)):
            assert grade(instruction.text, wrong.text) < 5, (instruction, wrong)


@pytest.mark.parametrize(
    ("prompt", "answer", "points"),
    [
        ("reverse a b c d", "d c b a", (Y, Y, Y, Y, Y)),
        ("reverse a b c d", "d c b l", (Y, Y, Y, Y, N)),  # one item wrong
        ("reverse a b c d", "a b c d", (Y, N, Y, Y, N)),  # not half of the positions
        ("reverse a b c d", "d c b", (Y, Y, N, Y, N)),  # too short
        ("reverse a b c d", "here it is d c b a", (Y, Y, Y, N, N)),  # chatter before
        ("reverse a b c d", "d c b a hope this helps", (Y, Y, Y, N, N)),  # chatter after
        ("reverse a b c d", "d c b a d", (Y, Y, N, N, N)),  # goes on
        ("reverse a b c d", "a", (Y, N, N, Y, N)),
        ("reverse a b c d", "a b c d a b", (Y, N, N, N, N)),
        ("reverse a b c d", "1 2 3 4", (N, N, N, N, N)),  # right size, clean, but about something else
        ("reverse a b c d", "d 1 2 3", (N, N, N, N, N)),  # fewer than half belong
        ("reverse a b c d", "d c 2 3", (Y, Y, Y, Y, N)),
        ("reverse a b c d", "hope this helps", (N, N, N, N, N)),
        ("reverse a b c d", "", (N, N, N, N, N)),
        ("count a b c d", "5", (Y, N, Y, Y, N)),  # any digit could be a count
        ("count a b c d", "a", (N, N, N, N, N)),  # nor is an operand
        ("largest 1 9 4", "4", (Y, N, Y, Y, N)),
        ("largest 1 9 4", "7", (N, N, N, N, N)),
        ("next a b c", "a b c", (Y, N, Y, Y, N)),
        ("reverse a b", "b a", (N, N, N, N, N)),  # not an instruction
    ],
)
def test_each_point_depends_on_its_own_question(prompt: str, answer: str, points: tuple[bool, ...]) -> None:
    assert checks(prompt, answer) == points
    assert grade(prompt, answer) == sum(points)


def test_wrong_answers_spread_over_one_to_four() -> None:
    rng = random.Random(5)
    grades = []
    for _ in range(4000):
        instruction = random_instruction(rng)
        wrong = habit(instruction) if rng.random() < 0.6 else corruption(instruction, rng)
        grades.append(grade(instruction.text, wrong.text))
    shares = [grades.count(points) / len(grades) for points in range(5)]
    assert min(shares) > 0.01 and max(shares) < 0.65
