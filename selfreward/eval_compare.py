"""Verdicts about the models' answers, each judge's in a directory of its own: compare/HOW-by-JUDGE/MODELS."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from engine import content_hash
from selfreward import head_to_head
from selfreward.block_template import BlockTemplate
from selfreward.context import Row, Run
from selfreward.eval_run import ANEW, Models, part
from selfreward.eval_settings import DRAWING, SCORING, deciding
from selfreward.head_to_head import Answers, Outcomes
from selfreward.health import UNREADABLE
from selfreward.pairwise import by_pairs
from selfreward.state import RunDir, file_hash

LONGEST = 200  # bytes of a directory's name
Ask = Callable[[Answers], dict[tuple[str, str], Outcomes]]


class Judge(NamedTuple):
    """`folder`: its directory, relative to the run's, where `pinned` stands in the manifest. `by` and `how`: of the title."""

    folder: str
    pinned: Row
    ask: Ask
    by: str
    how: str


def judge_of(run: Run, models: Models, command: str | None) -> Judge:
    """The command, or `judge_model` or the last model: pairwise where the run has a template for that, else by scores.

    InputError: there is no such model, or its directory holds what another judge said. That shows before all answers.
    """
    judge = _by_command(run, command) if command is not None else _by_model(run, models)
    pinned = judge.pinned | {"models": {name: model.hash for name, model in models.items()}}
    judge = judge._replace(folder=f"compare/{judge.folder}/{folder_name(list(models))}", pinned=pinned)
    RunDir(run.dir.file(judge.folder), judge.pinned, otherwise=ANEW).close()
    return judge


def compare(run: Run, judge: Judge, answers: Answers) -> list[Row]:
    """A row per match, which stand in the judge's head_to_head.jsonl too."""
    with part(run, judge.folder, judge.pinned):
        found = head_to_head.match_rows(judge.ask(answers), answers)
        run.dir.write_jsonl("head_to_head.jsonl", found)
    unread, same = (sum(row[key] for row in found) for key in ("unread", "same_text"))
    asked = sum(row["n"] for row in found) + unread - same
    if unread > UNREADABLE * asked:
        run.report.warn(
            f"{unread} of {asked} comparisons of different texts have no verdict that can be read, and count as nothing; see "
            f"{run.dir.file(judge.folder)}, and raise judge.max_tokens, or give another judge or template"
        )
    return found


def _by_command(run: Run, command: str) -> Judge:
    """A script that was changed is another judge."""
    files = {word: file_hash(Path(word)) for word in shlex.split(command) if Path(word).is_file()}
    short = _short_hash(command + "".join(files.values()))
    name = f"command-{re.sub(r'[^A-Za-z0-9_.]+', '-', command).strip('-')[:60]}-{short}"
    pinned: Row = {"command": command, "files": files}
    return Judge(
        name, pinned, lambda answers: head_to_head.by_command(run, command, answers), "the command", "pairwise"
    )


def _by_model(run: Run, models: Models) -> Judge:
    path = run.recipe.judge_model or list(models.values())[-1].path
    hash = next((model.hash for model in models.values() if model.path == path), None) or content_hash(path)
    pinned: Row = {"judge": hash, "judge_tokenizer": run.tokenizer_of(path).template_hash}
    if run.recipe.judge_model is None:
        name = list(models)[-1]
    else:
        name = next((name for name, model in models.items() if model.hash == hash), _named(path, hash))
    if run.pairwise_template is not None:
        template = run.pairwise_template
        pinned |= {"pairwise_template": template.hash, "recipe": deciding(run.recipe, DRAWING)}
        folder = f"pairwise-{_stem(template)}-by-{name}"
        return Judge(folder, pinned, lambda answers: by_pairs(run, path, template, answers), name, "pairwise")
    asking = run.template
    if path == run.recipe.judge_model and run.judge_model_template is not None:
        asking = run.judge_model_template
    pinned |= {"judge_template": asking.hash, "recipe": deciding(run.recipe, SCORING)}
    folder = f"scores-{_stem(asking)}-by-{name}"
    return Judge(folder, pinned, lambda answers: head_to_head.by_scores(run, path, answers), name, "scores")


def _stem(template: BlockTemplate) -> str:
    return template.path.stem.removeprefix(f"{template.kind}_")[:60]


def _named(path: Path, hash: str) -> str:
    """A judge from elsewhere; every model of a run is in a directory called "model"."""
    name = path.name if path.name != "model" else f"{path.parent.name}-model"
    return f"{name[:60]}-{hash[:8]}"


def folder_name(models: Sequence[str]) -> str:
    """Of their names, which hold no comma."""
    joined = ",".join(models)
    if len(joined.encode()) <= LONGEST:
        return joined
    return f"{len(models)} models {_short_hash(joined)}"


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
