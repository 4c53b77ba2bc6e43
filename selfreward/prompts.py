"""New prompts of a round: written by the model, or read from a file; each used once in a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from engine import InputError, RequestOutput, SamplingParams
from selfreward import tiny
from selfreward.context import Row, Run
from selfreward.recipe import Recipe
from selfreward.report import reasons
from selfreward.sampling import Request, in_groups, sample_groups
from selfreward.seeds import prompt_pool
from selfreward.state import row_seed

CUE, END = "[INST]", "[/INST]"  # a prompt is what the model writes between the two marks of the chat layout
MAX_ATTEMPTS_PER_PROMPT = 8


def write_prompts(run: Run, k: int, taken: set[str]) -> tuple[list[Row], Counter[str]]:
    """`prompts.count` new prompts by M1, zero-shot after the cue, and how many attempts were dropped for which reason.

    taken: prompts that may not come again. Every attempt is a row of iter_k/attempts.jsonl; fewer than `count` are kept
    only when 8 attempts per prompt did not yield enough.
    """
    options = run.recipe.prompts
    count, is_valid = options.count, validity(run.recipe)
    assert count is not None
    cue = [run.tokenizer.bos_id, *run.tokenizer.encode(CUE)]

    def request(number: int) -> Request:
        params = SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            stop=END,
            seed=row_seed(run.recipe.seed, k, "prompts", number),
        )
        return Request(cue, params, lambda output: [_attempt(f"{k}-{number}", output)])

    attempts = sample_groups(
        run,
        f"iter_{k}/attempts.jsonl",
        run.llm(run.model(1)),
        in_groups([request(number) for number in range(MAX_ATTEMPTS_PER_PROMPT * count)]),
        enough=lambda rows: len(choose(rows, count, taken, is_valid)[0]) == count,
    )
    return choose(attempts, count, taken, is_valid)


def choose(
    attempts: Sequence[Row], count: int, taken: set[str], is_valid: Callable[[str], bool]
) -> tuple[list[Row], Counter[str]]:
    """The first `count` attempts that are new prompts, and how many of the others were dropped for which reason."""
    seen, rows, dropped = set(taken), list[Row](), Counter[str]()
    for attempt in attempts:
        text = attempt["text"]
        if len(rows) == count:
            reason = "enough"
        elif attempt["finish_reason"] != "stop":
            reason = "truncated"
        elif text in seen:
            reason = "duplicate"
        else:
            reason = "" if text and is_valid(text) else "invalid"
        if reason:
            dropped[reason] += 1
        else:
            seen.add(text)
            rows.append({"id": attempt["id"], "prompt": text})
    return rows, dropped


def usable_prompts(
    pool: Sequence[Row], taken: set[str], is_valid: Callable[[str], bool]
) -> tuple[list[Row], Counter[str]]:
    """The prompts of a file that a run may use, each once, and how many of the others were dropped for which reason."""
    seen, rows, dropped = set[str](), list[Row](), Counter[str]()
    for row in pool:
        text = row["prompt"].strip()
        if text in taken:
            dropped["known"] += 1
        elif text in seen:
            dropped["duplicate"] += 1
        elif not is_valid(text):
            dropped["invalid"] += 1
        else:
            seen.add(text)
            rows.append({"id": row["id"], "prompt": text})
    return rows, dropped


def take_prompts(recipe: Recipe, k: int, taken: set[str]) -> tuple[list[Row], Counter[str]]:
    """Round k's share of `prompts.file`: `prompts.count`, or an equal part for every round. taken: known before round 1."""
    options = recipe.prompts
    assert options.file is not None
    pool, dropped = usable_prompts(prompt_pool(recipe), taken, validity(recipe))
    count = options.count or len(pool) // recipe.rounds
    if not 0 < count * recipe.rounds <= len(pool):
        left_out = f" ({reasons(dropped)}{': in seed or held-out data' if dropped['known'] else ''})" if dropped else ""
        raise InputError(
            f"{options.file} has {len(pool)} usable prompts{left_out}; {recipe.rounds} rounds of "
            f"{options.count or 'at least one'} need more: add some, or lower prompts.count or rounds"
        )
    return [row | {"id": f"{k}-{row['id']}"} for row in pool[(k - 1) * count : k * count]], dropped


def validity(recipe: Recipe) -> Callable[[str], bool]:
    """The recipe's well-formedness check; it knows no answers."""
    return tiny.is_valid if recipe.prompts.valid == "tiny" else bool


def _attempt(name: str, output: RequestOutput | None) -> Row:
    assert output is not None, "the cue fits into every context"
    (answer,) = output.outputs
    return {"id": name, "text": answer.text.strip(), "finish_reason": answer.finish_reason}
