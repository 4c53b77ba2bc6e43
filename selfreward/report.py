"""What a run says: progress while it works, the table and report.json at the end."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from selfreward.health import model_warnings, round_warnings

Row = dict[str, Any]
PROGRESS_SECONDS = 5.0
NONE = "-"  # a figure that there is not
LONGER = "longer text"  # the baseline of judges
PAGE_ONLY = (
    "ties half, 95%",
    "judge change",
    "seconds",
    "5-best",
    "exact",
    "Spearman",
    "Kendall",
    "distinct pairs",
    "repetition",
)  # of the columns


class Reporter:
    """Progress to standard error, results to standard output; `quiet`: no progress, `as_json`: the report as JSON."""

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """What is odd but no error is said in any case."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

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


def build_report(
    models: list[Row],
    rounds: list[Row],
    matches: list[Row],
    stages: dict[str, Row],
    timing: list[Row],
    recipe: Row,
    stopped: str | None = None,
) -> Row:
    """report.json: figures per model, per round and per match, counts per stage, what is odd in them; everything about time
    under `timing`, with what the sampler did in each stage (`SPENT` of `LLM.stats()`)."""
    seconds: Counter[str] = Counter()
    sampler: dict[str, Counter[str]] = {}
    for row in timing:
        seconds[row["stage"]] += row["seconds"]
        if "sampler" in row:
            sampler.setdefault(row["stage"], Counter()).update(row["sampler"])
    return {
        "models": models,
        "rounds": rounds,
        "matches": matches,
        "warnings": [said for row in rounds for said in round_warnings(row, recipe)] + model_warnings(models, recipe),
        "stages": stages,
        "stopped": stopped,
        "timing": {"seconds": dict(seconds), "sampler": {stage: dict(found) for stage, found in sampler.items()}},
    }


def model_table(report: Row) -> tuple[list[str], list[list[str]]]:
    """Headings, and for every model its cells as text; what no model has is no column. The last row is the baseline of judges:
    what scoring a text by its length would give."""
    seconds = report["timing"]["seconds"]
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("model", lambda row: str(row["name"])),
        ("true quality", lambda row: with_error(row.get("true_quality"), row.get("true_quality_se"))),
        ("change", lambda row: with_error(row.get("true_quality_change"), row.get("true_quality_change_se"), "+.2f")),
        ("greedy", lambda row: with_error(row.get("true_quality_greedy"), row.get("true_quality_greedy_se"))),
        ("judge pairwise", lambda row: number(row.get("judge_pairwise"), ".3f")),
        ("judge unread", lambda row: number(row.get("judge_unread") or None, ".1%")),
        ("ties half", lambda row: number(row.get("judge_pairwise_ties_half"), ".3f")),
        ("ties half, 95%", lambda row: interval(row, "judge_pairwise_ties_half")),
        ("judge change", lambda row: with_interval(row, "judge_change", "+")),
        ("5-best", lambda row: with_interval(row, "judge_five_best")),
        ("exact", lambda row: with_interval(row, "judge_exact")),
        ("Spearman", lambda row: with_interval(row, "judge_spearman")),
        ("Kendall", lambda row: with_interval(row, "judge_kendall")),
        ("mean length", lambda row: number(row.get("mean_length"), ".1f")),
        ("distinct pairs", lambda row: number(row.get("distinct_2"), ".3f")),
        ("repetition", lambda row: number(row.get("repetition"), ".3f")),
        ("pairs", lambda row: number(row.get("pairs"), "d")),
        ("seconds", lambda row: number(seconds.get(row.get("stage", "")), ".0f")),
    ]
    cells = [[cell(row) for row in [*report["models"], *_length_as_judge(report["models"])]] for _, cell in columns]
    kept = [place for place, column in enumerate(cells) if any(cell != NONE for cell in column)]
    return [columns[place][0] for place in kept], [list(row) for row in zip(*(cells[p] for p in kept), strict=True)]


def _length_as_judge(models: Sequence[Row]) -> list[Row]:
    """`longer_*` in the columns of `judge_*`: the ranked answers are the same for all models."""
    figures = next((row for row in models if row.get("longer_pairwise") is not None), None)
    if figures is None:
        return []
    named = {"judge" + key.removeprefix("longer"): value for key, value in figures.items() if key.startswith("longer_")}
    return [{"name": LONGER} | named]


