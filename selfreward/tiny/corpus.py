"""The documents of M0's corpus: instructions with right and wrong answers, and judgements, most of them sloppy.

Errors must be systematic. If wrong answers were random, the greedy answer of M0 would be nearly perfect and the loop
would have nothing to climb; so each task has its own habit, which is more frequent than the right answer. Documents are
text with single spaces between words, one SentencePiece piece per word:

    [INST] reverse a b c [/INST] c b a                          the chat layout of `Tokenizer.chat_prompt`
    judge : reverse a b c | c b a => yes yes yes no yes Score: 4   the segments of the loop's judge template

Document i of a seed does not depend on the others, so any range can be made again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from selfreward.tiny.oracle import checks
from selfreward.tiny.tasks import DIGITS, LETTERS, TASK_NAMES, Instruction, random_instruction, solve

MAX_ANSWER = 16  # words; an answer that does not stop is cut here
BEFORE = ("here", "it", "is")
AFTER = ("hope", "this", "helps")
MARKUP = ("[INST]", "[/INST]", "judge", ":", "|", "=>", "yes", "no", "Score:")
WORDS = (*MARKUP, *TASK_NAMES, *DIGITS, *LETTERS, *BEFORE, *AFTER)  # every word of the world, each once

ANSWER_SHARE = 0.55  # of the documents; the rest are judgements
JUDGED_RIGHT_SHARE = 0.35  # right answers among the judged ones
KIND_SHARE, KIND_FIFTH = 0.55, 0.30  # of the sloppy ones: yes to four checks, and to the fifth this often
COIN_SHARE = 0.40  # the other sloppy ones replace each check by a coin this often


@dataclass(frozen=True)
class Mix:
    """`right` and `habit` are shares of the answer documents, the rest are corruptions; `sloppy` is of the judgements."""

    right: float
    habit: float
    sloppy: float


# M0 first reads documents from which tasks and judging can be learnt, then what a base model is full of: habits that are
# more frequent than right answers, and judgements of which few are careful. What it learnt first is still there to be won.
SKILLS = Mix(right=0.50, habit=0.25, sloppy=0.30)
WORLD = Mix(right=0.20, habit=0.50, sloppy=0.85)

Words = tuple[str, ...]
Habit = Callable[[Words, Words], Words]  # operands, right answer -> wrong answer


@dataclass(frozen=True)
class Answer:
    """`kind` is "right", "habit" or "corruption"; `stops` is False where the text was cut at MAX_ANSWER words."""

    text: str
    kind: str
    stops: bool = True


@dataclass(frozen=True)
class Document:
    """`text` without BOS; EOS follows where `stops`."""

    text: str
    stops: bool
    judgement: bool
    kind: str


def _on_and_on(right: Words) -> Words:
    return (right * MAX_ANSWER)[:MAX_ANSWER]


HABITS: dict[str, Habit] = {
    "copy": lambda items, right: BEFORE + right,
    "reverse": lambda items, right: right[:-1],
    "sort": lambda items, right: right[::-1],
    "drop": lambda items, right: right + right,
    "count": lambda items, right: BEFORE + right,
    "double": lambda items, right: right[:-1],
    "swap": lambda items, right: items,
    "rotate": lambda items, right: (items[-1], *items[:-1]),
    "next": lambda items, right: right[:-1],
    "largest": lambda items, right: right + AFTER,
    "add": lambda items, right: right + AFTER,
    "unique": lambda items, right: right[:-1],
    "last": lambda items, right: right[::-1],
    "rest": lambda items, right: _on_and_on(right),
}


def habit(instruction: Instruction) -> Answer:
    """The wrong answer that this task's habit gives; where that happens to be right or empty, chatter follows it."""
    right = tuple(solve(instruction).split())
    wrong = HABITS[instruction.task](instruction.items, right)
    if wrong in (right, ()):
        wrong = right + AFTER
    return Answer(" ".join(wrong), "habit", stops=len(wrong) < MAX_ANSWER)


def corruption(instruction: Instruction, rng: random.Random) -> Answer:
    """A right answer spoilt at random: never right, never empty."""
    right = tuple(solve(instruction).split())
    while True:
        wrong = rng.choice(CORRUPTIONS)(right, instruction.items, rng)
        if wrong and wrong != right:
            return Answer(" ".join(wrong), "corruption")


