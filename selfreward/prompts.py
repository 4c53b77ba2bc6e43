"""New prompts of a round: written by a model, or read from a file; each used once in a run."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

from engine import InputError, RequestOutput, SamplingParams
from selfreward import tiny
from selfreward.context import Row, Run
from selfreward.few_shot import listed, shots, showable, stops
from selfreward.filters import Sieve
from selfreward.recipe import Recipe
from selfreward.report import reasons
from selfreward.sampling import GROUP, Request, in_groups, sample_groups, sample_waves
from selfreward.seeds import ift_rows, prompt_pool, same
from selfreward.state import row_seed

CUE, END = "[INST]", "[/INST]"  # a prompt is what the model writes between the two marks of the chat layout
MAX_ATTEMPTS_PER_PROMPT = 8
PROMPT_TOO_LONG = "prompt_too_long"  # for the context of the model that would read it
WAVE = 4  # groups of few-shot requests that are shown the same generated prompts: they fill the sampler's 256 places


class Found(NamedTuple):
    """A text that may become a prompt; `reason`: why it cannot, whatever the filters say."""

    id: str
    text: str
    reason: str | None = None


class Choice:
    """Of texts, in the order in which they come, the first `count` that pass the sieve (None: all), and all others.

    kept: {"id", "prompt"}, dropped: the same with "reason"; where the sieve compares words also "rouge", the highest
    ROUGE-L against the pool at that moment, and in a dropped row "like", the text that it is similar to.
    """

    def __init__(self, sieve: Sieve, count: int | None = None) -> None:
        self.kept, self.dropped, self._sieve, self._count = list[Row](), list[Row](), sieve, count

    def __len__(self) -> int:
        """The texts that were looked at."""
        return len(self.kept) + len(self.dropped)

    @property
    def lacking(self) -> int:
        assert self._count is not None
        return self._count - len(self.kept)

    def add(self, found: Iterable[Found]) -> None:
        texts, before = list(found), len(self)
        verdicts = iter(self._sieve.sift([t.text for t in texts if t.reason is None], self._count and self.lacking))
        for name, text, early in texts:
            verdict = next(verdicts) if early is None else None
            reason = verdict.reason if verdict else "enough" if len(self.kept) == self._count else early
            row: Row = {"id": name, "prompt": text} | ({"reason": reason} if reason else {})
            if verdict is not None and verdict.rouge is not None:
                row |= {"rouge": verdict.rouge} | ({"like": verdict.like} if verdict.like is not None else {})
            (self.dropped if reason else self.kept).append(row)
        assert len(self) == before + len(texts)


def sieve_of(recipe: Recipe, known: Iterable[str]) -> Sieve:
    """The recipe's filters, before any prompt. The recipe's well-formedness check knows no answers."""
    return _sieve(known, recipe.prompts.level, recipe.prompts.rouge, recipe.prompts.valid)


def _sieve(known: Iterable[str], level: str, rouge: float, valid: str | None) -> Sieve:
    return Sieve(known, level, rouge, tiny.is_valid if valid == "tiny" else bool)


# ---- by a model ---------------------------------------------------------------------------------------------------------


def write_prompts(run: Run, k: int, known: set[str]) -> Choice:
    """`prompts.count` new prompts by `prompt_model` or M1, zero-shot after the cue.

    known: prompts that may not come again. Every attempt is a row of iter_k/attempts.jsonl; fewer than `count` are kept
    only when 8 attempts per prompt did not yield enough.
    """
    model, count = run.prompt_model, run.recipe.prompts.count
    assert count is not None
    tokenizer = run.tokenizer_of(model)
    cue = [tokenizer.bos_id, *tokenizer.encode(CUE)]
    choice = Choice(sieve_of(run.recipe, known), count)

    def request(number: int) -> Request:
        return Request(cue, _params(run, k, number, (END,)), lambda output: [_attempt(f"{k}-{number}", output)])

    def enough(rows: list[Row]) -> bool:
        choice.add(_attempted(row) for row in rows[len(choice) :])
        return not choice.lacking

    requests = [request(number) for number in range(MAX_ATTEMPTS_PER_PROMPT * count)]
    enough(sample_groups(run, f"iter_{k}/attempts.jsonl", model, in_groups(requests), enough))
    return choice


def _attempt(name: str, output: RequestOutput | None) -> Row:
    assert output is not None, "the cue fits into every context"
    (answer,) = output.outputs
    return {"id": name, "text": answer.text.strip(), "finish_reason": answer.finish_reason}


def _attempted(row: Row) -> Found:
    return Found(row["id"], row["text"], None if row["finish_reason"] == "stop" else "truncated")


def write_few_shot(run: Run, k: int, known: set[str], earlier: Sequence[Row]) -> Choice:
    """`prompts.count` new prompts by `prompt_model` or M1, which is shown some of the seed data and of earlier new ones.

    known: prompts that may not come again. earlier: the prompts of earlier rounds. A row of iter_k/attempts.jsonl is a
    request's raw text and the ids of what it showed. A wave of requests shows prompts of earlier rounds and those that
    were kept before the wave, so that a resumed run writes the same bytes. Fewer than `count` are kept only when 8
    requests per prompt did not yield enough.
    """
    options, model, template = run.recipe.prompts, run.prompt_model, run.prompt_template
    assert options.count is not None and template is not None
    tokenizer, count = run.tokenizer_of(model), options.count
    seeds, choice, read = seed_rows(run.recipe), Choice(sieve_of(run.recipe, known), count), 0

    def request(number: int, generated: Sequence[Row]) -> Request:
        seed = row_seed(run.recipe.seed, k, "shots", number)
        shown = shots(seed, seeds, generated, (options.shots_seed, options.shots_generated))
        ids = template.token_ids(tokenizer, [row["prompt"] for row in shown])
        names = [row["id"] for row in shown]
        params = _params(run, k, number, stops(len(shown)))
        return Request(ids, params, lambda output: [_answer(f"{k}-{number}", names, output)])

    def take(rows: list[Row]) -> None:
        nonlocal read
        choice.add(text for row in rows[read:] for text in found_in(row, template.numbered))
        read = len(rows)

    def wave(rows: list[Row]) -> list[Request]:
        take(rows)
        size = GROUP * min(WAVE, -(-choice.lacking // GROUP))  # a request gives about one prompt or more
        generated = showable([*earlier, *choice.kept])
        return [request(number, generated) for number in range(len(rows), len(rows) + size)]

    most = -(-MAX_ATTEMPTS_PER_PROMPT * count // GROUP)
    rows = sample_waves(run, f"iter_{k}/attempts.jsonl", model, most, wave)
    take(rows)
    assert len(choice) == sum(len(list(found_in(row, template.numbered))) for row in rows)
    return choice


def seed_rows(recipe: Recipe) -> list[Row]:
    """The instructions of the seed data that may be shown, each once."""
    first: dict[str, Row] = {}
    for row in showable(ift_rows(recipe)):
        first.setdefault(same(row["prompt"]), row)
    return list(first.values())


def found_in(row: Row, numbered: bool) -> Iterator[Found]:
    """What a few-shot request gave: at least one text."""
    if row["finish_reason"] == PROMPT_TOO_LONG:
        yield Found(f"{row['id']}-0", "", PROMPT_TOO_LONG)
        return
    first = len(row["shots"]) + 1 if numbered else None
    for number, (text, reason) in enumerate(listed(row["text"], first, row["finish_reason"] != "stop")):
        yield Found(f"{row['id']}-{number}", text, reason)


def _answer(name: str, shown: list[Any], output: RequestOutput | None) -> Row:
    row: Row = {"id": name, "shots": shown}
    if output is None:
        return row | {"text": "", "finish_reason": PROMPT_TOO_LONG}
    (answer,) = output.outputs
    return row | {"text": answer.text, "finish_reason": answer.finish_reason}


def _params(run: Run, k: int, number: int, stop: Sequence[str]) -> SamplingParams:
    options = run.recipe.prompts
    return SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        stop=stop,
        seed=row_seed(run.recipe.seed, k, "prompts", number),
    )


# ---- from a file --------------------------------------------------------------------------------------------------------


def usable_prompts(recipe: Recipe, known: set[str], rows: Sequence[Row]) -> Choice:
    """Of prompts those that a run may use, each once, and all others with the reason why not. Not to be changed."""
    options = recipe.prompts
    texts = tuple((row["id"], row["prompt"].strip()) for row in rows)
    return _sifted(options.level, options.rouge, options.valid, frozenset(known), texts)


@functools.lru_cache(maxsize=1)
def _sifted(
    level: str, rouge: float, valid: str | None, known: frozenset[str], texts: tuple[tuple[str, str], ...]
) -> Choice:
    """Kept for the next round, which takes its share of the same choice: filtering 10,000 prompts takes seconds."""
    choice = Choice(_sieve(known, level, rouge, valid))
    choice.add(Found(name, text) for name, text in texts)
    return choice


def take_prompts(recipe: Recipe, k: int, known: set[str]) -> Choice:
    """Round k's share of `prompts.file`: `prompts.count`, or an equal part for every round; with what of the whole file
    was dropped. known: before round 1."""
    options, choice = recipe.prompts, usable_prompts(recipe, known, prompt_pool(recipe))
    count = options.count or len(choice.kept) // recipe.rounds
    if not 0 < count * recipe.rounds <= len(choice.kept):
        raise InputError(
            f"{options.file} has {len(choice.kept)} usable prompts{_left_out(choice)}; {recipe.rounds} rounds of "
            f"{options.count or 'at least one'} need more: add some, or lower prompts.count or rounds"
        )
    share = copy(choice)
    share.kept = [row | {"id": f"{k}-{row['id']}"} for row in choice.kept[(k - 1) * count : k * count]]
    return share


def _left_out(choice: Choice) -> str:
    counts = by_reason(choice.dropped)
    if not counts:
        return ""
    return f" ({reasons(counts)}{': in seed or held-out data' if 'known' in counts else ''})"


def by_reason(dropped: Sequence[Row]) -> dict[str, int]:
    """How many were dropped for which reason, in the order of their first rows."""
    counts: dict[str, int] = {}
    for row in dropped:
        counts[row["reason"]] = counts.get(row["reason"], 0) + 1
    return counts
