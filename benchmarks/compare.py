"""The engine beside its peers: in every round each of them runs the same prompts in turn, in a process of its own."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.limits import Limits
from benchmarks.models import product_flops
from benchmarks.peers import DRIVERS, OURS, PEERS, Answer, Child, ChildEnded, how, interpreter
from benchmarks.workloads import COMPARED, Workload
from engine import LLM, InputError, Llama, save_checkpoint

QUIET = 0.05  # of a core: what other processes may use during a run, and a child that should sleep
TRIES = 3
SETTLE = 0.3  # seconds: Intel's OpenMP threads wait 0.2 for more work before they sleep
BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "int8": 1.0,
    "q8_0": 34 / 32,
}  # of a weight; q8_0: one f16 scale for 32 weights
GAP = {"float32": 0.01, "16bit": 0.15, "int8": 0.3}  # nats between two tokens that rounding may exchange


class Turn(NamedTuple):
    answer: Answer
    first: float  # seconds to the first token, where decode steps are looked at alone


@contextmanager
def children(
    model: Llama, names: Sequence[str], formats: Sequence[str], threads: int, directory: Path | None
) -> Iterator[list[Child]]:
    """All engines that were asked for, loaded."""
    pythons = {name: interpreter(name, directory) for name in names}
    settings = {"threads": threads, "cores": cores(threads)}
    running: list[Child] = []
    with tempfile.TemporaryDirectory() as scratch:
        save_checkpoint(model, Path(scratch) / "model")
        try:
            wanted = [(name, form) for name in names for form, kind in PEERS[name].formats.items() if kind in formats]
            for engine, form in wanted:
                command = [str(pythons[engine]), str(DRIVERS / f"drive_{engine}.py")]
                try:
                    running.append(
                        Child(engine, form, command, {**settings, "model": f"{scratch}/model"}, Path(scratch))
                    )
                except ChildEnded as error:
                    if engine != OURS and "ModuleNotFoundError" in str(error):
                        missing = str(error).splitlines()[-1]
                        raise InputError(
                            f"the peer {engine} lacks a package ({missing}): {how(engine, directory)}"
                        ) from None
                    raise
            yield running
        finally:
            for child in running:
                child.close()


def cores(threads: int) -> list[int]:
    """The last ones: the first has the interrupts."""
    return sorted(os.sched_getaffinity(0))[-threads:] if hasattr(os, "sched_getaffinity") else []


def compare(
    name: str, model: Llama, engines: Sequence[Child], rounds: int, scale: float, threads: int
) -> tuple[Limits, list[dict[str, Any]]]:
    """The limits, the best over the rounds, and one row per engine and format."""
    for child in engines:
        child.ask(COMPARED[name](-1, scale).shortened(8))
    turns: list[list[Turn]] = [[] for _ in engines]
    limits = Limits.measure(threads)
    for number in range(rounds):
        workload = COMPARED[name](number, scale)
        order = [(number + position) % len(engines) for position in range(len(engines))]
        for position in order:
            turns[position].append(take_turn(engines[position], engines, workload))
        if name == "single":
            check_greedy(model, workload, {child: turns[at][-1].answer for at, child in enumerate(engines)})
        limits = Limits(*map(max, limits, Limits.measure(threads)))
    rows = [_row(child, turns[at], model, workload, limits) for at, child in enumerate(engines)]
    for at, row in enumerate(rows):
        row["our_speed"] = _our_speed(row, turns[at], rows, turns)
    return limits, rows


def take_turn(child: Child, engines: Sequence[Child], workload: Workload) -> Turn:
    """One run while everything else sleeps: of several, if others disturb it, the one least disturbed."""
    best: Turn | None = None
    for _ in range(TRIES):
        time.sleep(SETTLE)
        asleep = {other: other.cpu_seconds() for other in engines if other is not child}
        started = time.perf_counter()
        first = child.ask(workload.shortened(1)).seconds if workload.name == "single" else 0.0
        turn = Turn(child.ask(workload), first)
        elapsed = time.perf_counter() - started
        for other, before in asleep.items():
            share = (other.cpu_seconds() - before) / elapsed
            if share > QUIET and elapsed > 1.0:
                raise AssertionError(f"{other.name} {other.form} used {share:.0%} of a core while {child.name} ran")
        if best is None or turn.answer.others < best.answer.others:
            best = turn
        if turn.answer.others <= QUIET:
            break
    assert best
    return best


def check_greedy(model: Llama, workload: Workload, answers: dict[Child, Answer]) -> None:
    """The first 16 tokens of every engine are what the model gives, up to ties within the rounding of its format."""
    llm = LLM(model, kv_cache_gb=0.2)
    [prompt] = workload.prompts
    [output] = llm.generate(workload.prompts, workload.params)
    right = list(output.outputs[0].token_ids)
    for child, answer in answers.items():
        told = answer.tokens[0][0]
        same = next((at for at in range(min(16, len(right))) if told[at] != right[at]), None)
        if same is None:
            continue
        scores: list[list[float]] = llm.score([*prompt, *right[:same]], [[right[same]], [told[same]]])
        gap = scores[0][0] - scores[1][0]
        if not gap <= GAP[PEERS[child.name].formats[child.form]]:
            raise AssertionError(
                f"{child.name} {child.form} says {told[same]} at position {same} where the model says {right[same]}, "
                f"which is {gap:.3f} nats likelier"
            )


def _row(child: Child, turns: list[Turn], model: Llama, workload: Workload, limits: Limits) -> dict[str, Any]:
    seconds = [turn.answer.seconds for turn in turns]
    counted = workload.new_tokens + (workload.prompt_tokens if workload.name == "prefill" else 0)
    head = 2 * model.head.numel()
    flops = product_flops(model) * (workload.distinct_prompt_tokens + workload.new_tokens) + head * workload.new_tokens
    row = {
        "workload": workload.name,
        "engine": child.name,
        "version": child.version,
        "format": child.form,
        "class": PEERS[child.name].formats[child.form],
        "seconds": seconds,
        "tokens_per_second": counted / statistics.median(seconds),
        "tokens_per_second_20_80": [counted / second for second in reversed(spread(seconds))],
        "share_of_flops": flops / statistics.median(seconds) / (limits.gflops * 1e9),
        "other_processes": max(turn.answer.others for turn in turns),
    }
    if workload.name == "single":
        decode = statistics.median(turn.answer.seconds - turn.first for turn in turns)
        row["decode_seconds"] = decode
        row["share_of_bandwidth"] = decode_bytes(model, workload, child.name, child.form) / decode / (limits.gbps * 1e9)
    return row


def decode_bytes(model: Llama, workload: Workload, engine: str, form: str) -> float:
    """Weights of products, and keys and values, that the steps after the first token read. Keys and values are f16 in
    llama.cpp, as it is driven here, and bf16 beside weights of bf16; elsewhere they are fp32, beside int8 weights too."""
    config, new = model.config, workload.params[0].max_tokens
    weights = (product_flops(model) / 2 + model.head.numel()) * BYTES[form] * (new - 1)
    context = sum(len(workload.prompts[0]) + step for step in range(1, new))
    number = 2 if engine == "llamacpp" or form == "bfloat16" else 4
    return weights + context * 2 * config.n_layers * config.n_kv_heads * config.head_dim * number


def spread(values: list[float]) -> tuple[float, float]:
    """The 20% and 80% quantiles."""
    if len(values) == 1:
        return values[0], values[0]
    quantiles = statistics.quantiles(values, n=5, method="inclusive")
    return quantiles[0], quantiles[3]


def _our_speed(
    row: dict[str, Any], turns: list[Turn], rows: list[dict[str, Any]], all_turns: list[list[Turn]]
) -> float | None:
    """Ours over this one's in the same rounds: in its class of formats, or None if ours does not run in it."""
    ours = next((at for at, own in enumerate(rows) if own["engine"] == OURS and own["class"] == row["class"]), None)
    if ours is None:
        return None
    ratios = [turn.answer.seconds / own.answer.seconds for turn, own in zip(turns, all_turns[ours], strict=True)]
    return statistics.median(ratios)