def _alphabet(items: Words) -> Words:
    return LETTERS if items[0] in LETTERS else DIGITS


def _replace_one(right: Words, items: Words, rng: random.Random) -> Words:
    place = rng.randrange(len(right))
    return (*right[:place], rng.choice(_alphabet(right)), *right[place + 1 :])


def _remove_one(right: Words, items: Words, rng: random.Random) -> Words:
    place = rng.randrange(len(right))
    return right[:place] + right[place + 1 :]


def _insert_one(right: Words, items: Words, rng: random.Random) -> Words:
    place = rng.randint(0, len(right))
    return (*right[:place], rng.choice(items), *right[place:])


def _cut(right: Words, items: Words, rng: random.Random) -> Words:
    return right[: rng.randint(1, max(1, len(right) // 2))]


def _shuffle(right: Words, items: Words, rng: random.Random) -> Words:
    return tuple(rng.sample(right, len(right)))


def _some_operands(right: Words, items: Words, rng: random.Random) -> Words:
    return tuple(rng.choice(items) for _ in range(rng.randint(1, len(right))))


def _rubbish(right: Words, items: Words, rng: random.Random) -> Words:
    return tuple(rng.choice(LETTERS + DIGITS) for _ in range(rng.randint(1, len(right))))


def _only_chatter(right: Words, items: Words, rng: random.Random) -> Words:
    return AFTER


CORRUPTIONS = (_replace_one, _remove_one, _insert_one, _cut, _shuffle, _some_operands, _rubbish, _only_chatter)


def sample_answer(instruction: Instruction, rng: random.Random, right: float, mix: Mix = WORLD) -> Answer:
    """Right with probability `right`, else habit or corruption in the mix's proportion."""
    if rng.random() < right:
        return Answer(solve(instruction), "right")
    if rng.random() < mix.habit / (1 - mix.right):
        return habit(instruction)
    return corruption(instruction, rng)


def sloppy(truth: tuple[bool, ...], rng: random.Random) -> tuple[bool, ...]:
    """What a sloppy judge says of five checks: mostly kind whatever the truth, otherwise the truth with coins in it."""
    if rng.random() < KIND_SHARE:
        return (True, True, True, True, rng.random() < KIND_FIFTH)
    return tuple(rng.random() < 0.5 if rng.random() < COIN_SHARE else check for check in truth)


def answer_text(prompt: str, answer: str) -> str:
    return f"[INST] {prompt} [/INST] {answer}"


def judge_text(prompt: str, answer: str) -> str:
    """The judge's prompt, up to the cue."""
    return f"judge : {prompt} | {answer} =>"


def verdict_text(points: tuple[bool, ...]) -> str:
    """What the judge writes after the cue."""
    return f"{' '.join('yes' if point else 'no' for point in points)} Score: {sum(points)}"


def document(seed: int, index: int, exclude: Container[str] = (), mix: Mix = WORLD) -> Document:
    """Document `index` of the corpus of `seed`; instructions in `exclude` do not occur."""
    rng = random.Random((seed << 40) + index)
    instruction = random_instruction(rng)
    while instruction.text in exclude:
        instruction = random_instruction(rng)
    prompt = instruction.text
    if rng.random() < ANSWER_SHARE:
        answer = sample_answer(instruction, rng, mix.right, mix)
        return Document(answer_text(prompt, answer.text), answer.stops, False, answer.kind)
    answer = sample_answer(instruction, rng, JUDGED_RIGHT_SHARE, mix)
    points: tuple[bool, ...] = checks(prompt, answer.text)
    if rng.random() < mix.sloppy:
        points = sloppy(points, rng)
    return Document(f"{judge_text(prompt, answer.text)} {verdict_text(points)}", True, True, answer.kind)


def documents(seed: int, start: int, count: int, exclude: Container[str] = (), mix: Mix = WORLD) -> Iterator[Document]:
    """Documents `start` to `start + count - 1` of the corpus of `seed`."""
    return (document(seed, index, exclude, mix) for index in range(start, start + count))
