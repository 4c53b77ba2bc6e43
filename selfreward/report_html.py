"""report.html: one page that needs no other file, readable on a phone, in light and in dark.

`write_report` ends a run: it writes report.json, plots/*.png and report.html. Times stand in report.html and in the
`timing` object of report.json; all else is the same bytes in equal runs. The page's text comes from models and data, so
the template escapes everything, and a content security policy forbids scripts and anything from elsewhere.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from selfreward.formats import read_jsonl
from selfreward.pairs import said
from selfreward.report import (
    NONE,
    build_report,
    graded_instructions,
    match_table,
    model_table,
    number,
    reasons,
    time_table,
    title_of_matches,
    with_error,
)
from selfreward.report_plots import Plot, draw_plots
from selfreward.report_rounds import round_figures
from selfreward.state import TIMING, RunDir

Row = dict[str, Any]

EXAMPLES = 3  # pairs per round
SHOWN_CHARACTERS = 1200  # of a prompt or an answer
SHOWN_HASH = 12  # digits
HEAD_TO_HEAD = "evaluation/head_to_head"
PLUS_MINUS = "\u00a0±\u00a0"  # a figure and its error stay on one line
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def write_report(directory: RunDir, models: list[Row], stopped: str | None = None) -> Row:
    """Write report.json, plots/*.png and report.html into a run, from its finished stages. Returns what report.json holds.

    models: a row per model, as `selfreward.run.loop` returns them. stopped: why a run ended early.
    """
    stages, timing = directory.finished(), directory.file(TIMING)
    rounds = round_figures(directory.path, stages)
    matches = read_jsonl(directory.file("evaluation/head_to_head.jsonl")) if HEAD_TO_HEAD in stages else []
    times, recipe = read_jsonl(timing) if timing.is_file() else [], directory.manifest.get("recipe") or {}
    report = build_report(models, rounds, matches, stages, times, recipe, stopped)
    plots = draw_plots(models, rounds, matches, training_curves(directory.path, stages))
    for plot in plots:
        directory.write_bytes(f"plots/{plot.name}.png", plot.png)
    directory.write_json("report.json", report)
    judge = (directory.manifest.get("models") or {}).get("judge_model")
    page = render(report, plots, example_pairs(directory.path, stages), recipe, judge)
    directory.write_bytes("report.html", page.encode("utf-8"))
    return report


def render(
    report: Row,
    plots: Sequence[Plot],
    examples: Sequence[Row],
    recipe: Mapping[str, Any],
    judge_hash: str | None = None,
) -> str:
    """The page. Nothing is read from the disk but the template. judge_hash: of `judge_model`'s contents."""
    headings, cells = model_table(report)
    match_headings, matches = match_table(report["matches"])
    time_headings, times = time_table(report)
    return _template().render(
        lead=lead(report, positives=recipe.get("method") == "positives"),
        stopped=report["stopped"],
        headings=headings,
        cells=[[cell.replace(" +- ", PLUS_MINUS) for cell in row] for row in cells],
        graded=graded_instructions(report),
        names=[row["name"] for row in report["models"]],
        judge=_judge(recipe),
        judge_model=Path(str(recipe.get("judge_model"))).name,
        judge_hash=(judge_hash or "")[:SHOWN_HASH],
        expected=(recipe.get("judge") or {}).get("score") == "expected",
        warnings=report["warnings"],
        compared=report["stages"].get(HEAD_TO_HEAD),
        match_title=title_of_matches(report) if matches else "",
        match_headings=match_headings,
        matches=[[cell.replace(" +- ", PLUS_MINUS) for cell in row] for row in matches],
        time_headings=time_headings,
        times=times,
        dropout=(recipe.get("dpo") or {}).get("dropout"),
        positives=recipe.get("method") == "positives",
        copied=any("duplicate" in (row["statuses"] or {}) for row in report["rounds"]),
        rounds=[row["round"] for row in report["rounds"]],
        figures=round_table(report["rounds"]),
        plots={plot.name: plot for plot in plots},
        image={plot.name: "data:image/png;base64," + base64.b64encode(plot.png).decode() for plot in plots},
        examples=examples,
        total=sum(report["timing"]["seconds"].values()),
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False),
    )


def lead(report: Row, positives: bool = False) -> list[str]:
    """What happened, in a few sentences, first on the page. positives: the rounds train on perfect answers, not on pairs."""
    models, rounds = report["models"], report["rounds"]
    found = [
        _from_to(models, "true_quality", "True quality", "0 to 5", ".2f"),
        _from_to(models, "judge_pairwise", "Accuracy as a judge", "of ranked pairs, ties wrong", ".1%"),
    ]
    unread = {row["name"]: row["judge_unread"] for row in models if row.get("judge_unread")}
    if unread:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in unread.items())
        found.append(f"Of the answers judged for that, without a readable score, and so wrong: {shares}.")
    key = "positives" if positives else "pairs"
    counts = ", ".join(
        f"{row[key]} {'up to' if positives else 'in'} round {row['round']}" for row in rounds if row[key] is not None
    )
    if counts:
        what = (
            "The models' own answers with the perfect score"
            if positives
            else "Preference pairs made from the models' own answers"
        )
        found.append(f"{what}: {counts}.")
    if "same_as" in report["stages"].get("m1/model", {}):
        found.append("There was no judge data, so M1 is the SFT baseline.")
    return [sentence for sentence in found if sentence]


def _from_to(models: Sequence[Row], key: str, what: str, unit: str, spec: str) -> str | None:
    """The figure for the first model, for M1 and for the last; None where no model has it."""
    rows = [row for row in models if row.get(key) is not None]
    if not rows:
        return None
    shown = [row for row in rows if row is rows[0] or row["name"] == "M1" or row is rows[-1]]
    return f"{what} ({unit}): " + ", ".join(f"{row['name']} {_figure(row, key, spec)}" for row in shown) + "."


def _judge(recipe: Mapping[str, Any]) -> str:
    """Who judges in the rounds: each round's model, a fixed one, or one of the controls, which a reader must know of."""
    by = (recipe.get("judge") or {}).get("by", "model")
    return "fixed" if by == "model" and recipe.get("judge_model") else str(by)


def _figure(row: Row, key: str, spec: str) -> str:
    return with_error(row[key], row.get(f"{key}_se"), spec).replace(" +- ", PLUS_MINUS)


def round_table(rounds: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """(name of a figure, its value in each round) for the page."""
    table = [
        ("prompts kept", [number(row["prompts_kept"], "d") for row in rounds]),
        ("prompts left out", [_counts(row["prompts_dropped"]) for row in rounds]),
        ("words of a prompt", [number(row["prompt_words"], ".1f") for row in rounds]),
        ("likeness to earlier ones", [number(row["prompt_rouge"], ".2f") for row in rounds]),
        ("different openings", [number(row["openings_different"], ".1%") for row in rounds]),
        ("entropy of the first word, bits", [number(row["opening_entropy_bits"], ".2f") for row in rounds]),
        ("most frequent openings", [_counts(row["openings"]) for row in rounds]),
        ("most frequent long words", [_counts(row["topics"]) for row in rounds]),
        ("length of answers against round 1", [number(row["length_drift"], ".2f") for row in rounds]),
        ("variety of the answers", [number(row["answer_diversity"], ".1%") for row in rounds]),
        ("answers that were cut", [number(row["answers_cut"], ".1%") for row in rounds]),
        ("judgements", [number(row["judgements"], "d") for row in rounds]),
        ("how they could be read", [_counts(row["statuses"]) for row in rounds]),
        ("mean score", [number(row["score_mean"], ".2f") for row in rounds]),
        ("entropy of the scores, bits", [number(row["score_entropy_bits"], ".2f") for row in rounds]),
        ("variance between an answer's draws", [number(row["draw_variance"], ".2f") for row in rounds]),
        ("readable ones with an expected score", [number(row["expected_share"], ".1%") for row in rounds]),
        ("expected score, distance from the drawn", [number(row["expected_gap"], ".4f") for row in rounds]),
        ("pairs", [number(row["pairs"], "d") for row in rounds]),
        ("pairs per prompt", [number(row["pair_yield"], ".3f") for row in rounds]),
        ("prompts without a pair", [_counts(row["pairs_dropped"]) for row in rounds]),
        ("tokens, chosen", [number(row["length_chosen"], ".1f") for row in rounds]),
        ("tokens, rejected", [number(row["length_rejected"], ".1f") for row in rounds]),
        ("chosen minus rejected", [_figure(row, "length_gap", "+.2f") for row in rounds]),
        ("agreement of the judge's draws", [number(row["consistency"], ".3f") for row in rounds]),
        ("label smoothing", [number(row["label_smoothing"], ".3f") for row in rounds]),
        ("perfect answers trained on", [number(row["positives"], "d") for row in rounds]),
        ("training steps", [number(row["steps"], "d") for row in rounds]),
        ("kept is the model of step", [number(row["best_step"], "d") for row in rounds]),
        ("rows held out to choose it", [number(row["held_out"], "d") for row in rounds]),
        ("sampler against trainer, nats a token", [number(row["parity_max"], ".1e") for row in rounds]),
    ]
    return [(name, values) for name, values in table if any(value != NONE for value in values)]


def training_curves(folder: Path, stages: Iterable[str]) -> dict[str, list[Row]]:
    """Name of each trained model -> the metrics of its steps."""
    curves = {}
    for stage in stages:
        name, file = _trained(stage), folder / stage.split("/")[0] / "metrics.jsonl"
        if name is not None and file.is_file():
            curves[name] = read_jsonl(file)
    return curves


def _trained(stage: str) -> str | None:
    if stage in ("sft/model", "m1/model"):
        return stage.split("/")[0].upper()
    found = re.fullmatch(r"iter_(\d+)/model", stage)
    return f"M{int(found[1]) + 1}" if found else None


def example_pairs(folder: Path, stages: Iterable[str]) -> list[Row]:
    """A few pairs of every round, evenly spaced over the file, so that nobody has picked them."""
    rounds = []
    for stage in stages:
        if re.fullmatch(r"iter_\d+/pairs", stage):
            rows = read_jsonl(folder / f"{stage}.jsonl")
            picked = [rows[len(rows) * place // EXAMPLES] for place in range(min(EXAMPLES, len(rows)))]
            if picked:
                rounds.append({"round": int(stage.split("/")[0][5:]), "pairs": [_example(row) for row in picked]})
    return rounds


def _example(pair: Row) -> Row:
    answers = [
        {
            "kind": kind,
            "text": _shown(said(pair, kind)),
            "score": number(pair[f"score_{kind}"], ".2f"),
            "tokens": len(ids),
        }
        for kind in ("chosen", "rejected")
        for ids in [pair[f"{kind}_token_ids"]]
    ]
    return {"prompt": _shown(said(pair, "prompt")), "answers": answers}


def _shown(text: str) -> str:
    """A text at a bearable length, without characters that a page cannot hold."""
    text = _UNPRINTABLE.sub("\ufffd", text)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."


def _counts(counts: Mapping[str, int] | None) -> str:
    """A name stays beside its number where the line breaks."""
    return NONE if counts is None else reasons(counts).replace(" ", "\u00a0").replace(",\u00a0", ", ")


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")
