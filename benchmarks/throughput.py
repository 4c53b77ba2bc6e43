"""Sampling and judging: the engine as it is, and without each of its ideas, in turns in one process.

Every round runs all variants on prompts of its own, the prefix cache emptied and the weights packed before; the result
of a variant is the median over rounds, its ratio the median of the rounds' ratios, so that a slow minute hits both.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.limits import Limits
from benchmarks.models import product_flops
from benchmarks.workloads import ABLATED, Workload
from engine import LLM, Llama, RequestOutput


class Variant(NamedTuple):
    name: str
    idea: str  # what the ratio tells
    block_size: int = 64
    without: Callable[[LLM], None] | None = None


def _read_alone(llm: LLM) -> None:
    llm._grouped = False


def share_nothing(llm: LLM) -> None:
    """Every candidate computes its own prompt, and reads it alone."""
    llm._grouped = False
    llm._pool.find = lambda chain, tokens: []  # type: ignore[method-assign]
    llm._pool.find_head = lambda parent, tokens: (0, 0)  # type: ignore[method-assign]


def _share_whole_blocks(llm: LLM) -> None:
    llm._pool.find_head = lambda parent, tokens: (0, 0)  # type: ignore[method-assign]


def _call_by_call(llm: LLM) -> None:
    llm._runner.replays = False  # type: ignore[union-attr]


VARIANTS = (
    Variant("engine", "everything on"),
    Variant("ungrouped", "a shared chunk is read by every sequence for itself", without=_read_alone),
    Variant("whole blocks", "the common head of a partial block is computed again", without=_share_whole_blocks),
    Variant("no sharing", "every candidate computes its own prompt", without=share_nothing),
    Variant("call by call", "kernels are called from Python, not replayed", without=_call_by_call),
    Variant("chunk 32", "blocks of 32 tokens", 32),
    Variant("chunk 128", "blocks of 128 tokens", 128),
)


class Run(NamedTuple):
    seconds: float
    stats: dict[str, Any]
    memory: int  # bytes that the process held at most during the run
    first_tokens: list[list[int]]


def run_once(model: Llama, variant: Variant, workload: Workload) -> Run:
    cache = 2 * 4 * model.config.n_layers * model.config.n_kv_heads * model.config.head_dim
    tokens = workload.prompt_tokens_per_candidate + workload.new_tokens + 128 * 2 * len(workload.prompts)
    llm = LLM(model, block_size=variant.block_size, kv_cache_gb=1.25 * cache * tokens / 2**30)
    if variant.without:
        variant.without(llm)
    llm.generate([[1, 2]])  # packs the weights
    before = llm.stats()
    with PeakMemory() as memory:
        started = time.perf_counter()
        outputs = llm.generate(workload.prompts, workload.params)
        seconds = time.perf_counter() - started
    _check(outputs, workload)
    after = llm.stats()
    stats = {name: after[name] - before[name] for name in after if isinstance(after[name], (int, float))}
    return Run(seconds, stats, memory.most, [output.outputs[0].token_ids[:16] for output in outputs])


def _check(outputs: list[RequestOutput], workload: Workload) -> None:
    for output, params in zip(outputs, workload.params, strict=True):
        lengths = [len(answer.token_ids) for answer in output.outputs]
        if lengths != [params.max_tokens] * params.n:
            raise AssertionError(f"request {output.index} has answers of {lengths} tokens")


def measure(name: str, model: Llama, rounds: int, scale: float, limits: Limits) -> list[dict[str, Any]]:
    """One row per variant."""
    runs: dict[str, list[Run]] = {variant.name: [] for variant in VARIANTS}
    for number in range(rounds):
        workload = ABLATED[name](number, scale)
        for variant in VARIANTS[number % len(VARIANTS) :] + VARIANTS[: number % len(VARIANTS)]:
            runs[variant.name].append(run_once(model, variant, workload))
        told = {variant.name: runs[variant.name][-1].first_tokens for variant in VARIANTS if variant.block_size == 64}
        if any(tokens != told["engine"] for tokens in told.values()):
            raise AssertionError("variants with the same block size drew other tokens")
    return [_row(variant, runs[variant.name], runs["engine"], model, workload, limits) for variant in VARIANTS]


def _row(
    variant: Variant, runs: list[Run], engine: list[Run], model: Llama, workload: Workload, limits: Limits
) -> dict[str, Any]:
    seconds = statistics.median(run.seconds for run in runs)
    stats = runs[0].stats  # counts are the same in every round
    flops = product_flops(model) * stats["computed_rows"] + 2 * model.head.numel() * stats["head_rows"]
    return {
        "workload": workload.name,
        "variant": variant.name,
        "idea": variant.idea,
        "seconds": seconds,
        "seconds_low_high": [min(run.seconds for run in runs), max(run.seconds for run in runs)],
        "time_ratio": statistics.median(run.seconds / own.seconds for run, own in zip(runs, engine, strict=True)),
        "new_tokens_per_second": workload.new_tokens / seconds,
        "prompt_tokens": workload.prompt_tokens_per_candidate,
        "prompt_tokens_computed": stats["computed_rows"] - (workload.new_tokens - sum(p.n for p in workload.params)),
        "kv_gb_read": stats["kv_bytes_read"] * 1e-9,
        "kv_gb_ungrouped": stats["kv_bytes_ungrouped"] * 1e-9,
        "host_share": statistics.median(run.stats["host_seconds"] / run.stats["seconds"] for run in runs),
        "scheduler_share": statistics.median(run.stats["scheduler_seconds"] / run.stats["seconds"] for run in runs),
        "product_tflop": flops * 1e-12,
        "share_of_flops": flops / seconds / (limits.gflops * 1e9),
        "preemptions": stats["preemptions"],
        "peak_memory_gb": max(run.memory for run in runs) * 1e-9,
    }


class PeakMemory:
    """Resident bytes of this process, looked at a hundred times a second while it runs."""

    def __enter__(self) -> PeakMemory:
        self.most, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        statm = Path("/proc/self/statm")
        while statm.is_file():
            self.most = max(self.most, int(statm.read_text().split()[1]) * 4096)
            if self._end.wait(0.01):
                return
