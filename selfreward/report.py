"""What a run says: progress while it works, the table and report.json at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
PROGRESS_SECONDS = 5.0


class Reporter:
    """Progress to standard error, results to standard output; `quiet`: no progress, `as_json`: the report as JSON."""

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def progress(self, what: str, total: int) -> Callable[[int], None]:
        """A function to call with the number of newly finished items; prints at most every 5 seconds."""
        started = last = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last >= PROGRESS_SECONDS:
                last = now
                rate = done / (now - started)
                self.say(f"    {what}: {done}/{total}  {rate:.1f}/s  {(total - done) / rate:.0f} s left")

        return advance

    def steps(self, what: str) -> Callable[[int, int, dict[str, float]], None]:
        """The same for training steps."""
        advance: Callable[[int], None] | None = None

        def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
            nonlocal advance
            advance = advance or self.progress(f"{what} steps", steps)
            advance(1)
            if step == steps:
                self.say(f"    {what}: {steps} steps, last loss {metrics['loss']:.3f}")

        return on_step


def build_report(models: list[Row], stages: dict[str, Row], timing: list[Row], stopped: str | None = None) -> Row:
    """report.json: figures per model and counts per stage; everything about time under `timing`."""
    seconds: dict[str, float] = {}
    for row in timing:
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    return {"models": models, "stages": stages, "stopped": stopped, "timing": {"seconds": seconds}}


def print_report(report: Row, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 100)  # a pipe has no width of its own
    table = Table(title=f"Self-rewarding loop: true quality 0 to 5 on {_graded(report)} held-out instructions")
    for heading in ("model", "true quality", "judge pairwise", "longer wins", "mean length", "pairs", "seconds"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in report["models"]:
        table.add_row(
            row["name"],
            _with_error(row.get("true_quality"), row.get("true_quality_se")),
            _number(row.get("judge_pairwise"), ".3f"),
            _number(row.get("longer_wins"), ".3f"),
            _number(row.get("mean_length"), ".1f"),
            _number(row.get("pairs"), "d"),
            _number(report["timing"]["seconds"].get(row.get("stage", "")), ".0f"),
        )
    console.print(table)
    times = Table(title="Seconds per stage")
    times.add_column("stage")
    times.add_column("seconds", justify="right")
    for stage, seconds in report["timing"]["seconds"].items():
        times.add_row(stage, f"{seconds:.1f}")
    console.print(times)


def _number(value: Any, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" +- {error:.2f}" if error is not None else "")


def _graded(report: Row) -> int:
    return max((row.get("true_quality_n") or 0 for row in report["models"]), default=0)
