"""`python -m benchmarks sampling|judging`: what each idea of the engine gives; with `--peers`, and for `prefill` and
`single`, the engine beside other engines, at a smaller load. `kernels`, `prompts`, `quantization`, `sharing`,
`head-to-head`, `train` and `logprob` have options of their own."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import head_to_head, kernels, prompts, quantization, sharing, training
from benchmarks.compare import children, compare
from benchmarks.limits import Limits, machine
from benchmarks.models import MODELS, peaked, random_model
from benchmarks.options import bad_target, bad_threads
from benchmarks.peers import CLASSES, OURS, PEERS
from benchmarks.throughput import measure
from benchmarks.workloads import ABLATED, COMPARED
from engine import InputError

OTHERS: dict[str, Callable[[Sequence[str]], int]] = {
    "kernels": kernels.main,
    "prompts": prompts.main,
    "quantization": quantization.main,
    "train": partial(training.main, "train"),
    "logprob": partial(training.main, "logprob"),
    "sharing": sharing.main,
    "head-to-head": head_to_head.main,
}


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in OTHERS:
        return OTHERS[sys.argv[1]](sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("workload", choices=[*sorted(COMPARED), *OTHERS])
    parser.add_argument("--model", default="110M", help=f"a random Llama: {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of everything, in turns (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of prompts (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: torch's number; beside peers, each of so many cores")
    parser.add_argument(
        "--peers", help=f"of {','.join(peer for peer in PEERS if peer != OURS)}; '' is the comparison without any"
    )
    parser.add_argument(
        "--peers-dir",
        type=Path,
        default=os.environ.get("SELFREWARD_PEERS"),
        help="holds PEER/bin/python (default: SELFREWARD_PEERS)",
    )
    parser.add_argument("--formats", help=f"of weights, beside peers (default: {','.join(CLASSES)})")
    parser.add_argument("--json", type=Path, help="write machine, limits and rows to this file")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: expected at least 1")
    if not 0 < arguments.scale <= 100:
        parser.error(f"--scale {arguments.scale}: expected a number above 0 and at most 100")
    if problem := bad_threads(arguments.threads) or bad_target(arguments.json):
        parser.error(problem)
    ablated = arguments.peers is None and arguments.workload in ABLATED
    if ablated and arguments.formats:
        parser.error("--formats is for engines beside each other: add --peers, '' for ours alone")
    arguments.formats = arguments.formats or ",".join(CLASSES)
    if unknown := set(arguments.formats.split(",")) - set(CLASSES):
        parser.error(f"--formats {arguments.formats}: {', '.join(sorted(unknown))} is none of {', '.join(CLASSES)}")
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    try:
        measured = _ablation(arguments) if ablated else _peers(arguments)
    except InputError as error:
        parser.error(str(error))
    result = {
        "command": f"python -m benchmarks {' '.join(_measured(sys.argv[1:]))}",
        "machine": machine(),
        **measured,
    }
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _ablation(arguments: argparse.Namespace) -> dict[str, Any]:
    model = random_model(arguments.model)
    limits = Limits.measure(torch.get_num_threads())
    rows = measure(arguments.workload, model, arguments.rounds, arguments.scale, limits)
    return {"limits": limits._asdict(), "rows": rows}


def _peers(arguments: argparse.Namespace) -> dict[str, Any]:
    model, threads = peaked(random_model(arguments.model)), torch.get_num_threads()
    names = [OURS, *filter(None, (arguments.peers or "").split(","))]
    with children(model, names, arguments.formats.split(","), threads, arguments.peers_dir) as engines:
        limits, rows = compare(arguments.workload, model, engines, arguments.rounds, arguments.scale, threads)
    return {"limits": limits._asdict(), "rows": rows}


def _measured(words: list[str]) -> list[str]:
    """What was measured, not what it was read from and written to."""
    kept = []
    for word in (rest := iter(words)):
        if word.split("=")[0] not in ("--json", "--peers-dir"):
            kept.append(word or "''")
        elif "=" not in word:
            next(rest)
    return kept


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    rows = _ablation_rows(result["rows"]) if "variant" in result["rows"][0] else _peer_rows(result["rows"])
    return "\n".join(
        [
            f"{result['machine']['cpu']}, {result['machine']['instructions']}, {result['machine']['threads']} threads; "
            f"limits {result['limits']['gflops']:.0f} GFLOP/s, {result['limits']['gbps']:.1f} GB/s",
            "",
            *rows,
        ]
    )


def _ablation_rows(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "| variant | new tokens/s | time | prompt tokens computed | KV read, GB "
        "| of FLOP/s | scheduler | Python | memory, GB |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['variant']} | {row['new_tokens_per_second']:.0f} | {row['time_ratio']:.2f}x "
            f"| {row['prompt_tokens_computed']:,} of {row['prompt_tokens']:,} "
            f"| {row['kv_gb_read']:.1f} of {row['kv_gb_ungrouped']:.1f} | {row['share_of_flops']:.0%} "
            f"| {row['scheduler_share']:.1%} | {row['host_share']:.1%} | {row['peak_memory_gb']:.2f} |"
            for row in rows
        ),
    ]


def _peer_rows(rows: list[dict[str, Any]]) -> list[str]:
    single = "share_of_bandwidth" in rows[0]
    lines = [
        "| engine | weights | tokens/s | 20% to 80% | ours is faster "
        f"| of {'bandwidth' if single else 'FLOP/s'} | other processes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["tokens_per_second_20_80"]
        ratio = f"{row['our_speed']:.2f}x" if row["our_speed"] else ""
        share = row["share_of_bandwidth"] if single else row["share_of_flops"] if row["class"] == "float32" else None
        lines.append(
            f"| {row['engine']} {row['version']} | {row['format']} | {row['tokens_per_second']:.0f} "
            f"| {low:.0f} to {high:.0f} | {ratio} | {'' if share is None else f'{share:.0%}'} | {row['other_processes']:.2f} |"
        )
    return lines


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
