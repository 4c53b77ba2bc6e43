"""python -m benchmarks prompts: the filter of new prompts, each compared with all others by ROUGE-L, exactly."""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.limits import machine
from selfreward.filters import MAX_WORDS, Sieve


def texts(count: int, seed: int, near: float = 0.2) -> list[str]:
    """Texts with Zipf's frequencies of 20,000 words and about 19 words each (log-normal, as instructions have), of which
    a share repeats an earlier one with some words changed."""
    rng = random.Random(seed)
    vocabulary = [f"w{number}" for number in range(20_000)]
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]
    made: list[list[str]] = []
    for _ in range(count):
        if made and rng.random() < near:
            words = list(rng.choice(made))
            for _ in range(rng.randint(0, len(words) // 2)):
                words[rng.randrange(len(words))] = rng.choice(vocabulary)
        else:
            length = min(MAX_WORDS, max(4, int(rng.lognormvariate(2.8, 0.6))))
            words = rng.choices(vocabulary, weights, k=length)
        made.append(words)
    return [" ".join(words) for words in made]


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks prompts", description=__doc__)
    parser.add_argument("--new", type=int, default=10_000, help="texts to filter (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=10_000, help="texts that there are (default: %(default)s)")
    given = parser.parse_args(words)
    for name, value in (("new", given.new), ("pool", given.pool)):
        if value < 1:
            parser.error(f"--{name} {value}: expected at least 1")
    pool, new = texts(given.pool, seed=0, near=0.0), texts(given.new, seed=1)
    started = time.perf_counter()
    sieve = Sieve(pool, "self_instruct")
    ready = time.perf_counter()
    counts = Counter(verdict.reason or "kept" for verdict in sieve.sift(new))
    seconds = time.perf_counter() - ready
    mean = sum(len(text.split()) for text in new) / len(new)
    found = machine()
    print(f"{found['cpu']}, {len(os.sched_getaffinity(0))} cores")
    print(
        f"{given.new:,} new texts of {mean:.0f} words against {given.pool:,} and those kept before them: {seconds:.1f} s"
        f" (and {ready - started:.1f} s to read the pool); "
        + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    )
    return 0
