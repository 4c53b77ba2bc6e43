"""`python -m benchmarks head-to-head --tokenizer FILE --trees FILE --prompts FILE`: what `eval --compare` asks of a judge
model, and what of it is computed.

Four models' answers to Open Assistant's prompts, about 200 tokens of real replies each, through the loop's own `by_pairs`
(every match of the four in both orders, with the shipped template) and `by_scores` on a random Llama. The engine computes
every distinct full block of the prompts once and every request's partial block once, less what it copies from others'; the
ideal is rubric, prompts and first answers once, and once what is behind them. A judge asked once for each answer and order:
further draws share the whole prompt and would flatter the figures.

Before that, the first prompts by pairs in turns with an engine that shares nothing, by CPU time too: others may work
on the machine.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.limits import machine
from benchmarks.models import random_model
from benchmarks.options import bad_target, bad_threads
from benchmarks.stages import Measured, cut_answer, measure_stage, once_each, stage_options
from benchmarks.throughput import share_nothing
from engine import LLM, InputError, Llama, Tokenizer, save_checkpoint
from selfreward.block_template import BlockTemplate
from selfreward.context import Row, Run
from selfreward.eval_run import read_prompts
from selfreward.formats import load_ranked
from selfreward.head_to_head import BASELINE, Answers, by_scores, matches
from selfreward.judge import JudgeTemplate
from selfreward.pairwise import by_pairs
from selfreward.verdict import PairwiseTemplate

NAMES = (BASELINE, "M1", "M2", "M3")
ANSWER_TOKENS = 200  # about
EQUAL = 10  # every so many prompts M3 answers as M2 does
BLOCK = 64
BY = ("pairs", "scores")


def model_answers(prompts: Path, trees: Path, tokenizer: Tokenizer, limit: int) -> dict[str, list[Row]]:
    """Model -> its answers to the first `limit` prompts, 180 to 220 tokens each. Models begin with different replies."""
    asked = read_prompts(prompts)
    if len(asked) < limit:
        raise InputError(f"{prompts} has {len(asked)} prompts and --limit is {limit}; lower it")
    replies = [answer["text"] for group in load_ranked(trees, language="en") for answer in group["answers"]]
    answers: dict[str, list[Row]] = {name: [] for name in NAMES}
    for number, prompt in enumerate(asked[:limit]):
        for place, name in enumerate(NAMES):
            at = len(NAMES) * number + place
            if name == NAMES[-1] and number % EQUAL == 0:
                text = answers[NAMES[-2]][number]["text"]
            else:
                text = cut_answer(tokenizer, replies, at, ANSWER_TOKENS - 20 + 7 * at % 41)
            answers[name].append(prompt | {"text": text, "token_ids": tokenizer.encode(text)})
    return answers


def texts_asked(by: str, answers: Answers) -> list[tuple[str, ...]]:
    """The texts of every prompt to the judge, as its template takes them."""
    found: list[tuple[str, ...]] = []
    for rows in zip(*answers.values(), strict=True):
        of = {name: row["text"] for name, row in zip(answers, rows, strict=True)}
        if by == "scores":
            found += [(rows[0]["prompt"], text) for text in of.values()]
        else:
            both = [order for pair in matches(list(answers)) for order in (pair, pair[::-1])]
            found += [(rows[0]["prompt"], of[a], of[b]) for a, b in both if of[a] != of[b]]
    return found


def block_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens in the distinct full blocks of the prompts: a block is its tokens and all before them."""
    number: dict[tuple[int, ...], int] = {}
    for ids in prompts:
        parent = -1
        for end in range(BLOCK, len(ids) + 1, BLOCK):
            parent = number.setdefault((parent, *ids[end - BLOCK : end]), len(number))
    return BLOCK * len(number)


