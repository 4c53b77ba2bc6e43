"""`python -m benchmarks.profile WORKLOAD|train [THREADS]`: where a run's time goes, the sampler's kernels called from Python one
by one; of `train`, a DPO step of `python -m benchmarks train`, by torch's profiler."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from benchmarks.models import peaked, random_model
from benchmarks.workloads import COMPARED
from engine import LLM, ops

TIMED = ("linear", "embed_rows", "rms_norm_rows", "add_rms_norm_rows", "swiglu_rows", "rope_write", "chunk_attention",
         "sample_rows")  # fmt: skip


def main() -> int:
    words = sys.argv[1:]
    known = (*COMPARED, "train")
    if not 1 <= len(words) <= 2 or words[0] not in known or not all(word.isdigit() for word in words[1:]):
        sys.exit(f"usage: python -m benchmarks.profile {'|'.join(known)} [THREADS]")
    torch.set_num_threads(max(1, int(words[1])) if words[1:] else 1)
    total, seconds = training() if words[0] == "train" else sampler(words[0])
    print(f"{words[0]}, {torch.get_num_threads()} threads, {total:.2f} s\n\n| part | seconds | share |\n|---|---|---|")
    for name, taken in sorted(seconds.items(), key=lambda part: -part[1]):
        print(f"| {name} | {taken:.3f} | {taken / total:.1%} |")
    return 0


def sampler(workload_name: str) -> tuple[float, dict[str, float]]:
    """Seconds in all, and of every part."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for name in TIMED:
        setattr(ops, name, _timed(name, getattr(ops, name), seconds))
    llm = LLM(peaked(random_model("110M")), kv_cache_gb=2.0)
    llm._runner.replays = False  # type: ignore[union-attr]
    for number in range(2):  # the first takes memory from the system
        workload = COMPARED[workload_name](number, 1.0)
        llm.reset_prefix_cache()
        seconds.clear()
        started = time.perf_counter()
        llm.generate(workload.prompts, workload.params)
        total = time.perf_counter() - started
    seconds["everything else"] = total - sum(seconds.values())
    return total, seconds


def training() -> tuple[float, dict[str, float]]:
    """Self time of torch's and the project's operations (`...Backward` is what autograd calls); small ones together."""
    driver = import_module("benchmarks.drivers.drive_train")
    model, way = random_model("110M"), driver.Selfreward()
    work = {"pairs": 4, "prompt": 0, "answer": 256, "seed": 0}
    tokens = driver.sequences(work, model.config.vocab_size)

    def step() -> None:
        model.zero_grad()
        hidden = way.hidden(model, tokens, work)
        with torch.profiler.record_function("head and loss in one pass"):
            loss = way.loss(model, hidden, tokens, work)
        loss.backward()

    step()  # takes memory from the system
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        step()
        total = time.perf_counter() - started
    found = {event.key: event.self_cpu_time_total * 1e-6 for event in profiler.key_averages()}
    shown = {name: taken for name, taken in found.items() if taken >= 0.005 * total}
    return total, shown | {"everything else": total - sum(shown.values())}


def _timed(name: str, call: Callable[..., Any], seconds: dict[str, float]) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        started = time.perf_counter()
        made = call(*given)
        seconds[name] += time.perf_counter() - started
        return made

    return run


if __name__ == "__main__":
    sys.exit(main())
