"""`python -m selfreward.run eval`: one question about finished models, or about a file of somebody's judgements.

    eval --annotations FILE                       what AlpacaEval's annotations.json says
    eval --ranked FILE [models]                   how well models judge a file of ranked answers, beside its longer answers
    eval --ask FILE [models]                      the same prompts answered by all of them, side by side
    eval --compare FILE [models]                  head to head: who answers these prompts better, and by how much
    eval --alpaca FILE [models]                   AlpacaEval's model_outputs.json, one a model
    eval --mt-bench FILE [models]                 FastChat's model_answer/NAME.jsonl, one a model

The models are those of the run in --out, or each --model NAME=DIRECTORY; docs/evaluation.md says what each figure means.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine import InputError
from selfreward import alpaca, head_to_head, mt_bench
from selfreward.context import Row, Run
from selfreward.eval_compare import compare, judge_of
from selfreward.eval_run import Models, answer_all, of_model, opened, part, pins, read_prompts, times
from selfreward.eval_settings import ANSWERING, USED, find_models, settings
from selfreward.evaluation import judge_answers, text_figures
from selfreward.files import stem
from selfreward.formats import Read, as_group, read_file
from selfreward.metrics import FIGURES, judge_change, judge_figures, length_figures
from selfreward.prompts import PROMPT_TOO_LONG
from selfreward.report import LONGER, Reporter, match_table, match_title, number, with_interval
from selfreward.verdict import PairwiseTemplate

OUT = "runs/tiny"
SHOWN_PROMPTS, SHOWN_CHARACTERS = 10, 300  # of the table of `--ask`; the files hold all


def parser() -> ArgumentParser:
    assert __doc__ is not None
    options = ArgumentParser(
        prog="python -m selfreward.run eval",
        description=__doc__.split("\n", 1)[0].split(": ", 1)[1].capitalize(),
        epilog=__doc__.split("\n", 2)[2],
        formatter_class=RawDescriptionHelpFormatter,
    )
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--annotations", metavar="FILE", help="AlpacaEval's annotations.json: win rate and its error")
    what.add_argument("--ranked", metavar="FILE", help="ranked answers, PandaLM's and LLMBar's files among them")
    what.add_argument("--ask", metavar="FILE", help="prompts, to be answered by every model")
    what.add_argument("--compare", metavar="FILE", help="prompts, for the models' answers against one another")
    what.add_argument("--alpaca", metavar="FILE", help="instructions, for model_outputs.json")
    what.add_argument("--mt-bench", metavar="FILE", help="FastChat's question.jsonl, both turns")
    options.add_argument("words", nargs="*", metavar="key.sub=value", help="settings, of those that it uses")
    options.add_argument(
        "--model", action="append", default=[], metavar="NAME=DIR", help="instead of the run's; repeatable"
    )
    options.add_argument("--judge-command", metavar="COMMAND", help="of --compare: JSON lines in, verdicts out")
    options.add_argument(
        "--pairwise", metavar="TEMPLATE", help="of --compare: the judge model compares two answers (llama2, or a file)"
    )
    options.add_argument("--recipe", metavar="NAME_OR_FILE", help="settings, instead of those of the run in --out")
    options.add_argument("--out", metavar="DIR", help=f"directory of a run ({OUT}); what is written goes to DIR/eval")
    options.add_argument("--quiet", action="store_true", help="no progress")
    options.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return options


def evaluate(arguments: Namespace, report: Reporter, stop: Event) -> None:
    """Do what was asked, and print it. Raises what `selfreward.run.main` maps to exit codes."""
    if arguments.judge_command is not None and arguments.compare is None:
        raise InputError("--judge-command judges the answers of --compare; leave it out")
    if arguments.pairwise is not None and (arguments.compare is None or arguments.judge_command is not None):
        raise InputError("--pairwise is how the judge model of --compare is asked, not a --judge-command; leave it out")
    if arguments.annotations is not None:
        _refuse_settings(arguments, "--annotations reads a file and needs no model")
        found = _annotations(Path(arguments.annotations), report)
    elif arguments.ranked is not None and not arguments.model and arguments.out is None:
        _refuse_settings(arguments, "without --out or --model, --ranked only looks at the file")
        found = _ranked(_read_ranked(Path(arguments.ranked)), report, {})
    else:
        found = _with_models(arguments, report, stop)
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False))


def _refuse_settings(arguments: Namespace, why: str) -> None:
    given = [*arguments.words, *arguments.model]
    given += [name for name in (arguments.recipe, arguments.out) if name is not None]
    if given:
        raise InputError(f"{why}; leave {given[0]!r} out")


def _with_models(arguments: Namespace, report: Reporter, stop: Event) -> Row:
    out, job = Path(arguments.out or OUT), next(job for job in JOBS if getattr(arguments, job.option) is not None)
    asked = f"--{job.option.replace('_', '-')}"
    asked += " with --pairwise" if arguments.pairwise is not None else ""
    asked += " with --judge-command" if arguments.judge_command is not None else ""
    recipe = settings(asked, arguments.recipe, out, arguments.words)
    models = find_models(arguments.model, out)
    if arguments.compare is not None and len(models) < 2:
        raise InputError("--compare needs two models or more; add --model NAME=DIRECTORY")
    if arguments.judge_command is not None:
        head_to_head.check_command(arguments.judge_command)
    pairwise = None if arguments.pairwise is None else PairwiseTemplate(arguments.pairwise)
    file = Path(getattr(arguments, job.option))
    rows = job.read(file)
    with opened(job.kind, file, recipe, job.keys, models, out, report, stop, pairwise) as (run, found):
        return job.do(run, found, rows, arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Files alone


def _annotations(file: Path, report: Reporter) -> Row:
    rows = alpaca.read_annotations(file)
    controlled, why_not = alpaca.length_controlled(rows)
    found = alpaca.win_rate(rows) | controlled
    if why_not is not None:
        report.warn(why_not)
    if not report.as_json:
        _print(f"{found['generator']} against {found['baseline']}", ["figure", "value"], _lines(found))
    return found


def _lines(found: Row) -> list[list[str]]:
    names = {
        "win_rate": ("win rate, %", ".2f"),
        "standard_error": ("its standard error", ".2f"),
        "length_controlled_winrate": ("length-controlled win rate, %", ".2f"),
        "lc_standard_error": ("its standard error", ".2f"),
        "discrete_win_rate": ("win rate with whole wins, %", ".2f"),
        "n": ("preferences", "d"),
        "n_wins": ("won", "d"),
        "n_wins_base": ("lost", "d"),
        "n_draws": ("tied", "d"),
        "n_null": ("without a preference, left out", "d"),
        "mean_length": ("characters an answer", ".1f"),
        "mean_length_base": ("and of the baseline's", ".1f"),
    }
    return [[name, number(found[key], spec)] for key, (name, spec) in names.items() if found[key] is not None]


def _read_ranked(file: Path) -> Read:
    """Rows that cannot be used are left out with their reasons: published files have such."""
    read = read_file(file, as_group)
    if not read.rows:
        first = f"; the first, {read.refused[0].where}: {read.refused[0].said}" if read.refused else ""
        raise InputError(f"{file}: none of its {read.total} rows has ranked answers as docs/data.md lists them{first}")
    return read


def _ranked(read: Read, report: Reporter, by_model: Row) -> Row:
    """by_model: name -> figures of the model's judgements."""
    found: Row = {"file": str(read.path), "rows": read.total, "used": len(read.rows), "refused": dict(read.reasons())}
    for reason, count in found["refused"].items():
        first = next(refusal for refusal in read.refused if refusal.reason == reason)
        report.warn(f"{count} of {read.total} rows left out as {reason}, the first {first.where}: {first.said}")
    judges = {LONGER: length_figures(read.rows), **by_model}
    found |= {"longer": judges[LONGER], "models": by_model}
    if not report.as_json:
        length = judges[LONGER]
        title = (
            f"{length['pairs']} pairs of {length['prompts']} prompts, in {length['groups']} of {read.total} rows "
            f"({len(read.rows) - length['groups']} rank all alike)"
        )
        cells = [
            [name.replace("_", " "), *(with_interval(figures, name) for figures in judges.values())] for name in FIGURES
        ]
        changes = [with_interval(figures, "change", "+") for figures in judges.values()]
        cells += [["ties half, from the model before", *changes]] if len(by_model) > 1 else []
        cells.append(["without a readable score", *(number(figures["unread"], ".1%") for figures in judges.values())])
        _print(title, ["figure", *judges], cells)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# With models: (run, models, what was read, arguments) -> what is printed as JSON


