"""A model that sees two answers at once and says which is better, asked in both orders: judges of pairs prefer a place.

The answers stand in blocks of their own, so that the rubric, the prompt and the answer that comes first are computed once
for all that is asked about them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from engine import RequestOutput, SamplingParams
from selfreward.block_template import BlockTemplate
from selfreward.context import Row, Run
from selfreward.head_to_head import Answers, Outcomes, both_orders, matches
from selfreward.sampling import Request, in_groups, sample_groups
from selfreward.state import row_seed

COMPARISONS = "comparisons.jsonl"


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


# ---- asking -------------------------------------------------------------------------------------------------------------


def by_pairs(
    run: Run, judge: Path, template: PairwiseTemplate, answers: Answers, file: str = COMPARISONS
) -> dict[tuple[str, str], Outcomes]:
    """Each match's outcomes by a model that compares: `judge.draws` comparisons in each order, into `file`.

    An order's verdict is that of most of its readable draws (a tie where two are as frequent); who wins in both orders
    wins, all else is a tie. Equal texts tie without being asked. None where an order has no readable draw.
    """
    options, tokenizer = run.recipe.judge, run.tokenizer_of(judge)

    def request(name: str, prompt: str, first: str, second: str) -> Request:
        params = SamplingParams(
            n=options.draws,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            seed=row_seed(run.recipe.seed, 0, "pairwise", name),
        )
        ids = template.token_ids(tokenizer, prompt, first, second)
        return Request(ids, params, lambda output: _rows(name, options.draws, output))

    asked: list[list[Request]] = []  # per prompt, those that begin with the same answer behind one another
    pairs = matches(list(answers))
    for rows in zip(*answers.values(), strict=True):
        of = dict(zip(answers, rows, strict=True))
        orders = [(a, b) for pair in pairs for a, b in (pair, pair[::-1]) if of[a]["text"] != of[b]["text"]]
        asked.append(
            [
                request(_name(of[a]["id"], a, b), of[a]["prompt"], of[a]["text"], of[b]["text"])
                for a, b in sorted(orders, key=lambda order: list(answers).index(order[0]))
            ]
        )
    groups = [[one for each in group for one in each] for group in in_groups(asked)]
    drawn: dict[str, list[Row]] = {}
    for row in sample_groups(run, file, judge, [group for group in groups if group]):
        drawn.setdefault(row["comparison_id"], []).append(row)

    def outcome(a: str, b: str, first: Row, second: Row) -> int | None:
        if first["text"] == second["text"]:
            return 0
        verdicts = (majority(drawn[_name(first["id"], *order)]) for order in ((a, b), (b, a)))
        return both_orders(*verdicts)

    return {
        (a, b): [outcome(a, b, first, second) for first, second in zip(answers[a], answers[b], strict=True)]
        for a, b in pairs
    }


def majority(rows: Sequence[Row]) -> str | None:
    """The most frequent winner of the readable draws; "tie" where two are as frequent, None without a readable one."""
    counts = Counter(row["winner"] for row in rows if row["winner"] is not None).most_common(2)
    if not counts:
        return None
    return "tie" if len(counts) == 2 and counts[0][1] == counts[1][1] else str(counts[0][0])


def _name(prompt: str, first: str, second: str) -> str:
    return f"{prompt}-{first}-{second}"


def _rows(name: str, draws: int, output: RequestOutput | None) -> list[Row]:
    if output is None:
        return [_row(name, draw, Verdict(None, "prompt_too_long"), "", []) for draw in range(draws)]
    return [
        _row(name, one.index, parse_verdict(one.text, one.finish_reason), one.text, list(one.token_ids))
        for one in output.outputs
    ]


def _row(name: str, draw: int, verdict: Verdict, text: str, token_ids: list[int]) -> Row:
    row: Row = {"id": f"{name}-{draw}", "comparison_id": name, "draw": draw}
    return row | {"winner": verdict.winner, "status": verdict.status, "text": text, "token_ids": token_ids}
