"""The plots of a run, as PNG bytes that are the same in equal runs.

Nothing of the user's machine enters: matplotlib's own defaults (not a matplotlibrc), its own font, no date and no version
in the file. A plot whose figures the run does not have is left out. matplotlib takes a second to import, so only drawing
imports it; figures are plain objects, without pyplot's global state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfreward.judge import TOP_SCORE
from selfreward.pairs import REASONS
from selfreward.report import reasons

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Curves = Mapping[str, Sequence[Row]]  # name of the trained model -> its metrics, a row per step

WIDTH, HEIGHT, DPI = 4.8, 3.0, 150  # inches; narrow, so that the text stays readable on a phone
COLOURS = ("#1f6fb4", "#d9660d", "#2a8f4f", "#8a5bb8", "#b8324b", "#5f6b7a")
GREY = "#c3c9d0"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
DPO_PANELS = {"loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "reward accuracy"}


@dataclass(frozen=True)
class Plot:
    """A drawn plot. `alt` says in words what it shows, for those who cannot see it."""

    name: str
    title: str
    alt: str
    png: bytes


def draw_plots(models: Sequence[Row], rounds: Sequence[Row], matches: Sequence[Row], curves: Curves) -> list[Plot]:
    """All plots that the figures allow, in the order of the page."""
    dpo = {name: rows for name, rows in curves.items() if any("rewards/margins" in row for row in rows)}
    sft = {name: rows for name, rows in curves.items() if name not in dpo}
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE], after_reset=True):
        of_models = [quality(models), judge(models), head_to_head(matches), texts(models)]
        plots = [*of_models, scores(rounds), pairs(rounds), dpo_curves(dpo), sft_curves(sft)]
    return [plot for plot in plots if plot is not None]


def quality(models: Sequence[Row]) -> Plot | None:
    """True quality of every model, sampled and greedy, with standard errors."""
    series = {"sampled": "true_quality", "greedy": "true_quality_greedy"}
    series = {label: key for label, key in series.items() if any(row.get(key) is not None for row in models)}
    if not series:
        return None
    figure, axes = _figure()
    for (label, key), colour in zip(series.items(), COLOURS, strict=False):
        _over_models(axes, models, key, label, colour)
    _name_models(axes, models, "true quality, 0 to 5", legend=len(series) > 1)
    alt = "; ".join(f"{label}: {_by_model(models, key, '.2f')}" for label, key in series.items())
    return _plot("quality", "True quality", f"True quality from 0 to 5 by model. {alt}.", figure)


def judge(models: Sequence[Row]) -> Plot | None:
    """Accuracy of every model as a judge, beside the rule that the longer answer wins."""
    series = {"ties wrong": "judge_pairwise", "ties half": "judge_pairwise_ties_half", "longer wins": "longer_wins"}
    if not any(row.get("judge_pairwise") is not None for row in models):
        return None
    figure, axes = _figure()
    for (label, key), colour in zip(series.items(), (*COLOURS[:2], COLOURS[-1]), strict=True):
        _over_models(axes, models, key, label, colour, style="--" if key == "longer_wins" else "-")
    _name_models(axes, models, "ranked pairs ordered rightly", legend=True)
    alt = "; ".join(f"{label}: {_by_model(models, key, '.3f')}" for label, key in series.items())
    return _plot("judge", "Accuracy as a judge", f"Share of pairs ordered as they are ranked, by model. {alt}.", figure)


def head_to_head(matches: Sequence[Row]) -> Plot | None:
    """What became of each match: the prompts that the newer model won, tied and lost."""
    rows = [row for row in matches if row["n"]]
    if not rows:
        return None
    figure, axes = _figure(height=1.2 + 0.32 * len(rows))
    labels, left = [f"{row['model']} against {row['against']}" for row in rows], [0.0] * len(rows)
    for outcome, colour in zip(("win", "tie", "loss"), (COLOURS[2], GREY, COLOURS[4]), strict=True):
        axes.barh(labels, [row[outcome] for row in rows], 0.65, left=left, color=colour, label=outcome)
        left = [a + row[outcome] for a, row in zip(left, rows, strict=True)]
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="share of the prompts", xlim=(0, 1))
    _legend(figure, axes, 3)
    alt = "; ".join(
        f"{row['model']} against {row['against']}: won {row['win']:.1%}, tied {row['tie']:.1%}, lost {row['loss']:.1%}"
        for row in rows
    )
    return _plot("head_to_head", "Head to head", f"Share of prompts by outcome. {alt}.", figure)


def texts(models: Sequence[Row]) -> Plot | None:
    """How long every model's answers are, and how much in them is not said twice."""
    panels = {"mean_length": "tokens of an answer", "distinct_2": "distinct pairs", "repetition": "repetition"}
    panels = {key: label for key, label in panels.items() if any(row.get(key) is not None for row in models)}
    if not panels:
        return None
    figure = _empty_figure(0.6 + 1.5 * len(panels))
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (key, label), colour in zip(rows, panels.items(), COLOURS, strict=False):
        _over_models(axes, models, key, label, colour)
        _name_models(axes, models, label, legend=False)
    alt = "; ".join(f"{label}: {_by_model(models, key, '.3f')}" for key, label in panels.items())
    return _plot("texts", "Length and variety of the answers", f"By model. {alt}.", figure)


