"""Does the loop climb, and is it the judge that makes it? Seeds x controls of the tiny recipe, and the tables of docs/tiny.md:

    python -m selfreward.tiny.study --out runs/study --write docs/tiny.md

Every run is `python -m selfreward.run` with overrides and one thread, two side by side. A run is a directory of its own,
so the study can be stopped at any moment and goes on with what is missing.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np
from pydantic import BaseModel

from engine import InputError
from selfreward.formats import read_jsonl
from selfreward.judging import draw_score
from selfreward.metrics import mean_and_error
from selfreward.opening import deciding
from selfreward.recipe import Recipe
from selfreward.tiny import DATA, matches
from selfreward.tiny.oracle import checks

Row = dict[str, Any]
Runs = dict[str, dict[int, Path]]  # variant -> seed -> directory of the finished run
REPLAY_WEIGHT = 1.0
RESAMPLES = 10_000
CHECKS = ("relevant", "substantial", "right size", "clean", "exactly right")
FIGURES = {"true_quality": "true quality, 0 to 5", "judge_pairwise": "judge pairwise accuracy"}
BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"


@dataclass(frozen=True)
class Variant:
    """A control: its overrides for a seed, given the directory of that seed's self-rewarding run."""

    name: str
    meaning: str
    seeds: int
    overrides: Callable[[Path], list[str]]


VARIANTS = (
    Variant("self", "the recipe: each model judges its own answers", 10, lambda base: []),
    Variant("replay", "the same, with judge data beside DPO", 10, lambda base: [f"dpo.replay_weight={REPLAY_WEIGHT}"]),
    Variant("expected", "the recipe, with expected scores", 10, lambda base: ["judge.score=expected"]),
    Variant("random", "scores drawn at random", 3, lambda base: [*_from(base / "m1/model"), "judge.by=random"]),
    Variant("oracle", "the truth as judge (the bound)", 3, lambda base: [*_from(base / "m1/model"), "judge.by=oracle"]),
    Variant(
        "fixed",
        "M1 judges in both rounds",
        3,
        lambda base: [*_from(base / "m1/model"), f"judge_model={base / 'm1/model'}"],
    ),
    Variant("no EFT", "the SFT baseline is M1: never taught to judge", 3, lambda base: _from(base / "sft/model")),
    Variant("positives", "no DPO: SFT again with the perfectly scored answers", 3, lambda base: ["method=positives"]),
)


def _from(model: Path) -> list[str]:
    """Begin the rounds with a model that the seed's own run has made."""
    return ["model=null", f"m1={model}"]


# ---- running ----------------------------------------------------------------------------------------------------------


def run_all(out: Path, seeds: int, more: Sequence[str], workers: int) -> None:
    """All missing runs: first the seeds themselves, then the controls, which begin with their models."""
    first, *rest = [[(variant, seed) for seed in range(min(seeds, variant.seeds))] for variant in VARIANTS]
    for jobs in (first, [job for group in rest for job in group]):
        with ThreadPoolExecutor(workers) as pool:
            for line in pool.map(lambda job: _run(out, job[0], job[1], more), jobs):
                print(line, flush=True)


