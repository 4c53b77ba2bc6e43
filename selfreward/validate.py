"""`python -m selfreward.run validate`: what a recipe's data files hold, and what a run would make of them, at no cost.

Every file is read to its end as the run would read it; all that is wrong is listed, not only the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from engine import InputError, Tokenizer
from selfreward.formats import Read, left_out
from selfreward.inputs import check_inputs, context_of
from selfreward.judge import JudgeTemplate
from selfreward.metrics import longer_wins, ranked_pairs
from selfreward.prompts import by_reason, usable_prompts
from selfreward.recipe import Recipe
from selfreward.seeds import (
    USES,
    example_ids,
    file_of,
    known_prompts,
    prompt_pool,
    read_part,
    read_ranked,
    same,
    split,
    split_file,
)

Row = dict[str, Any]
SHOWN = 5  # refused rows of one reason
SUGGESTED, UNASKED = "self_instruct", 10_000  # a filter to look at where the recipe has none, and on how many rows


def validate(recipe: Recipe, tokenizer: Tokenizer, template: JudgeTemplate) -> Row:
    """{"parts", "warnings", "errors", "usable"}, all JSON values: figures of each of the recipe's data files, what a run
    would warn of, and what keeps it from beginning (a part's own errors are in the part); with `data.ranked` also how its
    rows are "divided"."""
    parts = [_part(recipe, tokenizer, template, *found) for found in _parts(recipe)]
    seen: dict[str, set[str]] = {}
    for part, prompts in parts:
        part["shared"] = {key: len(prompts & others) for key, others in seen.items() if prompts & others}
        seen[part["part"]] = prompts
    found: Row = {"parts": [part for part, _ in parts], "warnings": [], "errors": []}
    found["usable"] = not any(part["errors"] for part in found["parts"])
    if found["usable"]:
        if recipe.prompts.file is not None:
            found["parts"][-1]["filters"] = _filters(recipe)
        if recipe.data.ranked is not None:
            found["divided"] = dict(split_file(recipe).counts)
        try:
            found["warnings"] = check_inputs(recipe, tokenizer, template)
        except InputError as error:
            found |= {"errors": [str(error)], "usable": False}
    return found


def _parts(recipe: Recipe) -> Iterator[tuple[str, list[Row], Read | None, str | None]]:
    """(key, usable rows, what was read, what kept it from being read at all) of each part that the recipe has."""
    if recipe.data.ranked is not None:
        yield from _divided(recipe)
    for key in USES:
        if key in recipe.paths():
            try:
                read = read_part(recipe, key)
            except InputError as error:
                yield key, [], None, str(error)
            else:
                yield key, read.rows, read, None


def _divided(recipe: Recipe) -> Iterator[tuple[str, list[Row], Read | None, str | None]]:
    """The three parts of `data.ranked`, the first with the file as it was read."""
    data = recipe.data
    try:
        read = read_ranked(recipe)
    except InputError as error:
        yield "data.ift", [], None, str(error)
        return
    seeds = split(read.rows, data.split, recipe.seed)
    yield "data.ift", seeds.ift[: data.ift_limit], read, None
    yield "data.eft", seeds.eft[: data.eft_limit], None, None
    yield "data.eft_heldout", seeds.eft_heldout[: recipe.evaluation.judge_groups], None, None


def _part(
    recipe: Recipe,
    tokenizer: Tokenizer,
    template: JudgeTemplate,
    key: str,
    rows: list[Row],
    read: Read | None,
    error: str | None,
) -> tuple[Row, set[str]]:
    part: Row = {"part": key, "file": str(file_of(recipe, key)), "used": len(rows), "errors": [error] if error else []}
    if read is not None:
        part |= {"rows": read.total, "formats": dict(read.matched), "refused": dict(read.reasons())}
        part["left_out"] = left_out(read)
        part["errors"] += [f"{r.where}: {r.said}" for r in read.refused if r.broken]
    if not rows and read is not None and not part["errors"]:
        part["errors"] = [f"{part['file']}: no usable rows"]
    prompts = Counter(same(row["prompt"]) for row in rows)
    part["duplicate_prompts"] = sum(prompts.values()) - len(prompts)
    if rows and key == "data.ift":
        part |= _instructions(recipe, tokenizer, rows)
    elif rows and key in ("data.eft", "data.eft_heldout"):
        part |= _groups(recipe, tokenizer, template, rows, recipe.eft if key == "data.eft" else recipe.judge)
    elif rows:
        part |= _prompts(recipe, tokenizer, rows)
    return part, set(prompts)


def _instructions(recipe: Recipe, tokenizer: Tokenizer, rows: list[Row]) -> Row:
    limit = min(recipe.data.max_tokens, context_of(recipe, tokenizer))
    ids = [example_ids(tokenizer, row) for row in rows]
    (prompt, answer), row = ids[0], rows[0]
    return {
        "tokens": {"prompt": spread([len(p) for p, _ in ids]), "answer": spread([len(a) for _, a in ids])},
        "limit": limit,
        "cut": sum(len(p) < limit < len(p) + len(a) for p, a in ids),
        "prompt_too_long": sum(len(p) >= limit for p, _ in ids),
        "same_prompt_and_answer": len(rows) - len({(same(row["prompt"]), same(row["response"])) for row in rows}),
        "example": {
            "id": row["id"],
            "shown": masked(tokenizer, (prompt + answer)[:limit], [False] * len(prompt) + [True] * len(answer)),
        },
    }


def _groups(recipe: Recipe, tokenizer: Tokenizer, template: JudgeTemplate, rows: list[Row], options: Any) -> Row:
    """Lengths are those of the judge prompts, by the run's own tokenizer."""
    context = context_of(recipe, tokenizer)
    asked = [template.token_ids(tokenizer, row["prompt"], answer["text"]) for row in rows for answer in row["answers"]]
    return {
        "answers": len(asked),
        "ranked_pairs": len(ranked_pairs(rows)),
        "longer_wins": longer_wins(rows),
        "tokens": {
            "judge prompt": spread(list(map(len, asked))),
            "answer": spread([len(tokenizer.encode(a["text"])) for row in rows for a in row["answers"]]),
        },
        "limit": context,
        "cut": sum(len(ids) < context < len(ids) + options.max_tokens for ids in asked),
        "prompt_too_long": sum(len(ids) >= context for ids in asked),
        "example": {"id": rows[0]["id"], "shown": masked(tokenizer, asked[0], [False] * len(asked[0]))},
    }


def _prompts(recipe: Recipe, tokenizer: Tokenizer, rows: list[Row]) -> Row:
    context = context_of(recipe, tokenizer)
    ids = [tokenizer.chat_prompt(row["prompt"]) for row in rows]
    return {
        "tokens": {"prompt": spread(list(map(len, ids)))},
        "limit": context,
        "prompt_too_long": sum(len(prompt) >= context for prompt in ids),
        "example": {"id": rows[0]["id"], "shown": masked(tokenizer, ids[0], [False] * len(ids[0]))},
    }


def _filters(recipe: Recipe) -> Row:
    """What becomes of the rows of prompts.file: by the recipe's filter; where it has none, what self_instruct would do
    with the first 10,000, since every one is compared with all others."""
    level = recipe.prompts.level
    rows = prompt_pool(recipe)[: None if level != "none" else UNASKED]
    asked = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"filter": SUGGESTED})})
    choice = usable_prompts(recipe if level != "none" else asked, known_prompts(recipe), rows)
    return {
        "filter": level if level != "none" else SUGGESTED,
        "asked": level != "none",
        "rows": len(rows),
        "kept": len(choice.kept),
        "dropped": by_reason(choice.dropped),
    }


