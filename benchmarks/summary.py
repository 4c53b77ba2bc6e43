"""`python -m benchmarks.summary [DIRECTORY]`: the records of a directory as tables: of a CPU `peers-WORKLOAD-THREADS.json`,
`train-2.json` and `logprob-2.json`, of a GPU `kernels.jsonl`, `sampler.jsonl` and `train.jsonl`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import training
from benchmarks.peers import OURS
from benchmarks.workloads import COMPARED

TRAINING = ("train-2.json", "logprob-2.json")
RESULTS = Path(__file__).parent / "results" / "amd-epyc-family26-2cores"


def main() -> int:
    directory = Path(sys.argv[1]) if sys.argv[1:] else RESULTS
    records = {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("peers-*-*.json"))}
    parts = [list(map(json.loads, path.read_text().splitlines())) for path in sorted(directory.glob("*.jsonl"))]
    training_records = [json.loads((directory / name).read_text()) for name in TRAINING if (directory / name).is_file()]
    if not (records or parts or training_records):
        sys.exit(f"{directory}: no peers-WORKLOAD-THREADS.json, no {' or '.join(TRAINING)} and no PART.jsonl in it")
    tables: list[Iterable[str]] = [speeds(records), limits(records)] if records else []
    tables += [[training.table(record)] for record in training_records]
    print("\n\n".join("\n".join(table) for table in (*tables, *map(gpu, parts))))
    return 0


def gpu(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One part of `benchmarks.gpu`. MB: taken at the most besides what was there and what is returned. What
    failed or was not begun is a row with the reason."""
    limit = next(row for row in rows if row["kernel"] == "limits")
    yield f"{limit['device']}, copy {limit['gbps']:,.0f} GB/s, products {limit['tflops']:.0f} TFLOP/s; " + ", ".join(
        f"{name} {version}" for name, version in limit["versions"].items()
    )
    yield ""
    yield f"| {limit['part']} | shape | ms | of the floor | how many times the time others take | MB |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        if reason := row.get("failed") or row.get("skipped"):
            yield f"| {row['kernel']} | {reason} | | | | |"
        elif row is not limit:
            share = f"{row['share_of_floor']:.0%}" if row["share_of_floor"] else ""
            others = ", ".join(f"{name} {peer['speedup']:.2f}" for name, peer in row.get("peers", {}).items())
            memory = f"{row['extra_memory'] / 1e6:,.0f}"
            yield f"| {row['kernel']} | {row['shape']} | {row['ms']:,.3f} | {share} | {others} | {memory} |"


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
