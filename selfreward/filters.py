"""Which new prompts may join those that there are: the filters of Self-Instruct (arXiv 2212.10560, section 2.2).

`Sieve` takes texts in order: a kept one joins the pool that the next ones are compared with. ROUGE-L is the F measure
2 * LCS / (m + n) over words, without stemming, as the package rouge_score computes it.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from engine import InputError
from selfreward.seeds import same

LEVELS = ("none", "similar", "self_instruct")  # each drops what the one before drops, and more
MIN_WORDS, MAX_WORDS = 4, 150
KEYWORDS = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
    *("draw", "plot", "go to"),
)  # what a model of text cannot see or do
BLOCK, PART = 256, 8192  # new texts, and texts of the pool, in one table of LCS lengths: 8 MB

_KEYWORD = re.compile(rf"\b(?:{'|'.join(KEYWORDS)})\b", re.IGNORECASE)
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
)
_MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c) in ("Mn", "Mc"))
_WORD = re.compile(rf"\w[\w{_MARKS}]*")  # a mark (an accent, a vowel sign of Hindi) goes on with its word


def spaced(text: str) -> str:
    """The text with blanks around every character of a script that writes none between words (Chinese, Japanese, Thai,
    Lao, Burmese, Khmer): there a character counts as a word."""
    return _UNSPACED.sub(r" \1 ", text)


def word_count(text: str) -> int:
    return len(spaced(text).split())


def words(text: str) -> list[str]:
    """Lower case, letters and digits: of ASCII text what rouge_score takes ([a-z0-9]+), of any other the same idea, where
    rouge_score finds nothing at all."""
    return _WORD.findall(spaced(text.lower().replace("_", " ")))


def wording(text: str) -> str | None:
    """Why Self-Instruct drops a text whatever else there is, or None; in the order of its code, which has the text
    capitalised, with all other letters small (here a kept text stays as it is)."""
    if word_count(text) < MIN_WORDS:
        return "too_short"
    if word_count(text) > MAX_WORDS:
        return "too_long"
    if _KEYWORD.search(text):
        return "keyword"
    if text.lower().startswith("write a program"):  # models write these in masses
        return "program"
    if text[0] in string.punctuation:
        return "punctuation"
    return None if text[0].isascii() else "non_ascii"


class Rouge:
    """ROUGE-L of new texts against a growing pool. Exact: every pair is computed, about 40 ns each on two cores."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}
        self._pool: list[str] = []

    def spelled(self, text: str) -> str:
        """One character for each word, so that a sequence of words is a string, rapidfuzz's fastest input."""
        return "".join(self._letter(word) for word in words(text))

    def _letter(self, word: str) -> str:
        if word not in self._letters:
            self._letters[word] = chr(_code(len(self._letters)))
        return self._letters[word]

    def add(self, spelled: str) -> None:
        self._pool.append(spelled)

    def highest(self, spelled: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Of each text the highest F against the pool, float64 [texts], and the place of the first that has it, int64
        [texts]; 0 and -1 with an empty pool."""
        best, place = np.zeros(len(spelled)), np.full(len(spelled), -1)
        for start in range(0, len(self._pool), PART):
            found = rouge_l(spelled, self._pool[start : start + PART])
            here = found.argmax(axis=1)
            value = found[np.arange(len(spelled)), here]
            place = np.where((value > best) | (place < 0), here + start, place)
            best = np.maximum(best, value)
        return best, place


def rouge_l(some: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """F of every pair of spelled texts, float64 [some, others]; 0 where neither has a word."""
    lcs = process.cdist(some, others, scorer=LCSseq.similarity, dtype=np.int32, workers=-1)
    lengths = np.add.outer([len(text) for text in some], [len(text) for text in others])
    return 2 * lcs / np.maximum(lengths, 1)


def _code(number: int) -> int:
    """A code point for a word's number, none of them a surrogate."""
    code = number if number < 0xD800 else number + 0x800
    if code > 0x10FFFF:
        raise InputError(
            "the prompts have more than 1,112,064 different words, which the ROUGE-L filter cannot tell apart; set "
            "prompts.filter=none, or give fewer prompts"
        )
    return code


@dataclass(frozen=True)
class Verdict:
    """`reason` is None for a text that was kept. `rouge`: the highest against the pool before it, where it was computed;
    `like`: the text that it is similar to, where that is the reason."""

    reason: str | None
    rouge: float | None = None
    like: str | None = None


class Sieve:
    """Keeps new texts or says why not, one after the other; a kept one joins the pool.

    known: texts that there are already. level, of LEVELS: "none" drops exact repetitions (`known`, `duplicate`) and what
    `is_valid` refuses (`invalid`); "similar" also what differs only in case and blanks (`near_duplicate`) and what has a
    ROUGE-L above `rouge` (`similar`); "self_instruct" also what `wording` refuses.
    """

    def __init__(
        self, known: Iterable[str], level: str = "none", rouge: float = 0.7, is_valid: Callable[[str], bool] = bool
    ) -> None:
        self._level, self._limit, self._is_valid = LEVELS.index(level), rouge, is_valid
        self._known, self._kept, self._same = set(known), set[str](), set[str]()
        self._rouge, self._texts = Rouge(), list[str]()
        if self._level:
            for text in sorted(self._known):
                self._add(text, self._rouge.spelled(text))

    def sift(self, texts: Sequence[str], most: int | None = None) -> list[Verdict]:
        """A verdict for each text, in order; what comes after `most` kept ones is dropped as `enough`."""
        verdicts: list[Verdict] = []
        for start in range(0, len(texts), BLOCK):
            kept = sum(verdict.reason is None for verdict in verdicts)
            verdicts += self._sift(texts[start : start + BLOCK], None if most is None else most - kept)
        return verdicts

    def _sift(self, texts: Sequence[str], most: int | None) -> list[Verdict]:
        """A block: compared with the pool as it stands in one go, and with one another."""
        spelled = [self._rouge.spelled(text) if self._level and not self._plain(text) else "" for text in texts]
        best, place = self._rouge.highest(spelled)
        within = rouge_l(spelled, spelled) if self._level else np.zeros(0)
        verdicts, joined, pool = list[Verdict](), list[int](), len(self._texts)
        for number, text in enumerate(texts):
            if len(joined) == most:
                verdicts.append(Verdict("enough"))
                continue
            verdict = Verdict(self._plain(text))
            if verdict.reason is None and self._level:
                pairs = [(float(best[number]), int(place[number]))]
                pairs += [(float(within[number, other]), pool + n) for n, other in enumerate(joined)]
                rouge, nearest = max(pairs, key=lambda pair: pair[0])
                similar = rouge > self._limit
                verdict = Verdict("similar" if similar else None, rouge, self._texts[nearest] if similar else None)
            if verdict.reason is None:
                joined.append(number)
                self._kept.add(text)
                if self._level:
                    self._add(text, spelled[number])
            verdicts.append(verdict)
        return verdicts

    def _plain(self, text: str) -> str | None:
        """What needs no comparison of words."""
        if text in self._known:
            return "known"
        if text in self._kept:
            return "duplicate"
        if not text.strip() or not self._is_valid(text):
            return "invalid"
        if self._level and same(text) in self._same:
            return "near_duplicate"
        return wording(text) if self._level == LEVELS.index("self_instruct") else None

    def _add(self, text: str, spelled: str) -> None:
        self._same.add(same(text))
        self._texts.append(text)
        self._rouge.add(spelled)