def scores(rounds: Sequence[Row]) -> Plot | None:
    """Share of each score among the readable judgements of every round."""
    rows = [row for row in rounds if row["score_histogram"] and sum(row["score_histogram"])]
    if not rows:
        return None
    figure, axes = _figure()
    width = 0.84 / len(rows)
    for place, (row, colour) in enumerate(zip(rows, _colours(len(rows)), strict=True)):
        total = sum(row["score_histogram"])
        at = [score + (place - (len(rows) - 1) / 2) * width for score in range(int(TOP_SCORE) + 1)]
        label = f"round {row['round']}: {row['score_entropy_bits']:.2f} bits"
        axes.bar(at, [count / total for count in row["score_histogram"]], width, color=colour, label=label)
    axes.set(xlabel="score", ylabel="share of judgements")
    _legend(figure, axes, len(rows))
    alt = "; ".join(
        f"round {row['round']}, scores 0 to 5: {', '.join(map(str, row['score_histogram']))}" for row in rows
    )
    return _plot("scores", "Scores that the judge gave", f"Readable judgements by score. {alt}.", figure)


def pairs(rounds: Sequence[Row]) -> Plot | None:
    """What became of every prompt of a round: a pair, or the reason why not."""
    rows = [row for row in rounds if row["pairs"] is not None]
    if not rows:
        return None
    found = {reason for row in rows for reason in row["pairs_dropped"]}
    kinds = ["pair", *(reason for reason in REASONS if reason in found), *sorted(found - set(REASONS))]
    figure, axes = _figure(height=1.5 + 0.4 * len(rows))
    labels, left = [f"round {row['round']}" for row in rows], [0] * len(rows)
    for kind, colour in zip(kinds, _colours(len(kinds)), strict=True):
        counts = [row["pairs"] if kind == "pair" else row["pairs_dropped"].get(kind, 0) for row in rows]
        axes.barh(labels, counts, 0.6, left=left, color=colour, label=kind.replace("_", " "))
        left = [a + b for a, b in zip(left, counts, strict=True)]
    axes.invert_yaxis()  # the first round at the top
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="prompts")
    _legend(figure, axes, len(kinds))
    alt = "; ".join(f"round {r['round']}: {r['pairs']} pairs, {reasons(r['pairs_dropped'])} without" for r in rows)
    return _plot("pairs", "What became of the prompts", f"Prompts of each round. {alt}.", figure)


def dpo_curves(curves: Curves) -> Plot | None:
    """Loss, reward margin and reward accuracy over the steps, a line per model that came out."""
    return _curves("dpo", "DPO training", DPO_PANELS, curves)


