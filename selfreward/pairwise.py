"""A model that sees two answers at once and says which is better, asked in both orders: judges of pairs prefer a place.

The answers stand in blocks of their own, so that the rubric, the prompt and the answer that comes first are computed once
for all that is asked about them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from engine import RequestOutput, SamplingParams
from selfreward.context import Row, Run
from selfreward.head_to_head import Answers, Outcomes, both_orders, matches
from selfreward.sampling import Request, in_groups, sample_groups
from selfreward.state import row_seed
from selfreward.verdict import PairwiseTemplate, Verdict, parse_verdict

COMPARISONS = "comparisons.jsonl"


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
