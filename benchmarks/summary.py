"""`python -m benchmarks.summary [DIRECTORY]`: the records `peers-WORKLOAD-THREADS.json` of a directory as two tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers import OURS
from benchmarks.workloads import COMPARED

RESULTS = Path(__file__).parent / "results" / "amd-epyc-family26-2cores"


def main() -> int:
    directory = Path(sys.argv[1]) if sys.argv[1:] else RESULTS
    records = {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("peers-*-*.json"))}
    if not records:
        sys.exit(f"{directory}: no peers-WORKLOAD-THREADS.json in it")
    print("\n".join([*speeds(records), "", *limits(records)]))
    return 0


def speeds(records: dict[str, Any]) -> Iterator[str]:
    """Tokens a second, and how many times as fast ours is with weights of the same class."""
    threads = sorted({name.rpartition("-")[2] for name in records})
    columns = [(workload, count) for workload in COMPARED for count in threads]
    found = {
        (row["engine"], row["format"], workload, count): row
        for workload, count in columns
        for row in records.get(f"peers-{workload}-{count}", {"rows": []})["rows"]
    }
    kinds = list(dict.fromkeys((*key[:2], found[key]["class"]) for key in found))
    yield "| engine | weights | " + " | ".join(f"{workload}, {count}" for workload, count in columns) + " |"
    yield "|---" * (2 + len(columns)) + "|"
    for engine, form, _ in sorted(kinds, key=lambda kind: [k[2] for k in kinds].index(kind[2])):
        cells = [_cell(found.get((engine, form, *column))) for column in columns]
        yield f"| {engine} | {form} | " + " | ".join(cells) + " |"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    speed = f"{row['tokens_per_second']:,.0f}"
    return f"**{speed}**" if row["engine"] == OURS else f"{speed} ({row['our_speed']:.2f}x)"


def limits(records: dict[str, Any]) -> Iterator[str]:
    """What the machine gave in the run, and ours of it with fp32 weights (`single`: with each)."""
    yield "| workload | threads | GFLOP/s | GB/s | ours |"
    yield "|---|---|---|---|---|"
    for name, record in records.items():
        workload, _, threads = name.removeprefix("peers-").rpartition("-")
        rows = [row for row in record["rows"] if row["engine"] == OURS]
        if "share_of_bandwidth" in rows[0]:
            share = ", ".join(f"{row['format']} {row['share_of_bandwidth']:.0%}" for row in rows) + " of GB/s"
        else:
            share = f"{rows[0]['share_of_flops']:.0%} of FLOP/s"
        limit = record["limits"]
        yield f"| {workload} | {threads} | {limit['gflops']:.0f} | {limit['gbps']:.1f} | {share} |"


if __name__ == "__main__":
    sys.exit(main())
