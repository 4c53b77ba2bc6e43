"""`python -m benchmarks sampling|judging`: tokens a second, what was saved, and what each idea gives."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.limits import Limits, machine
from benchmarks.models import MODELS, random_model
from benchmarks.peers import PEERS, load_peer
from benchmarks.throughput import measure
from benchmarks.workloads import WORKLOADS
from engine import InputError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--model", default="110M", help=f"a random Llama: {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every variant, in turns (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of prompts (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: torch's number")
    parser.add_argument("--peers", default="", help=f"also time these, in turns with the engine: {', '.join(PEERS)}")
    parser.add_argument("--json", type=Path, help="write machine, limits and rows to this file")
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    if arguments.rounds < 1 or not 0 < arguments.scale <= 100 or not 1 <= (arguments.threads or 1) <= cores:
        parser.error(f"--rounds is at least 1, --threads 1 to {cores}, --scale above 0 and at most 100")
    if arguments.json and (arguments.json.is_dir() or not arguments.json.parent.is_dir()):
        parser.error(f"--json {arguments.json}: expected a file in a directory that exists")
    try:
        model = random_model(arguments.model)
        peers = [load_peer(name, model) for name in arguments.peers.split(",") if name]
    except InputError as error:
        parser.error(str(error))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    limits = Limits.measure(torch.get_num_threads())
    result: dict[str, Any] = {
        "command": f"python -m benchmarks {' '.join(_without_json(sys.argv[1:]))}",
        "machine": machine(),
        "limits": limits._asdict(),
        "rows": measure(arguments.workload, model, arguments.rounds, arguments.scale, limits, peers),
    }
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _without_json(words: list[str]) -> list[str]:
    """What was measured, not where it was written."""
    at = next((number for number, word in enumerate(words) if word.startswith("--json")), len(words))
    return words[:at] + words[at + (1 if "=" in "".join(words[at : at + 1]) else 2) :]


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"{result['machine']['cpu']}, {result['machine']['instructions']}, {result['machine']['threads']} threads; "
        f"limits {result['limits']['gflops']:.0f} GFLOP/s, {result['limits']['gbps']:.1f} GB/s",
        "",
        "| variant | new tokens/s | time | prompt tokens computed | KV read, GB | of FLOP/s | scheduler | Python | memory, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "peer" in row:
            lines.append(
                f"| {row['peer']} {row['version']} | {row['new_tokens_per_second']:.0f} | {row['time_ratio']:.2f}x "
                "| | | | | | |"
            )
            continue
        lines.append(
            f"| {row['variant']} | {row['new_tokens_per_second']:.0f} | {row['time_ratio']:.2f}x "
            f"| {row['prompt_tokens_computed']:,} of {row['prompt_tokens']:,} "
            f"| {row['kv_gb_read']:.1f} of {row['kv_gb_ungrouped']:.1f} | {row['share_of_flops']:.0%} "
            f"| {row['scheduler_share']:.1%} | {row['host_share']:.1%} | {row['peak_memory_gb']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