def spread(lengths: Sequence[int]) -> Row:
    """Least, median, 95th percentile and most (each a length that occurs), and the sum."""
    ordered = sorted(lengths)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {"least": ordered[0], "median": at(0.5), "p95": at(0.95), "most": ordered[-1], "all": sum(ordered)}


def masked(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[bool, str]]:
    """The ids as text, in pieces: (whether the loss counts them, text)."""
    special = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    pieces: list[tuple[bool, str]] = []
    for (on, is_special), run in groupby(zip(mask, ids, strict=False), key=lambda pair: (pair[0], pair[1] in special)):
        tokens = [token for _, token in run]
        text = "".join(special[token] for token in tokens) if is_special else tokenizer.decode(tokens)
        if pieces and pieces[-1][0] == on:
            text = pieces.pop()[1] + text
        pieces.append((on, text))
    return pieces


def show(found: Row) -> str:
    """What `validate` found, as text."""
    divided = [f"rows of data.ranked: {_counts(found['divided'])}"] if "divided" in found else []
    said = (
        divided
        + [f"warning: {sentence}" for sentence in found["warnings"]]
        + [f"error: {said}" for said in found["errors"]]
    )
    return "\n\n".join(["\n".join(_lines(part)) for part in found["parts"]] + (["\n".join(said)] if said else []))


def _lines(part: Row) -> Iterator[str]:
    yield f"{part['part']}: {part['file']}"
    if "rows" in part:
        yield f"    rows {part['rows']} ({_counts(part['formats'])}), refused: {_counts(part['refused']) or 'none'}"
    yield from (f"    {sentence}" for sentence in part.get("left_out", []))
    yield f"    used {part['used']}, with a prompt of an earlier one: {part['duplicate_prompts']}" + (
        f" (answer too: {part['same_prompt_and_answer']})" if "same_prompt_and_answer" in part else ""
    )
    for key, count in part["shared"].items():
        yield f"    {count} prompts are in {key} too"
    if "ranked_pairs" in part:
        longer = part["longer_wins"]
        share = f", of which the longer one wins {longer:.1%}" if longer is not None else ""
        yield f"    {part['answers']} answers, {part['ranked_pairs']} pairs of different rank{share}"
    for what, figures in part.get("tokens", {}).items():
        yield f"    tokens of {what}: " + ", ".join(f"{name} {value}" for name, value in figures.items())
    if "limit" in part:
        cut = f"cut {part['cut']}, " if "cut" in part else ""
        yield f"    at {part['limit']} tokens: {cut}prompt too long {part['prompt_too_long']}"
    if "filters" in part:
        filters = part["filters"]
        asked = "" if filters["asked"] else ", which is not asked for,"
        yield (
            f"    prompts.filter={filters['filter']}{asked} keeps {filters['kept']} of {filters['rows']}; it drops: "
            f"{_counts(filters['dropped']) or 'none'}"
        )
    if "example" in part:
        yield f"    first row {part['example']['id']}; lines with = count in the loss:"
        for on, text in part["example"]["shown"]:
            yield from (f"    {'=' if on else '.'} {line}" for line in text.split("\n"))
    yield from (f"    error: {error}" for error in part["errors"][:SHOWN])
    if len(part["errors"]) > SHOWN:
        yield f"    error: and {len(part['errors']) - SHOWN} more"


def _counts(counts: Row) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
