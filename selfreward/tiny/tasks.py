"""The tiny world's instructions: 14 tasks on 3 to 7 letters or digits, such as `reverse a b c`.

`parse` knows what a legal instruction is, `solve` knows its right answer; they share nothing but the operands, so the
loop may use the first without learning anything from the second.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container
from dataclasses import dataclass

LETTERS = tuple("abcdefghijkl")
DIGITS = tuple("0123456789")
MIN_ITEMS, MAX_ITEMS = 3, 7


@dataclass(frozen=True)
class Instruction:
    task: str
    items: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join((self.task, *self.items))


@dataclass(frozen=True)
class Task:
    """`kinds`: the alphabets its operands may come from; `answer`: operands -> the right answer's words."""

    kinds: tuple[tuple[str, ...], ...]
    answer: Callable[[tuple[str, ...]], tuple[str, ...]]


def _drop(items: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(item for item in items[1:] if item != items[0])


def _swap(items: tuple[str, ...]) -> tuple[str, ...]:
    return (items[-1], *items[1:-1], items[0])


def _next(items: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(LETTERS[(LETTERS.index(item) + 1) % len(LETTERS)] for item in items)


def _add(items: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str((int(items[0]) + int(item)) % 10) for item in items[1:])


def _double(items: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(item for item in items for _ in range(2))


TASKS: dict[str, Task] = {
    "copy": Task((LETTERS, DIGITS), lambda items: items),
    "reverse": Task((LETTERS, DIGITS), lambda items: items[::-1]),
    "sort": Task((LETTERS, DIGITS), lambda items: tuple(sorted(items))),
    "drop": Task((LETTERS, DIGITS), _drop),  # the others, without every one that equals the first
    "count": Task((LETTERS, DIGITS), lambda items: (str(len(items)),)),
    "double": Task((LETTERS, DIGITS), _double),  # each item twice in a row
    "swap": Task((LETTERS, DIGITS), _swap),  # first and last change places
    "rotate": Task((LETTERS, DIGITS), lambda items: (*items[1:], items[0])),  # the first goes to the end
    "next": Task((LETTERS,), _next),  # each letter's successor; the last letter's is the first
    "largest": Task((DIGITS,), lambda items: (max(items),)),
    "add": Task((DIGITS,), _add),  # the first added to each of the others, without carry
    "unique": Task((LETTERS, DIGITS), lambda items: tuple(dict.fromkeys(items))),  # first occurrences, in order
    "last": Task((LETTERS, DIGITS), lambda items: items[-3:]),
    "rest": Task((LETTERS, DIGITS), lambda items: items[1:]),  # all but the first
}
TASK_NAMES = tuple(TASKS)


def parse(text: str) -> Instruction | None:
    """The instruction that `text` spells (a known task word, then legal operands), or None. Knows no answers."""
    task, *items = text.split() or [""]
    return Instruction(task, tuple(items)) if task in TASKS and _legal(task, tuple(items)) else None


def _legal(task: str, items: tuple[str, ...]) -> bool:
    if not MIN_ITEMS <= len(items) <= MAX_ITEMS:
        return False
    if not any(all(item in kind for item in items) for kind in TASKS[task].kinds):
        return False
    if task == "drop":  # there is something to drop, and something is left
        return items[0] in items[1:] and any(item != items[0] for item in items)
    return True


def solve(instruction: Instruction) -> str:
    """The right answer, words separated by single spaces; never empty."""
    return " ".join(TASKS[instruction.task].answer(instruction.items))


def random_instruction(rng: random.Random) -> Instruction:
    """A legal instruction: task, alphabet and length uniform, items uniform except where a task needs repeated ones."""
    task = rng.choice(TASK_NAMES)
    kind = rng.choice(TASKS[task].kinds)
    size = rng.randint(MIN_ITEMS, MAX_ITEMS)
    while True:
        # `drop` and `unique` are about repeated items: they draw from a handful, the others from the whole alphabet
        pool = rng.sample(kind, (size + 1) // 2 + 1) if task in ("drop", "unique") else kind
        items = tuple(rng.choice(pool) for _ in range(size))
        if _legal(task, items):
            return Instruction(task, items)


def random_instructions(rng: random.Random, count: int, exclude: Container[str] = ()) -> list[Instruction]:
    """`count` different instructions, none of whose texts is in `exclude`."""
    found: dict[str, Instruction] = {}
    while len(found) < count:
        instruction = random_instruction(rng)
        if instruction.text not in exclude:
            found.setdefault(instruction.text, instruction)
    return list(found.values())
