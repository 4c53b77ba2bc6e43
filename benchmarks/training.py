"""`python -m benchmarks train|logprob`: a DPO step on a CPU, or its head alone, beside other ways to compute it.

Every way (drivers/drive_train.py) is a process of its own that does a step when it is told to and else sleeps; in every
round each does the same step in turn. A step is forward and backward of 4 pairs of 2 x 256 tokens, without and with a
prompt that is half of them; the optimiser is left out. `selfreward` is the engine with its head in one pass, `recompute`
with its tiles made twice. All must agree about the loss and the gradients' norm. Memory is
the highest resident size during a step less that before the first one of the process, so that what a way keeps from one to
the next counts (`logprob`: less the hidden states and the two gradients that come out as well).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.limits import Limits, machine
from benchmarks.models import MODELS, product_flops, random_model
from benchmarks.options import bad_target, bad_threads
from engine import InputError

DRIVER = Path(__file__).parent / "drivers" / "drive_train.py"
OURS = "selfreward"  # the head in one pass
RECOMPUTE = "recompute"  # the head's other schedule
PEERS = {"eager": "torch", "linear_cross_entropy": "torch", "liger": "liger_kernel", "trl": "trl"}  # what each needs
WORK = {
    "train": {"no shared prompt": (0, 256), "prompt half of the tokens": (128, 128)},
    "logprob": {"all tokens": (0, 256)},
}
AGREE = 1e-3  # relative: fp32 in another order


class Child:
    def __init__(self, name: str, python: str, model: str, threads: int) -> None:
        command = [python, str(DRIVER), name, model, str(threads)]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._read()["torch"]

    def ask(self, work: dict[str, Any]) -> dict[str, float]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"{self.name} ended with status {self.process.wait()}; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def pythons(kind: str, names: Sequence[str], directory: Path | None) -> dict[str, str]:
    """The interpreter of each way: of the environment DIRECTORY/train if there is one, else this one."""
    other = directory / "train" / "bin" / "python" if directory else None
    found = {}
    for name in names:
        if kind == "logprob" and name == "trl":
            print("trl left out: its head cannot be called without its model; `train` measures it")
            continue
        if name not in PEERS:
            raise InputError(f"peer is {name!r}; expected some of {', '.join(PEERS)}")
        if other and other.is_file():
            found[name] = str(other.absolute())
        elif importlib.util.find_spec(PEERS[name]):
            found[name] = sys.executable
        else:
            print(
                f"{name} left out: no {PEERS[name]} here; --peers-dir names a directory with train/bin/python that has it"
            )
    return {OURS: sys.executable, RECOMPUTE: sys.executable, **found}


def measure(kind: str, model_name: str, names: dict[str, str], rounds: int, threads: int) -> dict[str, Any]:
    model = random_model(model_name)
    children = [Child(name, python, model_name, threads) for name, python in names.items()]
    rows = []
    try:
        limits = Limits.measure(threads)
        for title, (prompt, answer) in WORK[kind].items():
            work = {"kind": "head" if kind == "logprob" else "step", "pairs": 4, "prompt": prompt, "answer": answer}
            found: dict[str, list[dict[str, float]]] = {child.name: [] for child in children}
            for number in range(-1, rounds):
                for child in children[number % len(children) :] + children[: number % len(children)]:
                    step = child.ask({**work, "seed": number + 1})
                    if number >= 0:  # the first one warms up
                        found[child.name].append(step)
                limits = Limits(*map(max, limits, Limits.measure(threads)))
            check_agreement(found)
            ours = [step["seconds"] for step in found[OURS]]
            flops = flops_of(kind, model, prompt, answer)
            for child in children:
                steps = found[child.name]
                seconds = [step["seconds"] for step in steps]
                row: dict[str, Any] = {"work": title, "way": child.name, "torch": child.version}
                for part in ("seconds", "hidden", "loss", "backward", "peak"):
                    if part in steps[0]:
                        row[part] = statistics.median(step[part] for step in steps)
                row["all_seconds"] = seconds
                row["our_speed"] = statistics.median(a / b for a, b in zip(seconds, ours, strict=True))
                row["flops"] = flops
                rows.append(row)
    finally:
        for child in children:
            child.close()
    for row in rows:
        row["share_of_flops"] = row["flops"] / row["seconds"] / (limits.gflops * 1e9)
    return {"limits": limits._asdict(), "rows": rows}


def flops_of(kind: str, model: Any, prompt: int, answer: int) -> float:
    """Of the products with weights, forward and backward, of tokens that are all different: 4 prompts, 8 answers. An
    answer's first token is predicted where there is a prompt."""
    targets = 8 * (answer if prompt else answer - 1)
    head = 6 * model.head.numel() * targets
    return float(head if kind == "logprob" else head + 3 * product_flops(model) * (4 * prompt + 8 * answer))


