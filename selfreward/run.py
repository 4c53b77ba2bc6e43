"""`python -m selfreward.run [ACTION] [--recipe NAME_OR_FILE] [--out DIR] [key.sub=value ...]`: the whole loop.

M0 -> SFT -> M1 -> [prompts -> candidates -> judgements -> pairs -> DPO] per round -> M2, M3, ... -> report.
Exit codes: 0 done, 2 a mistake in what was given, 3 a gate stopped the run and says what to do next, 130 or 143 it was
interrupted (Ctrl-C, SIGTERM). The same command on the same directory goes on where a run stopped, whatever stopped it.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # first: the imports below take a second, in which Ctrl-C would print a traceback

    def _leave(number: int, frame: object) -> None:
        os.write(2, b"stopped by SIGINT; the same command goes on with what was saved\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, _leave)

import argparse
import json
import shlex
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event
from typing import Any

from engine import InputError, NotBuiltError
from selfreward import eval_command, evaluation, stages, training
from selfreward.actions import ACTIONS, NOT_BUILT, SINGLE, described, stages_of
from selfreward.changes import with_changes
from selfreward.context import SPENT, GateError, Reached, Row, Run, Stopped
from selfreward.formats import read_jsonl
from selfreward.health import model_warnings
from selfreward.inputs import load_templates, load_tokenizer
from selfreward.opening import opened
from selfreward.recipe import Recipe
from selfreward.recipe_file import recipe_names
from selfreward.report import Reporter, print_report
from selfreward.report_html import write_report
from selfreward.state import STAGES, RunDir, read_json, written_manifest
from selfreward.validate import show, validate

RECIPE = "tiny"  # the default
MEASURED = "evaluation/metrics.jsonl"  # a row per model, the last file of a finished loop
HELP = """\
actions:
{actions}

shipped recipes: {recipes} (a .yaml file of your own: begin with a copy of llama2-7b)

keys that are often set (all of them, with their defaults: selfreward/recipe*.py):
    seed, rounds, threads, device
    model                      a Llama 2 directory; m1 to begin with one that is already trained
    data.ift, data.eft         instructions with answers; ranked answers
    data.ranked                one file of ranked answers for both, and for measuring the judge
    prompts.count              new prompts a round; prompts.file with prompts.mode=file
    prompt_model               the directory of a model that writes them; M1 does if there is none
    candidates.n               answers a prompt
    judge.template             a shipped template or a .jinja file
    sft.lr, dpo.lr, dpo.beta
    lora.rank                  adapters of this rank are trained instead of all weights
    sampler.kv_cache_gb        memory of the sampler's cache; sampler.dtype: bfloat16, half of it
    gates.min_pairs            below it a round is not trained