def print_report(report: Row, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width of its own
    graded = graded_instructions(report)
    title = f"true quality 0 to 5 on {graded} held-out instructions" if graded else "every model"
    headings, rows = model_table(report)
    shown = [place for place, heading in enumerate(headings) if heading not in PAGE_ONLY]  # the page has room
    cells = [[row[place] for place in shown] for row in rows]
    console.print(_table(f"Self-rewarding loop: {title}", [headings[place] for place in shown], cells))
    if report["stopped"]:
        print(report["stopped"])
    if report["matches"]:
        console.print(_table(title_of_matches(report), *match_table(report["matches"])))
    console.print(_table("Seconds per stage", *time_table(report)))


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for place, heading in enumerate(headings):
        # Where there is no room, headings break and not figures.
        widest = max((len(row[place]) for row in rows), default=0)
        table.add_column(heading, justify="left" if place == 0 else "right", min_width=widest)
    for row in rows:
        table.add_row(*row)
    return table


def title_of_matches(report: Row) -> str:
    found = report["stages"]["evaluation/head_to_head"]
    by = "the judge model" if found["by"] == "judge_model" else found["by"]
    return match_title(found["prompts"], by, found["how"])


def match_title(prompts: int, by: str, how: str) -> str:
    """On how many prompts, who judged the matches, and how: "scores", or both answers at once."""
    seen = "'s scores" if how == "scores" else ", which saw both answers in both orders"
    return f"Head to head on {prompts} prompts, by {by}{seen}"


def match_table(matches: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings, and the cells of every match: shares of the prompts with a verdict, the share of all that both answered with
    the same text (they tie), how many have no verdict, tokens."""
    headings = [
        "model",
        "against",
        "win",
        "tie",
        "loss",
        "win - loss",
        "same text",
        "unread",
        "tokens",
        "tokens against",
    ]
    return headings, [
        [
            row["model"],
            row["against"],
            *(number(row[key], ".1%") for key in ("win", "tie", "loss")),
            with_error(row["win_minus_loss"], row["win_minus_loss_se"], "+.2f"),
            number(row["same_text"] / (row["n"] + row["unread"]) if row["n"] + row["unread"] else None, ".1%"),
            str(row["unread"]),
            *(number(row[key], ".1f") for key in ("mean_length", "mean_length_against")),
        ]
        for row in matches
    ]


def time_table(report: Row) -> tuple[list[str], list[list[str]]]:
    """Headings and a row per stage: its seconds; of its sampler the tokens that were computed in a second of its steps, and
    those of prompts that were not, since another request had them."""
    rows = []
    for stage, seconds in report["timing"]["seconds"].items():
        found = report["timing"]["sampler"].get(stage)
        cells = [NONE, NONE]
        if found and found["seconds"]:
            shared = found["prefix_tokens_saved"] + found["fork_tokens_saved"]
            cells = [f"{found['computed_rows'] / found['seconds']:,.0f}", f"{shared:,}"]
        rows.append([stage, f"{seconds:.1f}", *cells])
    return ["stage", "seconds", "tokens/s", "tokens shared"], rows


def number(value: Any, spec: str) -> str:
    return NONE if value is None else format(value, spec)


def with_error(value: float | None, error: float | None, spec: str = ".2f") -> str:
    """A figure and its standard error."""
    if value is None:
        return NONE
    return format(value, spec) + (f" +- {error:.2f}" if error is not None else "")


def with_interval(row: Mapping[str, Any], key: str, sign: str = "") -> str:
    """A figure and the interval beside it; sign "+": of a difference."""
    shown, between = number(row.get(key), f"{sign}.3f"), interval(row, key, sign)
    return f"{shown} ({between})" if between != NONE else shown


def interval(row: Mapping[str, Any], key: str, sign: str = "") -> str:
    """The interval alone, with a digit less than the figure."""
    found = row.get(f"{key}_interval")
    return f"{found[0]:{sign}.2f} to {found[1]:{sign}.2f}" if found else NONE


def reasons(counts: Mapping[str, int]) -> str:
    """ "tie 6, duplicate 2", or "none"."""
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()) or "none"


def graded_instructions(report: Row) -> int:
    """On how many held-out instructions true quality was measured; 0 where there is no oracle."""
    return max((row.get("true_quality_n") or 0 for row in report["models"]), default=0)
