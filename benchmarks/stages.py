"""A stage of the loop on a model of its own, run as the loop runs it: what the engine computes for it, its seconds, and those
of them inside the engine. And what prompts have in common, counted without the engine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.models import MODELS
from engine import LLM, RequestOutput, SamplingParams, Tokenizer
from selfreward.block_template import BlockTemplate
from selfreward.context import Run
from selfreward.judge import JudgeTemplate
from selfreward.recipe import Recipe
from selfreward.report import Reporter
from selfreward.state import RunDir

COUNTED = (
    "prompt_tokens",
    "computed_rows",
    "prefill_tokens",
    "block_tokens",
    "tail_tokens",
    "copied_tokens",
    "preemptions",
    "new_tokens",
)


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


class Measured(NamedTuple):
    counts: dict[str, float]  # COUNTED, of `LLM.stats()`
    seconds: float
    engine_seconds: float
    cpu_seconds: float  # of all threads: what a ratio can be taken of where others work too

    @property
    def share_outside_engine(self) -> float:
        """Templates, tokenisation of the prompts, parser, rows to the disk."""
        return 1 - self.engine_seconds / self.seconds


def measure_stage(
    model: Path,
    out: Path,
    tokenizer: Tokenizer,
    settings: Sequence[str],
    stage: Callable[[Run], object],
    without: Callable[[LLM], None] | None = None,
) -> Measured:
    """`stage` in a run of its own in `out`, with llama2's judge template, the weights packed and the prefix cache empty.

    without: takes an idea out of the engine before.
    """
    recipe = Recipe.load("micro", [f"model={model}", "judge.template=llama2", *settings])
    with RunDir(out, {}) as directory:
        run = Run(recipe, directory, tokenizer, JudgeTemplate("llama2"), Reporter(quiet=True))
        llm = run.llm(model)
        if without:
            without(llm)
        llm.generate([[1, 2]], SamplingParams(max_tokens=1))  # packs the weights
        llm.reset_prefix_cache()
        before, clock = llm.stats(), EngineClock(llm)
        started, cpu = time.perf_counter(), time.process_time()
        stage(run)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        after = llm.stats()
    return Measured({name: after[name] - before[name] for name in COUNTED}, seconds, clock.seconds, cpu)


def once_each(template: BlockTemplate, tokenizer: Tokenizer, asked: Iterable[Sequence[str]]) -> int:
    """The ideal: tokens of every segment once behind every different beginning. asked: the texts of each prompt."""
    seen, total = set[tuple[str, ...]](), 0
    for texts in asked:
        segments = tuple(template.segments(*texts))
        for place, segment in enumerate(segments):
            if segments[: place + 1] not in seen:
                seen.add(segments[: place + 1])
                total += len(tokenizer.encode(segment, continuation=place > 0)) + (place == 0)  # BOS
    return total


def cut_answer(tokenizer: Tokenizer, replies: Sequence[str], number: int, length: int) -> str:
    """About `length` tokens: the replies on end, beginning with that of this number, over and over."""
    start = number % len(replies)
    turned = "\n\n".join(islice(cycle(replies), start, start + length))[: 20 * length]
    return tokenizer.decode(tokenizer.encode(turned)[:length])


def stage_options(command: str, what: str | None, new: int) -> argparse.ArgumentParser:
    """The options of all commands that measure a stage. new: the default of --new."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {command}", description=what)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Llama 2's tokenizer.model")
    parser.add_argument("--trees", type=Path, required=True, help="Open Assistant's trees, or other ranked answers")
    parser.add_argument("--model", default="110M", help=f"a random Llama: {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--new", type=int, default=new, help="tokens of a judgement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: torch's number")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    return parser