def check_agreement(found: dict[str, list[dict[str, float]]]) -> None:
    for name, steps in found.items():
        for mine, theirs in zip(found[OURS], steps, strict=True):
            for value in ("value", "norm", *(["head_norm"] if "head_norm" in mine else [])):
                if not abs(mine[value] - theirs[value]) <= AGREE * abs(mine[value]):
                    raise AssertionError(f"{name} has a {value} of {theirs[value]}, {OURS} {mine[value]}")


def table(result: dict[str, Any]) -> str:
    limits, where = result["limits"], result["machine"]
    lines = [
        f"{where['cpu']}, {where['instructions']}, {where['threads']} threads; limit {limits['gflops']:.0f} GFLOP/s",
        "",
        "| work | way | ms | forward | loss | backward | ours is faster | of FLOP/s | memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        parts = [f"{row[part] * 1e3:,.0f}" if part in row else "" for part in ("seconds", "hidden", "loss", "backward")]
        lines.append(
            f"| {row['work']} | {row['way']} | {' | '.join(parts)} | {row['our_speed']:.2f}x | {row['share_of_flops']:.0%} "
            f"| {row['peak'] / 1e6:,.0f} |"
        )
    return "\n".join(lines)


def verdicts(kind: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the bars are met, a line each; those for which a way was not measured are left out."""
    lines = []
    for work in dict.fromkeys(row["work"] for row in rows):
        ways = {row["way"]: row for row in rows if row["work"] == work}
        peers = {name: row for name, row in ways.items() if name not in (OURS, RECOMPUTE)}
        if kind == "logprob":
            if eager := peers.pop("eager", None):
                lines += [
                    _line(work, ours, "eager", _times(ways[ours], eager), time, ways[ours]["peak"] / eager["peak"], 0.1)
                    for ours, time in ((OURS, 1.0), (RECOMPUTE, 1.35))
                ]
            for ours in (OURS, RECOMPUTE):
                lines += [
                    _line(work, ours, name, _times(ways[ours], row), 1.0, ways[ours]["peak"] / row["peak"], 1.0)
                    for name, row in peers.items()
                ]
        elif peers:
            time = max(_times(ways[OURS], row) for row in peers.values())
            smallest = min(row["peak"] for row in peers.values())
            most = 1.0 if work == "no shared prompt" else 1 / 1.2  # 0.9 of the ratio of tokens, 4/3
            lines.append(_line(work, OURS, "the best peers", time, most, ways[OURS]["peak"] / smallest, 1.0))
    return lines


def _times(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Our time over theirs, of the same round."""
    return statistics.median(a / b for a, b in zip(ours["all_seconds"], theirs["all_seconds"], strict=True))


def _line(work: str, ours: str, theirs: str, time: float, most_time: float, memory: float, most_memory: float) -> str:
    met = "met" if time <= most_time and memory <= most_memory else "NOT met"
    return (
        f"{met}: {work}, {ours} beside {theirs}: time {time:.2f} (bar {most_time:.2f}), "
        f"memory {memory:.3f} (bar {most_memory:.1f})"
    )


def main(kind: str, words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {kind}", description=__doc__)
    parser.add_argument("--model", default="110M", choices=sorted(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's number")
    parser.add_argument("--peers", default=",".join(PEERS), help="'' for none (default: %(default)s)")
    parser.add_argument("--peers-dir", type=Path, default=os.environ.get("SELFREWARD_PEERS"))
    parser.add_argument("--json", type=Path, help="write machine, limits and rows to this file")
    given = parser.parse_args(words)
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: expected at least 1")
    if problem := bad_threads(given.threads) or bad_target(given.json):
        parser.error(problem)
    given.threads = given.threads or torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        names = pythons(kind, [name for name in given.peers.split(",") if name], given.peers_dir)
        measured = measure(kind, given.model, names, given.rounds, given.threads)
    except InputError as error:
        parser.error(str(error))
    command = f"python -m benchmarks {kind} --model {given.model} --rounds {given.rounds} --threads {given.threads}"
    others = ",".join(name for name in names if name not in (OURS, RECOMPUTE))
    result = {"command": f"{command} --peers {others}", "machine": machine(), **measured}
    print(table(result))
    print("", *verdicts(kind, result["rows"]), sep="\n")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