def _judge(run: Run, models: Models, read: Read, arguments: Namespace) -> Row:
    figures, before = Row(), None
    for name, model in models.items():
        with part(run, of_model(name), pins(model)):
            scores, drawn = judge_answers(run, model.path, "judgements.jsonl", read.rows)
        figures[name] = judge_figures(read.rows, scores, drawn)
        figures[name] |= judge_change(read.rows, scores, before) if before is not None else {}
        before = scores
    found = _ranked(read, run.report, figures)
    return found | {"judging": {name: _times(run, of_model(name), f"judging by {name}") for name in models}}


def _ask(run: Run, models: Models, prompts: list[Row], arguments: Namespace) -> Row:
    """side_by_side.jsonl: a row per prompt, with every model's answer."""
    answers = answer_all(run, models, prompts)
    rows = [
        {"id": prompt["id"], "prompt": prompt["prompt"], "answers": {name: answers[name][i]["text"] for name in models}}
        for i, prompt in enumerate(prompts)
    ]
    run.dir.write_jsonl("side_by_side.jsonl", rows)
    if not run.report.as_json:
        shown = [[row["prompt"], *row["answers"].values()] for row in rows[:SHOWN_PROMPTS]]
        title = f"{len(shown)} of {len(rows)} prompts; all: {run.dir.file('side_by_side.jsonl')}"
        _print(title, ["prompt", *models], [[_short(cell) for cell in cells] for cells in shown])
    return {"file": str(run.dir.file("side_by_side.jsonl")), "rows": rows} | _written(run, answers)


