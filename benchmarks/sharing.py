"""`python -m benchmarks sharing --tokenizer FILE --trees FILE`: what judge prompts share, and what the loop costs beside
the engine.

The shipped rubric, 12 prompts of Open Assistant's trees with 4 answers of about 200 tokens each, 3 draws of an answer as one
request, through the loop's own `judge_by_model` on a random Llama. The engine computes every distinct full block of the
prompts once and every request's partial block once, less what it copies from others' partial blocks; the ideal is rubric,
prompts and answers once.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.limits import machine
from benchmarks.models import random_model
from benchmarks.options import bad_target, bad_threads
from benchmarks.stages import Measured, cut_answer, measure_stage, once_each, stage_options
from engine import InputError, Llama, Tokenizer, save_checkpoint
from selfreward.context import Run
from selfreward.formats import load_ranked
from selfreward.judge import JudgeTemplate
from selfreward.judging import Item, judge_by_model

PROMPTS, ANSWERS = 12, 4
PROMPT_TOKENS, ANSWER_TOKENS = 200, 200  # the longest, about


def judge_items(trees: Path, tokenizer: Tokenizer) -> list[list[Item]]:
    """PROMPTS x ANSWERS answers of 180 to 220 tokens: the replies to a prompt on end, each time from another one."""
    groups = [
        group
        for group in load_ranked(trees, language="en")
        if len(group["answers"]) >= ANSWERS and len(tokenizer.encode(group["prompt"])) <= PROMPT_TOKENS
    ]
    if len(groups) < PROMPTS:
        raise InputError(f"{trees} has {len(groups)} short prompts with {ANSWERS} ranked answers; {PROMPTS} are needed")
    items = []
    for place, group in enumerate(groups[:PROMPTS]):
        texts = [answer["text"] for answer in group["answers"]]
        for number in range(ANSWERS):
            length = ANSWER_TOKENS - 20 + 7 * (ANSWERS * place + number) % 41
            cut = cut_answer(tokenizer, texts, number, length)
            items.append(Item(f"{group['id']}-{number}", group["prompt"], cut))
    return [items[start : start + ANSWERS] for start in range(0, len(items), ANSWERS)]


def measure(model: Llama, tokenizer: Tokenizer, trees: Path, new: int, rounds: int) -> list[dict[str, Any]]:
    """A row for judge.score mean and expected: counts (the same in every round), medians of times."""
    prompts = judge_items(trees, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model"
        save_checkpoint(model, path, tokenizer)
        runs: dict[str, list[Measured]] = {"mean": [], "expected": []}
        for number in range(rounds):
            for score, measured in runs.items():
                out = Path(scratch) / f"{score}-{number}"
                measured.append(_judge(path, out, tokenizer, prompts, score, new))
                assert measured[-1].counts == measured[0].counts
    ideal = once_each(JudgeTemplate("llama2"), tokenizer, ((i.prompt, i.answer) for items in prompts for i in items))
    return [_row(score, ideal, measured) for score, measured in runs.items()]


def _judge(model: Path, out: Path, tokenizer: Tokenizer, prompts: list[list[Item]], score: str, new: int) -> Measured:
    settings = ["judge.draws=3", f"judge.max_tokens={new}", f"judge.score={score}"]

    def stage(run: Run) -> None:
        rows = judge_by_model(run, "judgements.jsonl", model, prompts, run.recipe.judge, (1, "judge"))
        assert [row["status"] for row in rows].count("prompt_too_long") == 0, "the model's context is too short"

    return measure_stage(model, out, tokenizer, settings, stage)


def _row(score: str, ideal: int, runs: Sequence[Measured]) -> dict[str, Any]:
    counts = runs[0].counts
    return {
        "score": score,
        **counts,
        "ideal_tokens": ideal,
        "ratio_to_ideal": counts["prefill_tokens"] / ideal,
        "seconds": statistics.median(run.seconds for run in runs),
        "share_outside_engine": statistics.median(run.share_outside_engine for run in runs),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]
    return "\n".join(
        [
            f"{PROMPTS * ANSWERS} requests x 3 draws, {first['prompt_tokens']:,} prompt tokens",
            f"computed {first['prefill_tokens']:,} = {first['block_tokens']:,} in full blocks "
            f"+ {first['tail_tokens']:,} in tails - {first['copied_tokens']:,} copied",
            f"rubric, prompts and answers once: {first['ideal_tokens']:,}, ratio {first['ratio_to_ideal']:.3f}",
            "",
            "| judge.score | seconds | new tokens | Python outside the engine |",
            "|---|---|---|---|",
            *(
                f"| {row['score']} | {row['seconds']:.1f} | {row['new_tokens']:,} | {row['share_outside_engine']:.2%} |"
                for row in rows
            ),
        ]
    )


def main(arguments: Sequence[str]) -> int:
    parser = stage_options("sharing", __doc__, new=128)
    options = parser.parse_args(arguments)
    if options.new < 1 or options.rounds < 1:
        parser.error("--new and --rounds: expected at least 1")
    if problem := bad_threads(options.threads) or bad_target(options.json):
        parser.error(problem)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    try:
        model = random_model(options.model)
        rows = measure(model, Tokenizer(options.tokenizer), options.trees, options.new, options.rounds)
    except InputError as error:
        parser.error(str(error))
    print(table(rows))
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine(), "model": options.model, "rows": rows}, indent=1) + "\n"
        )
    return 0