example: python -m selfreward.run --out runs/other seed=1 prompts.count=400
The same command on the same directory goes on where it stopped.
"""
MEMORY_KEYS = (
    "sampler.kv_cache_gb or sampler.max_batch_tokens (sampling; then resume), set sft.activation_checkpointing and "
    "dpo.activation_checkpointing to full (training; then resume), or lower sft.max_pack_tokens or "
    "dpo.max_pack_tokens (training; in a new directory: they decide the last bits)"
)


def loop(run: Run) -> list[Row]:
    """The loop on one screen. Returns a row per model."""
    rounds = run.recipe.rounds
    if run.recipe.init is not None:
        stage(run, "m0/model", stages.make_base)
    if run.recipe.m1 is None:
        stage(run, "sft/model", training.train_baseline)
        stage(run, "eft", stages.build_eft)
        stage(run, "m1/model", training.train_m1)
    for k in range(1, rounds + 1):
        stage(run, f"iter_{k}/prompts", stages.new_prompts, k)
        stage(run, f"iter_{k}/candidates", stages.sample_candidates, k)
        stage(run, f"iter_{k}/judgements", stages.judge_round, k)
        stage(run, f"iter_{k}/pairs", stages.build_pairs, k)
        stages.say_what_is_odd(run, k)
        stage(run, f"iter_{k}/model", training.train_round, k)
    models = [("M1", run.model(1), "m1/model")]
    if run.recipe.m1 is None:
        models = [("M0", run.base, "m0/model"), ("SFT", run.dir.file("sft/model"), "sft/model"), *models]
    models += [(f"M{k + 1}", run.model(k + 1), f"iter_{k}/model") for k in range(1, rounds + 1)]
    rows = []
    for name, path, made_by in models:
        row = stage(run, f"evaluation/{name}", evaluation.evaluate_model, name, path)
        pairs = run.dir.counts(made_by).get("pairs") if made_by.startswith("iter_") else None
        rows.append(row | {"pairs": pairs, "stage": made_by})
    matches = list[Row]()
    if run.recipe.data.heldout is not None and run.recipe.evaluation.head_to_head is not None:
        stage(run, "evaluation/head_to_head", evaluation.compare_models, {name: path for name, path, _ in models})
        matches = run.rows("evaluation/head_to_head.jsonl")
    rows = with_changes(run, rows, matches)
    for sentence in model_warnings(rows, run.recipe.dump()):
        run.report.warn(sentence)
    run.dir.write_jsonl(MEASURED, rows)
    return rows


def stage(run: Run, name: str, fn: Callable[..., Row], *args: Any) -> Row:
    """Run one stage unless it is finished; its counts and its time are recorded."""
    if run.dir.done(name):
        _check_written(run.dir, name)
        run.report.say(f"{name}: finished before")
        return run.dir.counts(name)
    run.check_stop()
    run.report.say(f"{name} ...")
    started, before = time.perf_counter(), run.spent()
    try:
        counts = fn(run, *args)
    except BaseException:
        with suppress(InputError):  # a full disk, say: what stopped the stage matters more
            _append_time(run, name, started, before)
        raise
    seconds = _append_time(run, name, started, before)
    run.dir.mark_done(name, counts, [file for file in stages.written(name, counts) if run.dir.file(file).is_file()])
    run.report.say(f"{name}: {seconds:.1f} s  {_short(counts)}")
    if name == run.until:
        raise Reached
    return run.dir.counts(name)


def _append_time(run: Run, name: str, started: float, before: Counter[str]) -> float:
    """The seconds since then, and what the sampler did in them; what an interrupted stage took is added to what it takes
    when it goes on."""
    seconds, sampled = time.perf_counter() - started, run.spent() - before
    row: Row = {"stage": name, "seconds": round(seconds, 3)}
    if sampled:
        row["sampler"] = {key: round(sampled[key], 3) for key in SPENT}
    run.dir.append_timing(row)
    return seconds


def _check_written(directory: RunDir, name: str, models: bool = True) -> None:
    """A finished stage's files must be as it left them: what follows was made of them, or will be. A report needs no
    models."""
    again = f"{name!r} from {directory.file(STAGES)}, and the run's command makes it again"
    for file in stages.written(name, directory.counts(name)):
        if not directory.file(file).exists() and (models or file.endswith(".jsonl")):
            raise InputError(
                f"{directory.file(file)} is missing; the finished stage {name!r} wrote it: restore it, or remove {again}"
            )
    for path in directory.changed(name):
        raise InputError(
            f"{path} was changed after the finished stage {name!r} had written it: restore it, or remove it and {again}"
        )


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    evaluating = words[:1] == ["eval"]
    arguments = (eval_command.parser() if evaluating else _parser()).parse_intermixed_args(words[evaluating:])
    report = Reporter(quiet=arguments.quiet or arguments.json, as_json=arguments.json)
    with stop_on_signals() as stop:
        try:
            if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
                raise NotBuiltError("WORLD_SIZE is above 1; distributed runs are not built yet: start one process")
            if evaluating:
                eval_command.evaluate(arguments, report, stop)
                return 0
            action, overrides = _action(arguments.words)
            if action == "eval":
                raise InputError("'eval' has options of its own, so it stands first: python -m selfreward.run eval ...")
            if action in NOT_BUILT:
                raise NotBuiltError(
                    f"the action {action!r} is not built yet ({NOT_BUILT[action]}); without an action the whole loop runs"
                )
            if action == "report":
                _report(arguments, report)
                return 0
            recipe = Recipe.load(arguments.recipe or RECIPE, overrides)
            if action == "validate":
                return _validate(recipe, report)
            if action in SINGLE:
                _one_stage(recipe, arguments, action, report, stop)
            else:
                _run(recipe, arguments.out, report, stop)
        except Stopped:
            name = signal.Signals(stop.signal).name
            print(f"stopped by {name}; what was finished is saved: the same command goes on there", file=sys.stderr)
            return 128 + stop.signal
        except GateError as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 3
        except (InputError, OSError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            print(f"error: out of memory; lower {MEMORY_KEYS} ({str(error).splitlines()[0]})", file=sys.stderr)
            return 2
    return 0


class StopEvent(Event):
    """Set by a signal, whose number it keeps."""

    signal = 0


@contextmanager
def stop_on_signals() -> Iterator[StopEvent]:
    """Ctrl-C and SIGTERM set the event; a second one acts at once, as it would have without this."""
    stop = StopEvent()
    before: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        stop.signal = number
        stop.set()
        signal.signal(number, before[number])
        print("stopping after this group or step; once more stops at once", file=sys.stderr)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _validate(recipe: Recipe, report: Reporter) -> int:
    """Print what the data files hold. 2 if a run could not use them."""
    found = validate(recipe, load_tokenizer(recipe), load_templates(recipe).judge)
    print(json.dumps(found, ensure_ascii=False) if report.as_json else show(found))
    return 0 if found["usable"] else 2


def _run(recipe: Recipe, out: str, report: Reporter, stop: Event) -> None:
    with opened(recipe, out, report, stop) as run:
        _say_report(run.dir, write_report(run.dir, loop(run)), report)


def _one_stage(recipe: Recipe, arguments: argparse.Namespace, action: str, report: Reporter, stop: Event) -> None:
    """The loop up to and with the first unfinished stage of this kind; says which command comes next."""
    order = stages_of(recipe)
    wanted = [stage for name, stage in order if name == action]
    if not wanted:
        raise InputError(f"a run with m1 has no stage {action!r}: its first model is given; begin with 'prompts'")
    with opened(recipe, arguments.out, report, stop) as run:
        run.until = next((stage for stage in wanted if not run.dir.done(stage)), None)
        if run.until is not None:
            with suppress(Reached):
                loop(run)
        left = [name for name, stage in order if not run.dir.done(stage)]
        options = ["--recipe", arguments.recipe or RECIPE, "--out", arguments.out]
        overrides = _action(arguments.words)[1]
        following = shlex.join(["python", "-m", "selfreward.run", (left or ["run"])[0], *options, *overrides])
        counts = None if run.until is None else run.dir.counts(run.until)
        if report.as_json:
            print(json.dumps({"stage": run.until, "counts": counts, "next": following}, ensure_ascii=False))
        else:
            done = f"{run.until} is finished" if run.until else f"every stage {action!r} was finished before"
            print(f"{done}; next: {following}")


def _report(arguments: argparse.Namespace, report: Reporter) -> None:
    """Write the report of a run once more, from its files: of one that is not finished, too."""
    given = [word for word in arguments.words if word != "report"]
    given += [] if arguments.recipe is None else ["--recipe"]
    if given:
        raise InputError(f"report reads the run in --out and has no settings; leave {given[0]!r} out")
    manifest = written_manifest(arguments.out)
    if "training_threads" not in manifest:  # eval's directories have none
        raise InputError(f"{arguments.out} holds no run; give the directory of one as --out")
    with RunDir(arguments.out, manifest) as directory:
        for name in directory.finished():
            _check_written(directory, name, models=False)
        measured, before = directory.file(MEASURED), directory.file("report.json")
        if measured.is_file():
            models, stopped = read_jsonl(measured), None
        else:
            last = read_json(before) if before.is_file() else {}
            models, stopped = [], "the run is not finished: its command, given again, goes on"
            if last.get("stages") == directory.finished():  # nothing was done since, so what stopped it still does
                stopped = last.get("stopped") or stopped
        _say_report(directory, write_report(directory, models, stopped), report)


def _say_report(directory: RunDir, written: Row, report: Reporter) -> None:
    print_report(written, report.as_json)
    if not report.as_json:
        print(f"report: {directory.file('report.html')}", file=sys.stderr)


def _action(words: list[str]) -> tuple[str, list[str]]:
    """The action, the one word without "=" (default: the whole loop), and the overrides."""
    actions = [word for word in words if "=" not in word]
    for word in actions:
        if word not in ACTIONS and word not in NOT_BUILT:
            raise InputError(f"{word!r} is neither an action ({', '.join(ACTIONS)}) nor key.sub=value")
    if len(actions) > 1:
        raise InputError(f"there are {len(actions)} actions ({', '.join(actions)}); give one")
    return (actions or ["run"])[0], [word for word in words if "=" in word]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m selfreward.run",
        description="The whole loop of self-rewarding: SFT, then rounds of prompts, answers, judgements, pairs and DPO.",
        epilog=HELP.format(actions=described(), recipes=", ".join(recipe_names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar="ACTION | key.sub=value", help="one action at most, any number of keys"
    )
    parser.add_argument("--recipe", metavar="NAME_OR_FILE", help=f"shipped recipe or YAML file ({RECIPE})")
    parser.add_argument("--out", default="runs/tiny", metavar="DIR", help="directory of the run, resumed if it is one")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object (the report; of a single stage its counts) and nothing else",
    )
    return parser


def _short(counts: Row) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in counts.items()
        if value is not None and not name.endswith("_interval")
    )


if __name__ == "__main__":
    sys.exit(main())
