"""The human data of a run: instructions with answers, ranked answers to learn judging from, ranked answers to measure it.

Each comes from a file of its own, or all three from one file of ranked answers (`data.ranked`), as the paper makes them
from Open Assistant's trees (section 3.1.1): nothing is in two of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import Tokenizer
from selfreward.formats import Read, as_example, as_group, as_prompt, read_file, usable
from selfreward.recipe import Recipe
from selfreward.records import Record

Row = dict[str, Any]


@dataclass
class Seeds:
    """The three parts of a file of ranked answers; `counts` says what its rows became."""

    ift: list[Row] = field(default_factory=list)
    eft: list[Row] = field(default_factory=list)
    eft_heldout: list[Row] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    duplicates: list[str] = field(default_factory=list)  # ids of rows whose prompt an earlier row has


def ift_rows(recipe: Recipe) -> list[Row]:
    """Instructions with human answers, the first `data.ift_limit`: {"id", "prompt", "response"}."""
    data = recipe.data
    if data.ranked is not None:
        return split_file(recipe).ift[: data.ift_limit]
    return usable(read_part(recipe, "data.ift")) if data.ift else []


def eft_groups(recipe: Recipe) -> list[Row]:
    """Ranked answers to build judge data from, the first `data.eft_limit`: {"id", "prompt", "answers"}."""
    data = recipe.data
    if data.ranked is not None:
        return split_file(recipe).eft[: data.eft_limit]
    return usable(read_part(recipe, "data.eft"))[: data.eft_limit] if data.eft else []


def heldout_groups(recipe: Recipe) -> list[Row]:
    """Ranked answers that measure the judge, the first `evaluation.judge_groups`."""
    data, count = recipe.data, recipe.evaluation.judge_groups
    if data.ranked is not None:
        return split_file(recipe).eft_heldout[:count]
    return usable(read_part(recipe, "data.eft_heldout"))[:count] if data.eft_heldout else []


def heldout_prompts(recipe: Recipe) -> list[Row]:
    """Instructions that measure the answers, the first `evaluation.prompts`: {"id", "prompt"}."""
    return usable(read_part(recipe, "data.heldout"))[: recipe.evaluation.prompts] if recipe.data.heldout else []


def prompt_pool(recipe: Recipe) -> list[Row]:
    """The prompts of `prompts.file`."""
    return usable(read_part(recipe, "prompts.file"))


def known_prompts(recipe: Recipe) -> set[str]:
    """Prompts of all seed and held-out data, whatever the limits leave of it: none of them is a new prompt."""
    keys = [key for key in USES if key != "prompts.file" and key in recipe.paths()]
    rows = [row for key in keys for row in usable(read_part(recipe, key))]
    if recipe.data.ranked is not None:
        rows += usable(read_ranked(recipe))
    return {row["prompt"].strip() for row in rows}


USES = {
    "data.ift": as_example,
    "data.eft": as_group,
    "data.eft_heldout": as_group,
    "data.heldout": as_prompt,
    "prompts.file": as_prompt,
}


def read_part(recipe: Recipe, key: str) -> Read:
    """One of the recipe's files as it is used, with what was refused. `key` is one of USES."""
    data, formats = recipe.data, recipe.data.format
    forced = formats.prompts if key == "prompts.file" else getattr(formats, key.removeprefix("data."))
    limit = data.ift_limit if key == "data.ift" else None
    return read_file(recipe.paths()[key], USES[key], forced, data.language, limit)


def split_file(recipe: Recipe) -> Seeds:
    """`data.ranked` in its three parts."""
    return split(usable(read_ranked(recipe)), recipe.data.split, recipe.seed)


def read_ranked(recipe: Recipe) -> Read:
    """The rows of `data.ranked` that have an answer, with all of their answers where these differ in rank."""
    data = recipe.data
    assert data.ranked is not None
    return read_file(data.ranked, _as_seed, data.format.ranked, data.language)


def _as_seed(record: Record) -> Row:
    ranked = len({answer.rank for answer in record.answers}) > 1
    return as_example(record) | ({"answers": as_group(record)["answers"]} if ranked else {})


def split(rows: list[Row], shares: tuple[float, float], seed: int) -> Seeds:
    """Rows with a best answer -> instructions, judge data, held-out ranks; each prompt is in one part, once.

    rows: {"id", "prompt", "response"}, with "answers" where they differ in rank. shares: of the prompts with ranks, for
    judge data and held-out ranks; all others are instructions. Which prompt goes where is decided by a hash of the seed
    and the prompt alone, so that a row more moves few others. Prompts that differ only in case or blanks are one: the
    first row has it.
    """
    seeds, first = Seeds(), dict[str, Row]()
    for row in rows:
        if first.setdefault(same(row["prompt"]), row) is not row:
            seeds.duplicates.append(row["id"])
    order = sorted((key for key, row in first.items() if "answers" in row), key=lambda key: _place(seed, key))
    heldout = round(shares[1] * len(order))
    eft = heldout + round(shares[0] * len(order))
    part = dict.fromkeys(order[:heldout], "eft_heldout") | dict.fromkeys(order[heldout:eft], "eft")
    for key, row in first.items():
        name = part.get(key, "ift")
        wanted = ("id", "prompt", "response" if name == "ift" else "answers")
        getattr(seeds, name).append({field: row[field] for field in wanted})
        seeds.counts[name] += 1
    seeds.counts["duplicate"] = len(seeds.duplicates)
    assert sum(seeds.counts.values()) == len(rows)
    return seeds


def same(prompt: str) -> str:
    """What two prompts have in common that are one to a reader: words without case and blanks."""
    return " ".join(prompt.casefold().split())


def _place(seed: int, prompt: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{prompt}".encode(), digest_size=8).digest()


def example_ids(tokenizer: Tokenizer, row: Row) -> tuple[list[int], list[int]]:
    """An instruction and its answer as token ids; the answer ends in EOS."""
    answer = [*tokenizer.encode(row["response"].strip()), tokenizer.eos_id]
    return tokenizer.chat_prompt(row["prompt"]), answer


def file_of(recipe: Recipe, key: str) -> Path | None:
    """The file that a part comes from."""
    divided = key in ("data.ift", "data.eft", "data.eft_heldout")
    return recipe.data.ranked if divided and recipe.data.ranked else recipe.paths().get(key)
