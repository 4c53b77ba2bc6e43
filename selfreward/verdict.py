"""A judge that sees two answers at once: how it is asked, and which of them what it writes decides for."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import NamedTuple

from selfreward.block_template import BlockTemplate


class PairwiseTemplate(BlockTemplate):
    """A prompt for two answers: token_ids(tokenizer, prompt, first, second). Shipped: "llama2"."""

    kind = "pairwise"
    variables = ("prompt", "first", "second")
    blocks = MappingProxyType(
        {"rubric": (), "prompt": ("prompt",), "first": ("prompt", "first"), "second": variables, "cue": variables}
    )


class Verdict(NamedTuple):
    """`winner` is "first", "second" or "tie" where `status` is "ok", else None."""

    winner: str | None
    status: str


# ---- reading a verdict --------------------------------------------------------------------------------------------------

_NAMES = {"a": "first", "1": "first", "first": "first", "b": "second", "2": "second", "second": "second"}
_TIES = r"tied?|equal(?:ly good)?|a draw|draw|neither|both"
# A letter is a name only as a capital, and only where no noun follows it: "the better one is a short one", "A clear case".
_LETTER = r"[AB12](?![\w'])(?=\W*(?:$|\n|[.,;:!)]|is\b|was\b|wins\b|because\b|since\b|as\b|by\b))"
_SIDE = rf"(?:(?i:the |a )?(?i:response|answer|assistant|option) )?({_LETTER}|(?i:first|second|{_TIES})\b)"
_KEYED = re.compile(
    rf"\b(?i:verdict|winner|preference|preferred (?:response|answer)|better (?:response|answer))"
    rf"(?: ?[:=] ?| (?i:is)(?: ?: ?| )(?i:the )?){_SIDE}(?! ?(?:(?i:or|and)\b|[,/] ?[AB12]\b))"
)
_BRACKETS = re.compile(r"\[\[ ?([ABab]|[Cc]|(?i:tie)) ?\]\]")
_SENTENCE = re.compile(
    r"\b((?i:response|answer|assistant|option) [AB12]|(?i:the (?:first|second) (?:response|answer))|[AB]) (?i:is)"
    r" (?i:clearly |slightly |much |somewhat |the |overall )*(?i:better|best|stronger|superior)\b"
)
_BARE = re.compile(r"^(?:(?i:response|answer|assistant|option) )?([AB]|(?i:tie))[.!]?$", re.MULTILINE)
_NEGATED = re.compile(r"(?i:\bnot|n't|\bnever|\bif|\bwhether)(?: \w+){0,4} ?$")


def parse_verdict(text: str, finish_reason: str = "stop") -> Verdict:
    """What a comparison decides. Statuses: ok, no_verdict, ambiguous, truncated (cut before a verdict), empty.

    Three ranks; the first that finds anything decides: an explicit verdict ("Verdict: A", "[[A]]", "the winner is B",
    "Verdict: tie"); a sentence ("Response A is better"); a letter or "tie" alone on a line. Different verdicts of one rank
    are `ambiguous`: nothing is guessed.
    """
    if not text.strip():
        return Verdict(None, "empty")
    brackets = _BRACKETS.findall(text)
    plain = re.sub(r"[^\S\n]+", " ", re.sub(r"[*`\"“”_{}\[\]<>()#]", " ", text))
    plain = re.sub(r" ?\n ?", "\n", plain).strip()
    for found in (brackets + _sides(_KEYED, plain), _sides(_SENTENCE, plain), _sides(_BARE, plain)):
        winners = {_winner(side) for side in found}
        if len(winners) > 1:
            return Verdict(None, "ambiguous")
        if winners:
            return Verdict(winners.pop(), "ok")
    return Verdict(None, "truncated" if finish_reason == "length" else "no_verdict")


def _sides(pattern: re.Pattern[str], text: str) -> list[str]:
    """What the matches name, but for those behind a negation on the same line."""
    found = pattern.finditer(text)
    before = ((match, text[max(0, match.start() - 60) : match.start()].rpartition("\n")[2]) for match in found)
    return [match[1] for match, words in before if not _NEGATED.search(words)]


def _winner(side: str) -> str:
    """Of "A", "response B", "the second answer", "a draw"."""
    names = [_NAMES[word] for word in side.lower().split() if word in _NAMES]
    return "tie" if not names or re.search(_TIES, side, re.IGNORECASE) else names[-1]
