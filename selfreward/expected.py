"""The expected score: what the judge's distribution says at the step where it wrote its score.

A drawn digit is one sample of that distribution; its mean over the scores 0 to 5 has no ties to speak of and shows how
sure the judge was. Log-probs are raw (temperature 1, before top-p), whatever the draws were sampled with.
What it cannot know: "4" also begins "4.5", and "1" begins "10"; a score is read where a single token wrote a single digit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine import InputError, Tokenizer
from selfreward.judge import TOP_SCORE

SCORES = range(int(TOP_SCORE) + 1)


class Distribution(NamedTuple):
    """Over the scores 0 to 5, normalised; `mass` is the share of all probability that their tokens had."""

    probabilities: list[float]  # [6]
    mass: float

    @property
    def expected(self) -> float:
        return math.fsum(score * p for score, p in zip(SCORES, self.probabilities, strict=True))


def score_labels(tokenizer: Tokenizer) -> dict[int, int]:
    """Token id -> the score that it spells; all spellings ("4", "4" behind a space, a byte) are the same score."""
    labels = {}
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token]).strip()
        if len(text) == 1 and text in "012345":
            labels[token] = int(text)
    missing = sorted(set(SCORES) - set(labels.values()))
    if missing:
        raise InputError(
            f"judge.score is 'expected', and {tokenizer.path} has no token for {', '.join(map(str, missing))}: set it to mean"
        )
    return labels


def score_step(
    text: str, span: tuple[int, int], ids: Sequence[int], labels: dict[int, int], decode: Callable[[Sequence[int]], str]
) -> int | None:
    """Which of the tokens wrote text[begin:end], the score; None unless it is one digit that one token wrote.

    text: decode(ids), but for a stop token at the end of the ids. What is found is checked, never guessed: the bytes of a
    character that is not complete decode to more characters than it has, so the beginning may be long enough too early,
    never too late.
    """
    begin, end = span
    if end - begin != 1:
        return None
    first = bisect_right(range(len(ids)), begin, key=lambda number: len(decode(ids[: number + 1])))
    for step in range(first, len(ids)):
        if str(labels.get(ids[step])) == text[begin:end] and decode(ids[: step + 1]) == text[:end]:
            return step
    return None


def distribution(logprobs: Sequence[float], scores: Sequence[int]) -> Distribution:
    """From the log-probs of the labels and the score that each of them spells."""
    found = [math.fsum(math.exp(p) for p, of in zip(logprobs, scores, strict=True) if of == score) for score in SCORES]
    mass = math.fsum(found)
    return Distribution([p / mass for p in found], mass)