def _alpaca(run: Run, models: Models, prompts: list[Row], arguments: Namespace) -> Row:
    answers, written = answer_all(run, models, prompts), {}
    for name, rows in answers.items():
        run.dir.write_json(f"model_outputs/{name}.json", alpaca.model_outputs(name, rows, stem(Path(arguments.alpaca))))
        written[name] = str(run.dir.file(f"model_outputs/{name}.json"))
    return {"files": written} | _written(run, answers, written.values())


def _mt_bench(run: Run, models: Models, questions: list[Row], arguments: Namespace) -> Row:
    answers, written = {}, {}
    for name, model in models.items():
        with part(run, of_model(name), pins(model)):
            answers[name] = mt_bench.answer_questions(run, model.path, questions)
        run.dir.write_jsonl(f"model_answer/{name}.jsonl", mt_bench.model_answers(name, answers[name]))
        written[name] = str(run.dir.file(f"model_answer/{name}.jsonl"))
    return {"files": written} | _written(run, answers, written.values())


def _compare(run: Run, models: Models, prompts: list[Row], arguments: Namespace) -> Row:
    judge = judge_of(run, models, arguments.judge_command)
    answers = answer_all(run, models, prompts)
    run.dir.close()  # the answers are there: others may have them judged meanwhile
    matches = compare(run, judge, answers)
    if not run.report.as_json:
        _print(match_title(len(prompts), judge.by, judge.how), *match_table(matches))
    found: Row = {"matches": matches, "by": judge.by, "how": judge.how, "judging": _times(run, judge.folder, "judging")}
    return found | _written(run, answers, [str(run.dir.file(f"{judge.folder}/head_to_head.jsonl"))])


def _written(run: Run, answers: dict[str, list[Row]], files: Iterable[str] = ()) -> Row:
    """Length and variety of what each model wrote and how long it took, printed with the files."""
    figures = {name: text_figures([row["token_ids"] for row in rows]) for name, rows in answers.items()}
    if not run.report.as_json:
        names = ("mean_length", "repetition", "distinct_1", "distinct_2")
        cells = [[model, *(number(each[name], ".3f") for name in names)] for model, each in figures.items()]
        headings = ["model", "tokens", "repetition", "distinct-1", "distinct-2"]
        _print("What they wrote", headings, cells)
    for name, rows in answers.items():
        if without := sum(row["finish_reason"] == PROMPT_TOO_LONG for row in rows):
            run.report.warn(f"{without} of {len(rows)} prompts leave {name} no room for an answer: it counts as empty")
    answering = {name: _times(run, of_model(name), f"answers of {name}") for name in answers}
    if not run.report.as_json:
        for file in files:
            print(file)
    return {"models": figures, "answering": answering}


def _times(run: Run, folder: str, what: str) -> Row:
    """How long it took, whenever that was: printed too."""
    found = times(run, folder)
    if not run.report.as_json:
        rate, saved = found["computed_per_second"], found["prefix_tokens_saved"]
        sampled = f", {rate:.0f} tokens/s computed, {saved} prompt tokens shared" if rate is not None else ""
        print(f"{what}: {found['wall_seconds']:.1f} s{sampled}")
    return found


class Job(NamedTuple):
    """`kind`: of its directory, which pins the settings `keys`. `do` returns what is printed as JSON."""

    option: str
    kind: str
    keys: Sequence[str]
    read: Callable[[Path], Any]
    do: Callable[[Run, Models, Any, Namespace], Row]


JOBS = (
    Job("ranked", "ranked", USED["--ranked"], _read_ranked, _judge),
    Job("ask", "answers", ANSWERING, read_prompts, _ask),
    Job("compare", "answers", ANSWERING, read_prompts, _compare),
    Job("alpaca", "answers", ANSWERING, read_prompts, _alpaca),
    Job("mt_bench", "mt-bench", USED["--mt-bench"], mt_bench.read_questions, _mt_bench),
)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."


def _print(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=escape(title))
    for place, heading in enumerate(headings):
        table.add_column(escape(heading), justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