class Bench:
    """A model's directory, and runs of it in directories beside it."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, scratch: Path, settings: Sequence[str]) -> None:
        self.path, self.tokenizer, self.settings, self._runs = scratch / "model", tokenizer, settings, 0
        save_checkpoint(model, self.path, tokenizer)

    def run(self, by: str, answers: Answers, without: Callable[[LLM], None] | None = None) -> Measured:
        def stage(run: Run) -> object:
            if by == "scores":
                return by_scores(run, self.path, answers)
            return by_pairs(run, self.path, PairwiseTemplate("llama2"), answers)

        self._runs += 1
        out = self.path.with_name(f"run-{self._runs}")
        return measure_stage(self.path, out, self.tokenizer, self.settings, stage, without)

    def row(self, by: str, answers: Answers) -> dict[str, Any]:
        template: BlockTemplate = JudgeTemplate("llama2") if by == "scores" else PairwiseTemplate("llama2")
        asked = texts_asked(by, answers)
        ids = [template.token_ids(self.tokenizer, *texts) for texts in asked]
        ideal, measured = once_each(template, self.tokenizer, asked), self.run(by, answers)
        counts = measured.counts
        assert counts["prompt_tokens"] == sum(map(len, ids)), "a prompt was left out or is not what it was taken for"
        return {
            "by": by,
            "requests": len(asked),
            **counts,
            "evicted_tokens": counts["block_tokens"] - block_tokens(ids),  # asked for when their block was gone
            "ideal_tokens": ideal,
            "ratio_to_ideal": counts["prefill_tokens"] / ideal,
            "factor": counts["prompt_tokens"] / counts["prefill_tokens"],
            "seconds": measured.seconds,
            "computed_per_second": counts["computed_rows"] / measured.seconds,
            "requests_per_second": len(asked) / measured.seconds,
            "share_outside_engine": measured.share_outside_engine,
        }

    def control(self, answers: Answers, rounds: int) -> dict[str, Any]:
        """By pairs with and without sharing, in turns, the first of a round by turns too."""
        variants: dict[str, Callable[[LLM], None] | None] = {"shared": None, "alone": share_nothing}
        runs: dict[str, list[Measured]] = {name: [] for name in variants}
        for number in range(rounds):
            for name in list(variants)[:: -1 if number % 2 else 1]:
                runs[name].append(self.run("pairs", answers, variants[name]))
                assert runs[name][-1].counts == runs[name][0].counts
        pairs = list(zip(runs["alone"], runs["shared"], strict=True))
        found: dict[str, Any] = {"prompts": len(answers[BASELINE])}
        for name, each in runs.items():
            found[f"{name}_tokens"] = each[0].counts["prefill_tokens"]
            found[f"{name}_seconds"] = [run.seconds for run in each]
            found[f"{name}_cpu_seconds"] = [run.cpu_seconds for run in each]
        found["time_ratio"] = statistics.median(alone.seconds / shared.seconds for alone, shared in pairs)
        found["cpu_ratios"] = sorted(alone.cpu_seconds / shared.cpu_seconds for alone, shared in pairs)
        return found


def measure(
    model: Llama,
    tokenizer: Tokenizer,
    answers: dict[str, list[Row]],
    settings: Sequence[str],
    rounds: int,
    control: int,
) -> dict[str, Any]:
    """A row for pairs and for scores, and the control on the first prompts (None without any)."""
    first = {name: rows[:control] for name, rows in answers.items()}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(model, tokenizer, Path(scratch), ["judge.draws=1", *settings])
        compared = bench.control(first, rounds) if control else None
        return {"control": compared, "rows": [bench.row(by, answers) for by in BY]}


def table(found: dict[str, Any]) -> str:
    lines = [
        "| judged by | requests | prompt tokens | computed | full blocks + tails - copied | computed / ideal "
        "| shared | seconds | computed tokens/s | requests/s | Python outside the engine |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['by']} | {row['requests']:,} | {row['prompt_tokens']:,} | {row['prefill_tokens']:,} "
            f"| {row['block_tokens']:,} + {row['tail_tokens']:,} - {row['copied_tokens']:,} | {row['ratio_to_ideal']:.3f} "
            f"| {row['factor']:.2f}x | {row['seconds']:.1f} | {row['computed_per_second']:.0f} "
            f"| {row['requests_per_second']:.1f} | {row['share_outside_engine']:.1%} |"
        )
    evicted = sum(row["evicted_tokens"] for row in found["rows"])
    lines += ["", f"blocks computed again since the cache had lost them: {evicted:,} tokens"]
    if control := found["control"]:
        ratios = control["cpu_ratios"]
        lines.append(
            f"without sharing, {control['prompts']} prompts by pairs: {control['alone_tokens']:,} tokens for "
            f"{control['shared_tokens']:,}, {statistics.median(ratios):.2f} times the CPU time "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}), {control['time_ratio']:.2f} times as long"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = stage_options("head-to-head", __doc__, new=1)
    parser.add_argument("--prompts", type=Path, required=True, help="Open Assistant's prompts, or others")
    parser.add_argument("--limit", type=int, default=250, help="prompts (default: %(default)s)")
    parser.add_argument(
        "--control",
        type=int,
        default=10,
        help="of them, asked in turns without sharing; 0: none (default: %(default)s)",
    )
    parser.add_argument("--quantization", choices=["int8"], help="of the weights")
    options = parser.parse_args(arguments)
    for name, least in (("new", 1), ("rounds", 1), ("limit", 1), ("control", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: expected at least {least}")
    if problem := bad_threads(options.threads) or bad_target(options.json):
        parser.error(problem)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    settings = [f"judge.max_tokens={options.new}", f"sampler.quantization={options.quantization or 'null'}"]
    try:
        tokenizer = Tokenizer(options.tokenizer)
        answers = model_answers(options.prompts, options.trees, tokenizer, options.limit)
        found = measure(
            random_model(options.model),
            tokenizer,
            answers,
            settings,
            options.rounds,
            min(options.control, options.limit),
        )
    except InputError as error:
        parser.error(str(error))
    print(table(found))
    if options.json:
        asked = {name: getattr(options, name) for name in ("model", "quantization", "new", "limit", "rounds")}
        options.json.write_text(json.dumps({"machine": machine(), **asked, **found}, indent=1) + "\n")
    return 0
