"""`python -m benchmarks.profile WORKLOAD [THREADS]`: where a run's time goes, kernels called from Python one by one."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.models import peaked, random_model
from benchmarks.workloads import COMPARED
from engine import LLM, ops

TIMED = ("linear", "embed_rows", "rms_norm_rows", "add_rms_norm_rows", "swiglu_rows", "rope_write", "chunk_attention",
         "sample_rows")  # fmt: skip


def main() -> int:
    words = sys.argv[1:]
    if not 1 <= len(words) <= 2 or words[0] not in COMPARED or not all(word.isdigit() for word in words[1:]):
        sys.exit(f"usage: python -m benchmarks.profile {'|'.join(COMPARED)} [THREADS]")
    torch.set_num_threads(max(1, int(words[1])) if words[1:] else 1)
    seconds: defaultdict[str, float] = defaultdict(float)
    for name in TIMED:
        setattr(ops, name, _timed(name, getattr(ops, name), seconds))
    llm = LLM(peaked(random_model("110M")), kv_cache_gb=2.0)
    llm._runner.replays = False  # type: ignore[union-attr]
    for number in range(2):  # the first takes memory from the system
        workload = COMPARED[words[0]](number, 1.0)
        llm.reset_prefix_cache()
        seconds.clear()
        started = time.perf_counter()
        llm.generate(workload.prompts, workload.params)
        total = time.perf_counter() - started
    seconds["everything else"] = total - sum(seconds.values())
    print(f"{words[0]}, {torch.get_num_threads()} threads, {total:.2f} s\n\n| part | seconds | share |\n|---|---|---|")
    for name, taken in sorted(seconds.items(), key=lambda part: -part[1]):
        print(f"| {name} | {taken:.3f} | {taken / total:.1%} |")
    return 0


def _timed(name: str, call: Callable[..., Any], seconds: dict[str, float]) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        started = time.perf_counter()
        made = call(*given)
        seconds[name] += time.perf_counter() - started
        return made

    return run


if __name__ == "__main__":
    sys.exit(main())