def _run(out: Path, variant: Variant, seed: int, more: Sequence[str]) -> str:
    path = directory(out, variant, seed)
    overrides = [f"seed={seed}", "threads=1", *variant.overrides(directory(out, VARIANTS[0], seed)), *more]
    if finished(path):
        _check_recipe(path, overrides)
        return f"{path.name}: finished before"
    started = time.perf_counter()
    command = [sys.executable, "-m", "selfreward.run", "--recipe", "tiny", "--quiet", "--out", str(path), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{path.name} ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return f"{path.name}: {time.perf_counter() - started:.0f} s"


def finished(path: Path) -> bool:
    """Whether the run in `path` came to its end: a gate leaves a report too, without models."""
    return (path / "report.json").is_file() and "M3" in models(path)


def _check_recipe(path: Path, overrides: list[str]) -> None:
    """A finished run is used again only if it is the one that would be made now."""
    there = json.loads((path / "manifest.json").read_text())["recipe"]
    here = deciding(Recipe.load("tiny", overrides))
    for key, value in here.items():
        if not _same(there, key, value, Recipe):
            raise InputError(f"{path} holds a run with another {key!r}; give a new --out, or remove it")


def _same(there: Row, key: str, here: Any, group: type[BaseModel]) -> bool:
    """Whether the value here stands there too, where a key may be missing that is new since and has its default (and there
    may be more keys)."""
    field = group.model_fields[key]
    if isinstance(here, dict) and isinstance(there.get(key, {}), dict):
        kind = next(k for k in (field.annotation, *get_args(field.annotation)) if hasattr(k, "model_fields"))
        return all(_same(there.get(key, {}), name, value, kind) for name, value in here.items())
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    return bool(there.get(key, list(default) if isinstance(default, tuple) else default) == here)


def directory(out: Path, variant: Variant, seed: int) -> Path:
    return out.absolute() / f"{variant.name.replace(' ', '-')}-{seed}"


# ---- figures ----------------------------------------------------------------------------------------------------------


def read(out: Path, seeds: int) -> Runs:
    """The finished runs of every variant, by seed."""
    return {
        v.name: {seed: path for seed in range(min(seeds, v.seeds)) if finished(path := directory(out, v, seed))}
        for v in VARIANTS
    }


def models(path: Path) -> dict[str, Row]:
    return {row["name"]: row for row in json.loads((path / "report.json").read_text())["models"]}


def grades(path: Path, model: str) -> np.ndarray:
    """The oracle's grade of every held-out answer at the recipe's temperature [instructions]."""
    rows = read_jsonl(path / f"evaluation/{model}/answers.jsonl")
    return np.array([row["grade"] for row in rows], dtype=np.float64)


def bootstrap(differences: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Standard error of the mean and its 95% interval, by resampling instructions. differences [instructions]."""
    picks = np.random.default_rng(seed).integers(0, len(differences), (RESAMPLES, len(differences)))
    means = differences[picks].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(means.std(ddof=1)), float(low), float(high)


def gain(path: Path) -> np.ndarray:
    """M3 - M1 on every held-out instruction."""
    return grades(path, "M3") - grades(path, "M1")


# ---- tables -----------------------------------------------------------------------------------------------------------


def tables(runs: Runs) -> str:
    """Everything that stands between the two marks of docs/tiny.md."""
    parts = (
        _seed_table(runs["self"]),
        _control_table(runs),
        _random_line(runs),
        _tie_table(runs),
        _judge_table(runs),
        _check_table(runs),
        _match_table(runs["self"]),
    )
    return "\n\n".join(filter(None, parts))


def _seed_table(paths: dict[int, Path]) -> str:
    rows = []
    for seed, path in paths.items():
        row, g = models(path), {name: grades(path, name) for name in ("M1", "M2", "M3")}
        error = bootstrap(g["M2"] - g["M1"])[0]
        step = float((g["M2"] - g["M1"]).mean())
        quality = [f"{row[name]['true_quality']:.2f}" for name in ("M0", "SFT", "M1", "M2", "M3")]
        greedy = [f"{row[name]['true_quality_greedy']:.2f}" for name in ("M1", "M2", "M3")]
        last = float((g["M3"] - g["M2"]).mean())
        rows.append([str(seed), *quality, f"{step:+.2f} ({step / error:.1f} se)", f"{last:+.2f}", *greedy])
    heading = ["seed", "M0", "SFT", "M1", "M2", "M3", "M2 - M1", "M3 - M2", "M1 greedy", "M2 greedy", "M3 greedy"]
    return _table(heading, rows)


def _control_table(runs: Runs) -> str:
    """The variants, and the recipe once more on the seeds that the controls have: those rows may be compared."""
    controls = {seed: path for seed, path in runs["self"].items() if seed in runs["random"]}
    lines = [(v.name, v.meaning, runs[v.name]) for v in VARIANTS]
    lines.insert(3, ("self", "the recipe on the controls' seeds", controls))
    rows = []
    for name, meaning, by_seed in lines:
        paths = list(by_seed.values())
        if paths:
            means = [_mean(paths, model, "true_quality") for model in ("M1", "M2", "M3")]
            rows.append(
                [
                    name,
                    meaning,
                    str(len(paths)),
                    *[f"{m:.2f}" for m in means],
                    f"{means[2] - means[0]:+.2f}",
                ]
            )
    return _table(["judge", "what it is", "seeds", "M1", "M2", "M3", "M3 - M1"], rows)


def _random_line(runs: Runs) -> str:
    """How much of the gain a judge gets that has read nothing, on the same seeds."""
    pairs = [(path, runs["self"][seed]) for seed, path in runs["random"].items() if seed in runs["self"]]
    if not pairs:
        return ""
    random = np.mean([gain(path) for path, _ in pairs], axis=0)
    own = np.mean([gain(path) for _, path in pairs], axis=0)
    _, low, high = bootstrap(random)
    return (
        f"The random judge's gain M3 - M1 over {len(pairs)} seeds is {random.mean():+.3f} (95% interval {low:+.3f} to "
        f"{high:+.3f}), {random.mean() / own.mean():.0%} of the {own.mean():+.3f} of the model's own judge on the same seeds."
    )


def _tie_table(runs: Runs) -> str:
    """Per round, of all prompts: how many gave a pair, why the others gave none, and where the index chose an end of the
    pair, because another answer had the same score."""
    rows = []
    for name in ("self", "expected"):
        for k in (1, 2):
            found = [tie_figures(path, k) for path in runs[name].values() if (path / f"iter_{k}/pairs.jsonl").is_file()]
            if found:
                shares = np.mean([list(figures.values()) for figures in found], axis=0)
                rows.append([name, str(k), str(len(found)), *(f"{share:.1%}" for share in shares)])
    heading = ["judge", "round", "seeds", "pairs per prompt", "all equal", "one text only", "another reason"]
    return _table([*heading, "best not alone", "worst not alone"], rows) if rows else ""


def tie_figures(path: Path, k: int) -> dict[str, float]:
    """Shares of the prompts of a round. Answers with one text are one answer here, as they are for a pair."""
    files = path / f"iter_{k}"
    drawn: dict[str, list[float]] = {}
    for row in read_jsonl(files / "judgements.jsonl"):
        drawn.setdefault(row["candidate_id"], []).extend([score] if (score := draw_score(row)) is not None else [])
    scores: dict[str, dict[str, list[float]]] = {}  # prompt -> text -> the means of its draws
    for row in read_jsonl(files / "candidates.jsonl"):
        if drawn[row["id"]]:
            scores.setdefault(row["prompt_id"], {}).setdefault(row["text"], []).append(fmean(drawn[row["id"]]))
    pairs, dropped = read_jsonl(files / "pairs.jsonl"), read_jsonl(files / "dropped.jsonl")
    reasons = [row["reason"] for row in dropped]
    alike = {"score_chosen": 0, "score_rejected": 0}
    for pair in pairs:
        means = [fmean(each) for each in scores[pair["prompt_id"]].values()]
        for end in alike:
            alike[end] += sum(abs(mean - pair[end]) < 1e-9 for mean in means) > 1
    counts = {"pairs": len(pairs), "tie": reasons.count("tie"), "duplicate": reasons.count("duplicate")}
    counts["other"] = len(reasons) - counts["tie"] - counts["duplicate"]
    return {name: count / (len(pairs) + len(dropped)) for name, count in (counts | alike).items()}


def _judge_table(runs: Runs) -> str:
    """Pairwise accuracy by model (ties half in brackets), and the change from M1 to M3 with its error over the seeds."""
    rows = []
    for variant in VARIANTS:
        paths = list(runs[variant.name].values())
        if paths:
            cells = [
                f"{_mean(paths, m, 'judge_pairwise'):.3f} ({_mean(paths, m, 'judge_pairwise_ties_half'):.3f})"
                if m in models(paths[0])
                else ""
                for m in ("SFT", "M1", "M2", "M3")
            ]
            changes = [models(path)["M3"]["judge_pairwise"] - models(path)["M1"]["judge_pairwise"] for path in paths]
            change, error = mean_and_error(changes)
            shown = f"{change:+.3f}" + (f" +- {error:.3f}" if error is not None else "")
            rows.append([variant.name, str(len(paths)), *cells, shown, f"{_mean(paths, 'M1', 'longer_wins'):.3f}"])
    return _table(["judge", "seeds", "SFT", "M1", "M2", "M3", "M3 - M1", "longer wins"], rows)


def _check_table(runs: Runs) -> str:
    """How often a judge says yes to a check that holds, and to one that does not, averaged over the seeds."""
    rows = []
    for name in ("self", "replay", "oracle", "random"):
        for model in ("SFT", "M1", "M2", "M3"):
            paths = [path for path in runs[name].values() if model in models(path)]
            if paths and (model != "SFT" or name == "self"):
                says = np.mean([says_yes(path, model) for path in paths], axis=0)  # [2, checks]
                rows.append([name, model, *(f"{yes:.2f} / {no:.2f}" for yes, no in zip(says[1], says[0], strict=True))])
    return _table(["judge", "model", *CHECKS], rows)


def says_yes(path: Path, model: str) -> np.ndarray:
    """Share of yes in the held-out judgements, by whether the check holds and by check: [2, checks]."""
    answers = {
        f"{group['id']}-{number}": checks(group["prompt"], answer["text"])
        for group in read_jsonl(DATA / "eft_heldout.jsonl")
        for number, answer in enumerate(group["answers"])
    }
    yes, total = np.zeros((2, len(CHECKS))), np.zeros((2, len(CHECKS)))
    for row in read_jsonl(path / f"evaluation/{model}/judgements.jsonl"):
        words = row["text"].split()[: len(CHECKS)]
        if row["status"] == "ok" and len(words) == len(CHECKS):
            for check, (word, holds) in enumerate(zip(words, answers[row["candidate_id"]], strict=True)):
                total[int(holds), check] += 1
                yes[int(holds), check] += word == "yes"
    return yes / np.maximum(total, 1)


def _mean(paths: Iterable[Path], model: str, figure: str) -> float:
    return float(np.mean([models(path)[model][figure] for path in paths]))


def _match_table(paths: dict[int, Path]) -> str:
    """The recipe's models head to head, in the runs that did so."""
    compared = [path for path in paths.values() if (path / "evaluation/head_to_head.jsonl").is_file()]
    return _table(matches.HEADING, matches.table_rows(compared)) if compared else ""


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join([line(heading), line(["---"] * len(heading)), *map(line, rows)])


def plot(runs: Runs) -> bytes:
    """True quality and judge accuracy over the models, a line per variant, as a PNG that is the same in equal studies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    names = ["M1", "M2", "M3"]
    for axes, (key, label) in zip(figure.subplots(1, 2), FIGURES.items(), strict=True):
        for number, variant in enumerate(VARIANTS):
            paths = list(runs[variant.name].values())
            if paths:
                values = [_mean(paths, name, key) for name in names]
                axes.plot(names, values, marker="o", markersize=4, color=f"C{number}", label=variant.name)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def insert(document: str, text: str) -> str:
    """`document` with what stands between the study's two marks replaced."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise InputError(f"the document needs the marks {BEGIN} and {END}, once each")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="seeds x controls of the tiny recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for every run")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, default=10, help="at most so many seeds of each variant")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument(
        "--write", type=Path, help="a document with the two marks, whose tables are replaced; the plot goes beside it"
    )
    options = parser.parse_args(arguments)
    try:
        run_all(options.out, options.seeds, options.overrides, options.workers)
        runs = read(options.out, options.seeds)
        text = tables(runs)
        print(text)
        if options.write:
            options.write.write_text(insert(options.write.read_text(encoding="utf-8"), text), encoding="utf-8")
            options.write.with_suffix(".png").write_bytes(plot(runs))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the running children have it too, and end after their group
        print("stopped; the same command goes on with what is missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
