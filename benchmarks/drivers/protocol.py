"""What every driver says to its parent: JSON lines on standard input and output. Imports the standard library alone.

The first line read holds the settings, the first line written the peer's version. Then one workload a line,
{"prompts", "shared", "n", "max_tokens", "temperature", "top_p", "seed"}, answered by {"seconds", "tokens"}: the new
tokens of every candidate of every prompt. `shared` is how many tokens all prompts begin with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Workload = dict[str, Any]
Generate = Callable[[Workload], list[list[list[int]]]]  # prompt, candidate, token


def serve(load: Callable[[dict[str, Any]], tuple[str, Callable[[], None], Generate]]) -> None:
    """`load` reads the model and returns the peer's version, what empties its cache, and what generates."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes where errors go
    settings = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, settings["cores"])  # before any library counts cores or starts threads
    version, forget, generate = load(settings)
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        workload = json.loads(line)
        forget()
        started = time.perf_counter()
        tokens = generate(workload)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)
