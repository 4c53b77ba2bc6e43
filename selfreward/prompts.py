"""New prompts of a round: written by the model, or read from a file; each used once in a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engine import LLM, SamplingParams
from selfreward.state import row_seed

Row = dict[str, Any]
CUE, END = "[INST]", "[/INST]"  # a prompt is what the model writes between the two marks of the chat layout
MAX_ATTEMPTS_PER_PROMPT = 8


def write_prompts(
    llm: LLM,
    params: SamplingParams,
    count: int,
    taken: set[str],
    is_valid: Callable[[str], bool],
    seeds: tuple[int, int],
) -> tuple[list[Row], Counter[str]]:
    """`count` new prompts, zero-shot after the cue, and how many were dropped for which reason.

    taken: prompts that may not come again; seeds: (run seed, round). Fewer than `count` come back only when
    8 attempts per prompt did not yield enough.
    """
    assert llm.tokenizer is not None
    cue = [llm.tokenizer.bos_id, *llm.tokenizer.encode(CUE)]
    seen, rows, dropped = set(taken), list[Row](), Counter[str]()
    for start in range(0, MAX_ATTEMPTS_PER_PROMPT * count, count):
        if len(rows) == count:
            break
        numbers = range(start, start + count)
        wanted = [_with_seed(params, row_seed(*seeds, "prompts", number)) for number in numbers]
        for number, output in zip(numbers, llm.generate([cue] * count, wanted), strict=True):
            answer = output.outputs[0]
            text = answer.text.strip()
            reason = _reason(text, answer.finish_reason, seen, is_valid)
            if reason is None and len(rows) < count:
                seen.add(text)
                rows.append({"id": f"{seeds[1]}-{number}", "prompt": text, "seed": wanted[number - start].seed})
            else:
                dropped[reason or "enough"] += 1
    return rows, dropped


def take_prompts(pool: list[Row], count: int | None, taken: set[str], round: int) -> tuple[list[Row], Counter[str]]:
    """The next `count` prompts of a file that no earlier round has used."""
    seen, rows, dropped = set(taken), list[Row](), Counter[str]()
    for row in pool:
        if count is not None and len(rows) == count:
            break
        text = row["prompt"].strip()
        if text in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(text)
        rows.append({"id": f"{round}-{row['id']}", "prompt": text})
    return rows, dropped


def _reason(text: str, finish: str, seen: set[str], is_valid: Callable[[str], bool]) -> str | None:
    if finish != "stop":
        return "truncated"
    if not text:
        return "empty"
    if text in seen:
        return "duplicate"
    return None if is_valid(text) else "invalid"


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return replace(params, seed=seed, stop=(END,))
