"""The judge's two ends: the template that asks for a score, and the parser that reads what came back.

A failure to read a score is a status, never a number: nothing is clamped, guessed or floored.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from selfreward.block_template import BlockTemplate

TOP_SCORE = 5.0
STATUSES = ("ok", "no_score", "ambiguous", "out_of_range", "truncated", "empty", "prompt_too_long", "duplicate")


@dataclass(frozen=True)
class Judgement:
    """One reading of one judgement text. `score` is in 0..5 where `status` is "ok", else None.

    span: text[begin:end] is where the score is written, digits and a minus only; the first place of those that agree.
    """

    score: float | None
    status: str
    span: tuple[int, int] | None = field(default=None, compare=False)


class _Found(NamedTuple):
    """A value and where it stands in the plain text."""

    value: float
    begin: int
    end: int


# ---------------------------------------------------------------------------------------------------------------------
# Reading a score


def parse_score(text: str) -> Judgement:
    """The score that a judgement states. Statuses: ok, no_score, ambiguous, out_of_range.

    Four ranks; the first that finds anything decides:

    1. an explicit total ("Score: 4", "4/5", "total 4", "4 out of 5"); different values are `ambiguous`
    2. a verdict in words ("I would give it a 4."); the last counts
    3. "n points"; the last counts
    4. a bare number on a line of its own ("4", "Verdict: 4"); the last counts

    Points of a single criterion ("+1", "1 point for") are no totals. Only ASCII digits are read. A total on another
    scale ("8/10") is `out_of_range`.
    """
    text, places = _plain(text)
    totals = _keyed_totals(text) + _fractions(text, lambda scale: scale == TOP_SCORE)
    totals = totals or _fractions(text, lambda scale: scale in (10, 100))
    if len({found.value for found in totals}) > 1:
        return Judgement(None, "ambiguous")
    values = totals or _verdicts(text) or _point_totals(text) or _bare_numbers(text)
    if not values:
        return Judgement(None, "no_score")
    score = values[-1].value + 0.0  # "-0" is 0
    if not 0 <= score <= TOP_SCORE:
        return Judgement(None, "out_of_range")
    first = _first_that_agrees(values)
    return Judgement(score, "ok", (places[first.begin], places[first.end - 1] + 1))


def _first_that_agrees(values: list[_Found]) -> _Found:
    """Where the value that counts was decided on: equal ones behind it repeat it."""
    ordered = sorted(values, key=lambda found: found.begin)
    different = [number for number, found in enumerate(ordered) if found.value != values[-1].value]
    return ordered[different[-1] + 1 if different else 0]


def judge_status(text: str, finish_reason: str) -> Judgement:
    """`parse_score` for a sampled judgement: also tells `empty` text and `truncated` apart.

    Truncated: cut before any score, or right behind its digits ("Score: 1" could go on with " + 1 = 2"), except for a
    number alone, which is what a judge writes that is asked for nothing else.
    """
    if not text.strip():
        return Judgement(None, "empty")
    judgement = parse_score(text)
    if finish_reason != "length":
        return judgement
    begin, end = judgement.span or (0, 0)
    at_the_end = end == len(text) and bool(text[:begin].strip())
    return Judgement(None, "truncated") if at_the_end or judgement.status == "no_score" else judgement


def mean_score(judgements: Iterable[Judgement], min_valid: int = 1) -> float | None:
    """Mean of the `ok` scores, never floored; None if fewer than `min_valid` draws are readable."""
    scores = [j.score for j in judgements if j.score is not None]
    return math.fsum(scores) / len(scores) if len(scores) >= max(1, min_valid) else None


OFF_SCALE = math.inf  # a total that says itself that it is not out of 5

# A number that ends where it seems to end: not the start of "4.5.1", "4,5", "3rd" or a longer token.
_NUM = r"[0-9]+(?:\.[0-9]+)?(?![.,]?[0-9])(?!(?!(?:points?|pts)\b)\w)"
_OUT_OF = r"(?:/|out of(?: an?)?(?: (?:possible|maximum|total)(?: of)?)?)"

_SCALE = r"[01] ?(?:-|\u2013|to|\.\.)"

_KEYED = re.compile(
    r"(?<![\w-])(?:(?:total|final|overall) ){0,4}(?P<key>scores?|total|ratings?|grade)"
    r"(?: (?:number of )?points?)?(?: (?:awarded|given|assigned|earned))?(?: (?:for|to) (?:this|the) (?:response|answer))?"
    rf"(?P<scale> ?(?:\([^()\n]{{1,30}}\)|{_OUT_OF} ?[0-9]+|{_SCALE} ?[0-9]+(?= ?[:=])))?"
    r"(?: ?(?:[-=]+>|\u2192) ?| ?-- ?"  # Score -> 4
    rf"| ?[:=\uff1a] ?(?:\n+(?={_NUM}(?:\n|$)))?"  # Score: 4, or the number alone on the line below
    r"| ?[\u2013\u2014] ?| ?- |-(?=[0-9])"  # Score - 4
    r"| (?:is|was|of|as|would be|comes to|equals)(?: (?:therefore|thus|hence))? ?:? ?(?:an? )?"
    r"|(?P<bare> ))"  # Score 4
    rf"\(?(?P<value>-?{_NUM})"
    rf"(?P<range>(?:-| ?\u2013 ?| ?(?:[-=]+>|\u2192) ?| ?to | ?or | - (?={_NUM}(?:[.;)\n/]| points?| out of|$))){_NUM})?"
    r"(?: ?(?:points?|pts)\b)?"
    rf"(?: ?{_OUT_OF} ?(?P<denominator>{_NUM}))?(?P<percent> ?%)?",
    re.IGNORECASE,
)
_SCALE_END = re.compile(rf"(?:{_OUT_OF}|{_SCALE}|max\w*) ?([0-9]+)", re.IGNORECASE)
_FRACTION = re.compile(
    rf"(?<![\w./,-])(?P<value>-?{_NUM}) ?(?:points? )?"
    rf"(?:{_OUT_OF} ?(?P<scale>{_NUM})(?!/)|(?:out )?of (?:the )?(?P<scale_of>{_NUM}) (?:possible |available )?points\b)",
    re.IGNORECASE,
)
_VERDICT = re.compile(
    r"\b(?:giv(?:e|es|en|ing)|rat(?:e|es|ed|ing)|scor(?:e|es|ed|ing)|grad(?:e|es|ed|ing)|deserves?|merits?|earns?|gets?"
    r"|receives?|award(?:s|ed)?|assign(?:s|ed)?)"
    r"(?:(?: (?:it|this|that|the|response|answer|reply|overall|only|as|at)){1,5}(?: an?)?| an?)"
    rf" (?P<value>{_NUM})(?= ?(?:stars?\b|because\b|since\b|[.,;:!)\n]|$))",
    re.IGNORECASE,
)
_POINTS = re.compile(
    rf"(?<![\w.,/+-])(?P<value>{_NUM}) ?(?:points?|pts)\b"
    rf"|(?<!\w)points?(?: (?:awarded|given|earned))? ?[:=\uff1a] ?(?P<after>-?{_NUM})",
    re.IGNORECASE,
)
_BARE = re.compile(
    r"^(?:(?:final|overall|my) ){0,4}(?:(?:overall|final|verdict|result|evaluation|assessment|judge?ment|answer|sum) ?(?=[:=]))?"
    r"[:=]? ?\(?(?P<value>-?[0-9]{1,3}(?:\.[0-9]+)?)\)?$",
    re.MULTILINE | re.IGNORECASE,
)
_TERM = rf"{_NUM}(?: points?)?(?: ?\([^()\n]{{1,40}}\))?"
_SUM = re.compile(
    rf"(?<![\w.+])\(?\+?{_TERM}(?: ?(?:[-+\u2013]|plus|minus) ?{_TERM}){{1,12}}\)? ?= ?(?={_NUM})", re.IGNORECASE
)

# What stands before a number and takes its meaning as the verdict away.
_CRITERION = (
    r"(?:relevan\w+|coverage|completeness|usefulness|helpfulness|clarity|organi[sz]ation|expertise|depth|accuracy"
    r"|correctness|style|tone|grammar|fluency|creativity|engagement|safety|harmlessness|honesty|readability|structure|format\w*"
    r"|conciseness|detail|originality|factuality|coherence|truthfulness|utility|criterion(?: [0-9])?|perspective)"
)
_OF_ONE = re.compile(  # "Relevance: 5/5", "Clarity gets a 4", "Step 4/5"
    rf"\b{_CRITERION}(?: score)? ?(?:[:=(\u2013-]|(?:is|gets|earns|receives|deserves|scores)(?: an?)?)? ?$"
    r"|\b(?:step|page|part|chapter|question|day|slide) $",
    re.IGNORECASE,
)
_FOR_ONE = re.compile(rf" ?(?:points? )?(?:for|on|in) (?:the |its )?{_CRITERION}\b", re.IGNORECASE)
_ONE_CRITERION = re.compile(
    rf"(?:{_CRITERION}"
    r"|max\w*|minimum|highest|lowest|possible|sub|average|previous|each)[ -]$",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"(?:\bnot|\bcannot|n't|\bnever|\bshort of|\binstead of|\brather than|\b(?:less|more|lower|higher) than|\babove"
    r"|\bbelow|\bat (?:least|most)|\bup to|\bnearly|\balmost|\bclose to|\b(?:w|c)ould have been"
    r"|\bto (?:reach|get|earn|receive|achieve))(?: \w+){0,3} ?$",
    re.IGNORECASE,
)
_SOME_POINTS = re.compile(
    r"(?:\bof (?:the |a )?|\bto |\+ ?|\badd(?:s|ed|ing)? (?:an? )?|\b(?:another|additional|extra|further|worth) "
    r"|\bmax\w* (?:of )?|\b(?:lists?|listed|covers?|covered|raises?|raised|mentions?|contains?|includes?|asked for|there are"
    r"|miss(?:es|ed)|explains?|address(?:es|ed)?|presents?|discuss(?:es|ed)?|describes?|on|(?:it|response|answer) makes) "
    r"|(?<!result )(?<!results )(?<!resulting )\bin "
    r"|\bstart(?:s|ed|ing)? (?:from|at|with) |\b(?:loses?|lost|losing|minus|less) "
    r"|\b(?:deduct|subtract)\w* |[0-9] ?(?:-|\u2013|or) ?)$",
    re.IGNORECASE,
)
# What stands behind it and does the same.
_CONDITIONAL = re.compile(
    r" (?:or|and) (?:higher|above|more|lower|less|below|better)\b| ?\+| (?:if|when|of(?! 5\b))\b"
    r"|[-\u2013] ?(?:\n|$)| and (?:a|one) half\b| [1-9]/[2-9]\b"  # "4-", a range that was cut; "3 1/2"
    r"|(?: [0-9]+(?!\w)){3}| ?/ ?[0-9]|:[0-9]|,? (?:minus|plus|less|times|x) [0-9]"
    r"| (?:von|sur|de) (?!5\b)[0-9]| (?:cups?|spoons?)\b"
    r"| would (?!be\b)"  # "a score of 5 would need"
    r"| (?:people|users|doctors|dentists|experts|students|steps|items|questions|parts|tips|examples|times|requirements|requests"
    r"|sources|facts|claims|errors|mistakes|sentences|paragraphs|reasons|topics|ideas|words|lines|pages|goals|days|years)\b"
    r"|, ?[0-9](?! ?[\w/]|\.[0-9])"  # "1, 1, 0": of each criterion
    r"| ?\([^()\n]{1,40}\) ?[+,=] ?[0-9]"  # "1 (relevance), 1 (coverage)"
    r"| ?(?:->|\u2192) ?(?:[a-z]+ ){0,2}[0-9]|[^\n\w]{1,4}(?:revised|changed|corrected|lowered|raised|reduced) to\b",
    re.IGNORECASE,
)
_OF_CRITERION = re.compile(
    r" ?(?:for|deducted|off|lost|each|per|if|when|more|short|about|scale|system"
    r"|(?:is|are|was|were) (?:added|deducted|missing|lost|not)"
    r"|(?:is|are) (?:awarded|given) (?:for|if|when))\b",
    re.IGNORECASE,
)


_LISTED = re.compile(  # "Points: 1 (relevance), 1 (coverage)", "Points: 1 for relevance" list criteria
    r" ?\([^\W\d]|, ?[0-9]| ?/(?! ?5\b)| for (?!it\b|(?:this|the|an?) (?:response|answer|reply))"
)
# "a total of 3 errors", "to score 2 goals"; but "a total of 4 points", "a total of 4 is fair"
_COUNTED = re.compile(r" (?!(?:points|pts|stars|is|was|as|this|has|seems|reflects|means|shows|indicates)\b)[a-z]+s\b")


def _plain(text: str) -> tuple[str, list[int]]:
    """The text without markup around words and numbers, sums replaced by their result, spaces made single.

    Second: for each of its characters, where it stands in the text. All steps up to the spaces keep the length.
    """
    text = text.replace("\r", "\n").replace("\u2212", "-").replace("\u2019", "'")
    text = re.sub(r"<(/?\w(?:[\w./ -]{0,30}\w)?)>", r" \1 ", text)  # <4>, <score>4</score>
    markup = r"\\(?:boxed|text\w*)|[*`\"\u201c\u201d_{}\[\]$#|]|(?<!\w)'|'(?!\w)"
    text = re.sub(markup, lambda found: " " * len(found[0]), text)
    places = list(range(len(text)))
    text, places = _shortened(r"[^\S\n]+", " ", text, places)
    text, places = _shortened(r" ?\n ?", "\n", text, places)
    blank = len(text) - len(text.lstrip())
    text = text.strip()
    return _shortened(_SUM, "", text, places[blank : blank + len(text)])


def _shortened(pattern: str | re.Pattern[str], by: str, text: str, places: list[int]) -> tuple[str, list[int]]:
    """re.sub by at most one character, which stands where the match began; `places` go along."""
    for match in reversed([match for match in re.finditer(pattern, text) if len(match[0]) > len(by)]):
        begin, end = match.span()
        places[begin:end] = places[begin : begin + len(by)]
    return re.sub(pattern, by, text), places


def _before(text: str, match: re.Match[str]) -> str:
    """The up to 60 characters before a match that stand on the same line."""
    return text[max(0, match.start() - 60) : match.start()].rpartition("\n")[2]


def _found(match: re.Match[str], group: str = "value", value: float | None = None) -> _Found:
    """What a group of a match says, or the value given, at its place."""
    return _Found(float(match[group]) if value is None else value, *match.span(group))


def _keyed_totals(text: str) -> list[_Found]:
    """Values announced by a word: "Score: 4", "total of 3.5", "Rating (out of 5) - 4"."""
    return [found for match in _KEYED.finditer(text) for found in _keyed_values(text, match)]


def _keyed_values(text: str, match: re.Match[str]) -> list[_Found]:
    """No value if the match is no verdict, two for a range ("3-4"), else one."""
    before, after = _before(text, match), text[match.end() :]
    if _ONE_CRITERION.search(before) or _NEGATED.search(before) or _CONDITIONAL.match(after):
        return []
    if _FOR_ONE.match(after):
        return []
    if match["bare"] and re.match(r" ?[:=]|\.\.", after):  # "Score 1: ..." numbers a heading
        return []
    if match["bare"] and match["key"].lower() == "grade" and re.match(r" \w", after):  # "a grade 5 reading level"
        return []
    if "\n" in match[0] and re.match(rf"\n+{_NUM}(?:\n|$)", after):  # a column of numbers
        return []
    if re.search(r"\b(?:perfect|full|ideal) $", before) and re.search(r" (?:is|was|would be) ", match[0]):
        return []
    if (match["bare"] or match["key"].lower() == "total") and _COUNTED.match(after):
        return []
    if match["range"]:
        return [_found(match), _found(match, "range", OFF_SCALE)]
    scale = _SCALE_END.search(match["scale"] or "")
    stated = [float(s) for s in (scale and scale[1], match["denominator"]) if s]
    off_scale = match["percent"] or any(s != TOP_SCORE for s in stated)
    return [_found(match, value=OFF_SCALE if off_scale else None)]


def _fractions(text: str, wanted: Callable[[float], bool]) -> list[_Found]:
    """Values written over a wanted scale: "4/5", "4 out of 5", "4 of 5 points"."""
    values = []
    for match in _FRACTION.finditer(text):
        scale = float(match["scale"] or match["scale_of"])
        before, after = _before(text, match), text[match.end() :]
        one = _OF_ONE.search(before) or _FOR_ONE.match(after)
        some = match["scale_of"] and _SOME_POINTS.search(before)  # "it covers 3 of the 5 points"
        verdict = not (one or some or _NEGATED.search(before) or _CONDITIONAL.match(after))
        if verdict and wanted(scale):
            values.append(_found(match, value=None if scale == TOP_SCORE else OFF_SCALE))
    return values


def _not_all(before: str) -> bool:
    """Whether what stands before a number says that it is no verdict on the whole answer."""
    return bool(_NEGATED.search(before) or _OF_ONE.search(before))


def _verdicts(text: str) -> list[_Found]:
    """Values of sentences that give the response a number: "I would rate this response a 4."."""
    return [_found(match) for match in _VERDICT.finditer(text) if not _not_all(_before(text, match))]


def _point_totals(text: str) -> list[_Found]:
    """Values of "n points" that are no points of one criterion; several of at most 1 are criteria too."""
    values = []
    for match in _POINTS.finditer(text):
        before = _before(text, match)
        if match["value"] and (
            _SOME_POINTS.search(before) or _OF_ONE.search(before) or _OF_CRITERION.match(text[match.end() :])
        ):
            continue
        if match["after"] and _LISTED.match(text[match.end() :]):
            continue
        if not _NEGATED.search(before):
            values.append(_found(match, "value" if match["value"] else "after"))
    small = [found for found in values if found.value <= 1]
    return [found for found in values if found.value > 1] if len(small) > 1 else values


def _bare_numbers(text: str) -> list[_Found]:
    """Numbers alone on their line; with a full stop ("4.") only if there is no other line, else it numbers a list.

    None where two lines that follow each other are numbers: a column of points.
    """
    found = [_found(match) for match in _BARE.finditer(text.removesuffix(".") if "\n" not in text else text)]
    column = any(not text[a.end : b.begin].strip("\n ()") for a, b in itertools.pairwise(found))
    return [] if column else found


# ---------------------------------------------------------------------------------------------------------------------
# Asking for a score


class JudgeTemplate(BlockTemplate):
    """A judge prompt for one answer: token_ids(tokenizer, prompt, answer). Shipped: "llama2", "tiny"."""

    kind = "judge"
    variables = ("prompt", "answer")
    blocks = MappingProxyType(
        {"rubric": (), "prompt": ("prompt",), "answer": ("prompt", "answer"), "cue": ("prompt", "answer")}
    )
