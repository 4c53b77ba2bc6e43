"""`python -m selfreward.run [ACTION] [--recipe NAME_OR_FILE] [--out DIR] [key.sub=value ...]`: the whole loop.

M0 -> SFT -> M1 -> [prompts -> candidates -> judgements -> pairs -> DPO] per round -> M2, M3, ... -> report.
Exit codes: 0 done, 2 a mistake in what was given, 3 a gate stopped the run and says what to do next.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from engine import InputError, NotBuiltError, Tokenizer, content_hash
from selfreward import stages
from selfreward.formats import read_jsonl
from selfreward.judge import JudgeTemplate
from selfreward.recipe import Recipe
from selfreward.report import Reporter, build_report, print_report
from selfreward.stages import GateError, Row, Run
from selfreward.state import RunDir

ACTIONS = ("run", "plan", "validate", "sft", "eft", "prompts", "sample", "judge", "pairs", "dpo", "eval", "report")
BUILT = ("run",)


def loop(run: Run) -> list[Row]:
    """The loop on one screen. Returns a row per model."""
    rounds = run.recipe.rounds
    if run.recipe.init is not None:
        stage(run, "m0/model", stages.make_base)
    stage(run, "sft/model", stages.train_baseline)
    stage(run, "eft", stages.build_eft)
    stage(run, "m1/model", stages.train_m1)
    for k in range(1, rounds + 1):
        stage(run, f"iter_{k}/prompts", stages.new_prompts, k)
        stage(run, f"iter_{k}/candidates", stages.sample_candidates, k)
        stage(run, f"iter_{k}/judgements", stages.judge_candidates, k)
        stage(run, f"iter_{k}/pairs", stages.build_pairs, k)
        stage(run, f"iter_{k}/model", stages.train_dpo, k)
    models = [("M0", run.base, "m0/model"), ("SFT", run.dir.file("sft/model"), "sft/model")]
    models += [("M1", run.model(1), "m1/model")]
    models += [(f"M{k + 1}", run.model(k + 1), f"iter_{k}/model") for k in range(1, rounds + 1)]
    rows = []
    for name, path, made_by in models:
        row = stage(run, f"evaluation/{name}", stages.evaluate_model, name, path)
        pairs = run.dir.counts(made_by).get("pairs") if name != "M0" else None
        rows.append(row | {"pairs": pairs, "stage": made_by})
    return rows


def stage(run: Run, name: str, fn: Callable[..., Row], *args: Any) -> Row:
    """Run one stage unless it is finished; its counts and its time are recorded."""
    if run.dir.done(name):
        run.report.say(f"{name}: finished before")
        return run.dir.counts(name)
    run.report.say(f"{name} ...")
    started = time.perf_counter()
    counts = fn(run, *args)
    seconds = time.perf_counter() - started
    run.dir.append_timing({"stage": name, "seconds": round(seconds, 3)})
    run.dir.mark_done(name, counts)
    run.report.say(f"{name}: {seconds:.1f} s  {_short(counts)}")
    return run.dir.counts(name)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    report = Reporter(quiet=arguments.quiet or arguments.json, as_json=arguments.json)
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise NotBuiltError("WORLD_SIZE is above 1; distributed runs are not built yet: start one process")
        action, overrides = _action(arguments.words)
        if action not in BUILT:
            raise NotBuiltError(f"the action {action!r} is not built yet; without an action the whole loop runs")
        _run(Recipe.load(arguments.recipe, overrides), arguments.out, report)
    except GateError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    except (InputError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on at the stage that was not finished", file=sys.stderr)
        return 130
    return 0


def _run(recipe: Recipe, out: str, report: Reporter) -> None:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    tokenizer = Tokenizer(recipe.tokenizer or recipe.model or "")
    template = JudgeTemplate(recipe.judge.template)
    manifest = {
        "recipe": recipe.dump(),
        "inputs": {key: stages.file_hash(path) for key, path in recipe.paths().items() if path.is_file()},
        "model": content_hash(recipe.model) if recipe.model else None,
        "tokenizer": tokenizer.template_hash,
        "judge_template": template.hash,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "training_threads": torch.get_num_threads(),
    }
    with RunDir(out, manifest) as directory:
        report.say(f"{'resuming' if directory.resumed else 'starting'} in {directory.path}")
        run = Run(recipe, directory, tokenizer, template, report)
        models = loop(run)
        timing = read_jsonl(directory.file("timing.jsonl"))
        result = build_report(models, {row: directory.counts(row) for row in _stage_names(timing)}, timing)
        directory.write_json("report.json", result)
        print_report(result, report.as_json)
        report.say(f"report: {directory.file('report.json')}")


def _stage_names(timing: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["stage"] for row in timing))


def _action(words: list[str]) -> tuple[str, list[str]]:
    """The action, the one word without "=" (default: the whole loop), and the overrides."""
    actions = [word for word in words if "=" not in word]
    for word in actions:
        if word not in ACTIONS:
            raise InputError(f"{word!r} is neither an action ({', '.join(ACTIONS)}) nor key.sub=value")
    if len(actions) > 1:
        raise InputError(f"there are {len(actions)} actions ({', '.join(actions)}); give one")
    return (actions or ["run"])[0], [word for word in words if "=" in word]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m selfreward.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", metavar="ACTION | key.sub=value", help=f"actions: {', '.join(BUILT)}")
    parser.add_argument("--recipe", default="tiny", metavar="NAME_OR_FILE", help="shipped recipe or YAML file (tiny)")
    parser.add_argument("--out", default="runs/tiny", metavar="DIR", help="directory of the run, resumed if it is one")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    return parser


def _short(counts: Row) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in counts.items()
    )


if __name__ == "__main__":
    sys.exit(main())
