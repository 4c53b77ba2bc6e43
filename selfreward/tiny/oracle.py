"""The truth of the tiny world: five additive yes/no points per answer. Only reports and tests see it, never the loop.

The points follow the judge prompt's ladder: relevant, a substantial part right, the right size, clean, exactly right.
An answer that is not relevant gets none of them, so empty answers and rubbish grade 0, and only the right answer 5.
"""

from __future__ import annotations

from selfreward.tiny.tasks import DIGITS, LETTERS, Instruction, parse, solve

ITEMS = frozenset(LETTERS + DIGITS)

Checks = tuple[bool, bool, bool, bool, bool]
NOTHING: Checks = (False, False, False, False, False)


def checks(prompt: str, answer: str) -> Checks:
    """The five points of `answer`, judged by its words.

    1. relevant: it has items, and at least half of them could belong to an answer of this instruction
    2. substantial part right: chatter aside, half of the positions hold the right item
    3. right size: chatter aside, as many items as the right answer
    4. clean: items only, and it does not go on beyond the right length
    5. exactly right
    """
    instruction = parse(prompt)
    if instruction is None:
        return NOTHING
    words, right = answer.split(), solve(instruction).split()
    items = [word for word in words if word in ITEMS]
    possible = _possible(instruction, right)
    if not items or 2 * sum(item in possible for item in items) < len(items):
        return NOTHING
    agreeing = sum(item == expected for item, expected in zip(items, right, strict=False))
    clean = len(items) == len(words) <= len(right)
    return True, 2 * agreeing >= len(right), len(items) == len(right), clean, words == right


def grade(prompt: str, answer: str) -> int:
    """The number of points, 0 to 5. An instruction that is not well-formed has no right answer: 0."""
    return sum(checks(prompt, answer))


def _possible(instruction: Instruction, right: list[str]) -> frozenset[str]:
    """Items that do not miss the subject: the operands', the right answer's; for `count` any digit."""
    return frozenset(DIGITS) if instruction.task == "count" else frozenset(instruction.items).union(right)
