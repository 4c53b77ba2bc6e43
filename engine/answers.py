"""What a step asks of its logits, and what becomes of the answers: tokens for sampled requests, log-probs for given ones.

`ask` lists what the rows of a plan ask; `take` gets the answers in the same order and says what was drawn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.requests import Request
from engine.sampling import Query
from engine.scheduler import Drawn, Plan
from engine.tokenizer import Tokenizer


class Answers(NamedTuple):
    """One entry per query; labels: those of all queries, one after the other. Log-probs are NaN where a row has none."""

    ids: list[int]
    raw: list[float]
    sampled: list[float]
    labels: list[float]


class Asked(NamedTuple):
    """What a step was asked for, and whose each answer is."""

    queries: list[Query]
    owners: list[Any]


class Drawing:
    """Draws a token for every (last row, candidate) of a plan. requests: by index, those that are not finished."""

    def __init__(self, requests: dict[int, Request], tokenizer: Tokenizer | None) -> None:
        self.requests, self.tokenizer = requests, tokenizer

    def ask(self, plan: Plan) -> Asked:
        """owners: request, candidate and the place of the token in its sequence."""
        queries, owners = [], []
        row = -1
        for work in plan.work:
            row += work.stop - work.start
            request, place = self.requests[work.sequence.group.index], len(work.sequence.tokens)
            for candidate in work.draws:
                owners.append((request, candidate, place))
                queries.append(request.query(row, candidate, place))
        return Asked(queries, owners)

    def take(self, asked: Asked, answers: Answers) -> Drawn:
        """What was drawn; nothing for a candidate that had ended when its step was on its way."""
        drawn: Drawn = {}
        labels = iter(answers.labels)
        rows = zip(asked.owners, asked.queries, answers.ids, answers.raw, answers.sampled, strict=True)
        for (request, candidate, place), query, token, raw, sampled in rows:
            read = [next(labels) for _ in query.labels]
            group = request.group
            if group.ended(candidate):
                continue
            _refuse_nan(raw, group.index)
            tokens = group.sequences[candidate].tokens
            reason = request.take(candidate, tokens, place, token, raw, sampled, read, self.tokenizer)
            drawn[group.index, candidate] = (token, reason)
        return drawn


class Scoring:
    """Reads the log-probs of the given next tokens behind every computed row that has one into `scores`.

    scores: per group index, one list per candidate with a place for each of its tokens.
    """

    requests: dict[int, Request] = {}  # noqa: RUF012 (nothing that could be aborted)

    def __init__(self, scores: dict[int, list[list[float]]]) -> None:
        self.scores = scores

    def ask(self, plan: Plan) -> Asked:
        """owners: of each label the group, the candidate and the place in the completion."""
        queries = []
        owners: list[tuple[int, int, int]] = []
        row = 0
        for work in plan.work:
            group, tokens = work.sequence.group, work.sequence.tokens
            assert group.forced is not None
            if group.forked:
                first = max(work.start, group.prompt_len)  # a sequence that was preempted computes its prompt again
                for position in range(first, work.stop):
                    queries.append(Query(row + position - work.start, labels=(tokens[position + 1],)))
                    owners.append((group.index, work.sequence.candidate, position + 1 - group.prompt_len))
            elif work.draws:
                firsts = tuple(group.forced[candidate][0] for candidate in work.draws)
                queries.append(Query(row + work.stop - work.start - 1, labels=firsts))
                owners += [(group.index, candidate, 0) for candidate in work.draws]
            row += work.stop - work.start
        return Asked(queries, owners)

    def take(self, asked: Asked, answers: Answers) -> Drawn:
        for (index, candidate, place), value in zip(asked.owners, answers.labels, strict=True):
            _refuse_nan(value, index)
            self.scores[index][candidate][place] = value
        return {}


def _refuse_nan(logp: float, index: int) -> None:
    if logp != logp:
        raise FloatingPointError(
            f"prompt {index}: the logits are NaN or infinite, or no token may be drawn (stop_token_ids and min_tokens); "
            "are the model's weights finite?"
        )