def sft_curves(curves: Curves) -> Plot | None:
    """Loss of supervised fine-tuning over the steps."""
    return _curves("sft", "Supervised fine-tuning", {"loss": "loss"}, curves)


# ---- shared -----------------------------------------------------------------------------------------------------------


def _curves(name: str, title: str, panels: Mapping[str, str], curves: Curves) -> Plot | None:
    panels = {
        key: label for key, label in panels.items() if any(key in row for rows in curves.values() for row in rows)
    }
    if not panels:
        return None
    figure = _empty_figure(HEIGHT if len(panels) == 1 else 0.6 + 1.7 * len(panels))
    for axes, (key, label) in zip(
        figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        for (model, rows), colour in zip(curves.items(), _colours(len(curves)), strict=True):
            points = [(row["step"], row[key]) for row in rows if key in row]
            steps, values = [step for step, _ in points], [value for _, value in points]
            axes.plot(steps, values, color=colour, label=model, linewidth=1.3, marker="o" if len(points) < 3 else None)
        axes.set_ylabel(label)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes, len(curves))
    alt = "; ".join(_ends(model, rows, panels) for model, rows in curves.items() if rows)
    return _plot(name, title, f"{title} by step. {alt}.", figure)


def _ends(model: str, rows: Sequence[Row], panels: Mapping[str, str]) -> str:
    first, last = rows[0], rows[-1]
    ends = [
        f"{label} {first[key]:.3f} to {last[key]:.3f}" for key, label in panels.items() if key in first and key in last
    ]
    return f"{model}, {len(rows)} steps: {', '.join(ends)}"


def _over_models(axes: Axes, models: Sequence[Row], key: str, label: str, colour: str, style: str = "-") -> None:
    """A point per model. The line leaves out the SFT baseline, from which no later model comes."""
    points = [(place, row) for place, row in enumerate(models) if row.get(key) is not None]
    line = [(place, row[key]) for place, row in points if row["name"] != "SFT"]
    axes.plot([place for place, _ in line], [value for _, value in line], style, color=colour, linewidth=1.3)
    errors = [_error(row, key) for _, row in points]
    axes.errorbar(
        [place for place, _ in points],
        [row[key] for _, row in points],
        yerr=list(zip(*errors, strict=True)) if any(map(any, errors)) else None,
        fmt="o",
        markersize=4,
        capsize=3,
        color=colour,
        label=label,
    )


def _error(row: Row, key: str) -> tuple[float, float]:
    """Below and above a figure: its standard error, or how far its interval goes."""
    if between := row.get(f"{key}_interval"):
        return max(0.0, row[key] - between[0]), max(0.0, between[1] - row[key])
    error = row.get(f"{key}_se") or 0.0
    return error, error


def _name_models(axes: Axes, models: Sequence[Row], ylabel: str, legend: bool) -> None:
    many = len(models) > 8
    axes.set_xticks(range(len(models)), [row["name"] for row in models], rotation=90 if many else 0)
    axes.set_ylabel(ylabel)
    axes.margins(x=0.08, y=0.12)
    if legend:
        figure = axes.get_figure(root=True)
        assert figure is not None
        _legend(figure, axes, 3)


def _by_model(models: Sequence[Row], key: str, spec: str) -> str:
    return ", ".join(f"{row['name']} {format(row[key], spec)}" for row in models if row.get(key) is not None)


def _colours(count: int) -> Sequence[str | tuple[float, ...]]:
    """Distinct colours; beyond six a gradient, whose order still tells earlier from later."""
    if count <= len(COLOURS):
        return COLOURS[:count]
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.85 * place / (count - 1)) for place in range(count)]


def _empty_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = _empty_figure(height)
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes, entries: int) -> None:
    """Above the axes, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(entries, 3))


def _plot(name: str, title: str, alt: str, figure: Figure) -> Plot:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # whatever backend the environment asks for
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # by default matplotlib's version
    return Plot(name, title, alt, buffer.getvalue())
