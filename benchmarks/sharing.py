"""`python -m benchmarks sharing --tokenizer FILE --trees FILE`: what judge prompts share, and what the loop costs beside
the engine.

The shipped rubric, 12 prompts of Open Assistant's trees with 4 answers of about 200 tokens each, 3 draws of an answer as one
request, through the loop's own `judge_by_model` on a random Llama. The engine computes every distinct full block of the
prompts once and every request's partial block once, less what it copies from others' partial blocks; the ideal is rubric,
prompts and answers once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.limits import machine
from benchmarks.models import MODELS, random_model
from benchmarks.options import bad_target, bad_threads
from engine import LLM, InputError, Llama, RequestOutput, Tokenizer, save_checkpoint
from selfreward.context import Run
from selfreward.formats import load_ranked
from selfreward.judge import JudgeTemplate
from selfreward.judging import Item, judge_by_model
from selfreward.recipe import Recipe
from selfreward.report import Reporter
from selfreward.state import RunDir

PROMPTS, ANSWERS = 12, 4
PROMPT_TOKENS, ANSWER_TOKENS = 200, 200  # the longest, about
COUNTED = (
    "prompt_tokens",
    "prefill_tokens",
    "block_tokens",
    "tail_tokens",
    "copied_tokens",
    "preemptions",
    "new_tokens",
)


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
            turned = "\n\n".join((texts[number:] + texts[:number]) * length)[: 20 * length]
            cut = tokenizer.decode(tokenizer.encode(turned)[:length])
            items.append(Item(f"{group['id']}-{number}", group["prompt"], cut))
    return [items[start : start + ANSWERS] for start in range(0, len(items), ANSWERS)]


def once_each(template: JudgeTemplate, tokenizer: Tokenizer, prompts: Sequence[Sequence[Item]]) -> int:
    """The ideal: tokens of the rubric once, of every prompt once, of every answer and its cue once."""
    total = 0
    for number, items in enumerate(prompts):
        for place, item in enumerate(items):
            rubric, prompt, *own = template.segments(item.prompt, item.answer)
            total += (1 + len(tokenizer.encode(rubric))) * (number + place == 0)
            total += len(tokenizer.encode(prompt, continuation=True)) * (place == 0)
            total += sum(len(tokenizer.encode(segment, continuation=True)) for segment in own)
    return total


class EngineClock:
    """Seconds inside `LLM.stream`: while it gives the next output, not while its caller has it."""

    def __init__(self, llm: LLM) -> None:
        self.seconds, self._stream = 0.0, llm.stream
        llm.stream = self._timed  # type: ignore[method-assign, assignment]

    def _timed(self, *args: Any) -> Iterator[RequestOutput]:
        started = time.perf_counter()
        outputs = self._stream(*args)
        while True:
            output = next(outputs, None)
            self.seconds += time.perf_counter() - started
            if output is None:
                return
            yield output
            started = time.perf_counter()


def measure(model: Llama, tokenizer: Tokenizer, trees: Path, new: int, rounds: int) -> list[dict[str, Any]]:
    """A row for judge.score mean and expected: counts (the same in every round), medians of times."""
    prompts = judge_items(trees, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model"
        save_checkpoint(model, path, tokenizer)
        times: dict[str, list[tuple[float, float]]] = {"mean": [], "expected": []}
        counts: dict[str, dict[str, float]] = {}
        for number in range(rounds):
            for score, seconds in times.items():
                out = Path(scratch) / f"{score}-{number}"
                found, *spent = _judge(path, out, tokenizer, prompts, score, new)
                assert counts.setdefault(score, found) == found
                seconds.append((spent[0], spent[1]))
    ideal = once_each(JudgeTemplate("llama2"), tokenizer, prompts)
    return [_row(score, counts[score], ideal, times[score]) for score in times]


def _judge(
    model: Path, out: Path, tokenizer: Tokenizer, prompts: list[list[Item]], score: str, new: int
) -> tuple[dict[str, float], float, float]:
    """Counts of `LLM.stats()`, seconds of the stage, seconds of it inside the engine."""
    settings = ["judge.template=llama2", "judge.draws=3", f"judge.max_tokens={new}", f"judge.score={score}"]
    recipe = Recipe.load("micro", [f"model={model}", *settings])
    with RunDir(out, {}) as directory:
        run = Run(recipe, directory, tokenizer, JudgeTemplate("llama2"), Reporter(quiet=True))
        llm = run.llm(model)
        llm.generate([[1, 2]])  # packs the weights
        llm.reset_prefix_cache()
        before, clock = llm.stats(), EngineClock(llm)
        started = time.perf_counter()
        rows = judge_by_model(run, "judgements.jsonl", model, prompts, recipe.judge, (1, "judge"))
        seconds = time.perf_counter() - started
        assert [row["status"] for row in rows].count("prompt_too_long") == 0, "the model's context is too short"
        after = llm.stats()
    return {name: after[name] - before[name] for name in COUNTED}, seconds, clock.seconds


def _row(score: str, counts: dict[str, float], ideal: int, times: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "score": score,
        **counts,
        "ideal_tokens": ideal,
        "ratio_to_ideal": counts["prefill_tokens"] / ideal,
        "seconds": statistics.median(stage for stage, _ in times),
        "share_outside_engine": statistics.median(1 - engine / stage for stage, engine in times),
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks sharing", description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Llama 2's tokenizer.model")
    parser.add_argument("--trees", type=Path, required=True, help="Open Assistant's trees, or other ranked answers")
    parser.add_argument("--model", default="110M", help=f"a random Llama: {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="tokens of a judgement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: torch's number")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
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
