"""Where `eval` writes: a directory for every file of questions, and in it one for all that one model, or one judge, says.

OUT/eval/answers-FILE/                     --ask, --compare, --alpaca; pinned: the file, the settings of sampling
    models/NAME/answers.jsonl              pinned: the model. Sampled once, whoever asks
    compare/HOW-by-JUDGE/MODELS/           pinned: judge, its settings and template, the models. judgements.jsonl,
                                           comparisons.jsonl or verdicts.jsonl, and head_to_head.jsonl
    side_by_side.jsonl                     of the models that --ask was last about
    model_outputs/NAME.json                --alpaca
OUT/eval/mt-bench-FILE/                    pinned: the file, the settings of sampling
    models/NAME/turn_1.jsonl turn_2.jsonl  pinned: the model
    model_answer/NAME.jsonl
OUT/eval/ranked-FILE/                      pinned: the file, the settings and the template of judging
    models/NAME/judgements.jsonl           pinned: the model

What is pinned stands in a manifest.json, and another is refused with the list of differences, so that no two kinds of rows
are mixed; another model or judge has a directory of its own. The directory of a model or a judge goes on where it stopped,
needs no model once it is finished, and keeps in timing.jsonl how long it took and what the sampler did in that time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import NamedTuple

from engine import InputError, Tokenizer, content_hash
from selfreward.context import SPENT, Row, Run
from selfreward.device import check_device, device_facts
from selfreward.eval_settings import deciding
from selfreward.evaluation import sample_answers
from selfreward.files import stem
from selfreward.formats import Read, as_prompt, read_file, read_jsonl, usable
from selfreward.judge import JudgeTemplate
from selfreward.recipe import Recipe
from selfreward.report import Reporter
from selfreward.state import TIMING, RunDir, file_hash, own_version
from selfreward.verdict import PairwiseTemplate

ANEW = "remove it to ask anew"
FINISHED = "finished"  # the stage of a part


class Model(NamedTuple):
    path: Path
    hash: str  # of its content


Models = dict[str, Model]


@contextmanager
def opened(
    kind: str,
    file: Path,
    recipe: Recipe,
    keys: Sequence[str],
    paths: dict[str, Path],
    out: Path,
    report: Reporter,
    stop: Event,
    pairwise: PairwiseTemplate | None = None,
) -> Iterator[tuple[Run, Models]]:
    """A run in `OUT/eval/KIND-FILE`, which pins the settings `keys` that all models share.

    All models must share the tokenizer, which is that of the first. InputError says which does not.
    """
    check_device(recipe)
    tokenizers = {name: Tokenizer(path) for name, path in paths.items()}
    first, tokenizer = next(iter(tokenizers.items()))
    for name, each in tokenizers.items():
        if each.template_hash != tokenizer.template_hash:
            raise InputError(f"the tokenizers of {first} and {name} differ; evaluate them one at a time")
    template, by_other = JudgeTemplate(recipe.judge.template), recipe.judge.model_template
    manifest = {
        "hash of the file with the questions": file_hash(file),
        "recipe": deciding(recipe, keys),
        "tokenizer": tokenizer.template_hash,
    }
    if "judge.template" in keys:
        manifest["judge_template"] = template.hash
    manifest |= {"selfreward": own_version()} | device_facts(recipe)
    models = {name: Model(path, content_hash(path)) for name, path in paths.items()}
    with RunDir(out / "eval" / f"{kind}-{stem(file)}", manifest, otherwise=ANEW) as directory:
        report.say(f"{'resuming' if directory.resumed else 'starting'} in {directory.path}")
        other = JudgeTemplate(by_other) if by_other else None
        yield (
            Run(recipe, directory, tokenizer, template, report, stop, other, pairwise_template=pairwise),
            models,
        )


@contextmanager
def part(run: Run, folder: str, pinned: Row) -> Iterator[None]:
    """Inside, the run works in this directory below its own; what it did there and how long it took is kept."""
    with RunDir(run.dir.file(folder), pinned, otherwise=ANEW) as directory:
        done, above = directory.done(FINISHED), run.dir
        run.report.say(f"{folder}: finished before" if done else f"{folder} ...")
        started, before = time.perf_counter(), run.spent()
        run.dir = directory
        try:
            yield
        finally:
            run.dir = above
            sampled = run.spent() - before
            if sampled or not done:
                _append_time(directory, time.perf_counter() - started, sampled)
        directory.mark_done(FINISHED, {})


def _append_time(directory: RunDir, seconds: float, sampled: Counter[str]) -> None:
    with suppress(InputError):  # a full disk, say: what stopped the sampling matters more
        sampler = {key: round(sampled[key], 3) for key in SPENT}
        directory.append_timing({"seconds": round(seconds, 3), "sampler": sampler})


def times(run: Run, folder: str) -> Row:
    """What a part took, with all interruptions: its `wall_seconds`, what the sampler did (`seconds` are its steps'), and the
    tokens that it computed a second."""
    file, total = run.dir.file(f"{folder}/{TIMING}"), Counter[str]()
    wall = 0.0
    for row in read_jsonl(file) if file.is_file() else []:
        try:
            wall += row["seconds"]
            total.update(row["sampler"])
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{file}: a row has no 'seconds' or no 'sampler'; remove the file") from None
    found = {"wall_seconds": round(wall, 3)} | {key: round(total[key], 3) for key in SPENT}
    rate = total["computed_rows"] / total["seconds"] if total["seconds"] else None
    return found | {"computed_per_second": rate and round(rate, 1)}


def of_model(name: str) -> str:
    return f"models/{name}"


def pins(model: Model) -> Row:
    return {"model": model.hash}


def read_prompts(file: Path) -> list[Row]:
    """The instructions of a file in any format of docs/data.md."""
    read: Read = read_file(file, as_prompt)
    return usable(read)


def answer_all(run: Run, models: Models, prompts: list[Row]) -> dict[str, list[Row]]:
    """Every model's answer to every prompt, sampled as in the loop's own evaluation."""
    answers, temperature = dict[str, list[Row]](), run.recipe.evaluation.temperature
    for name, model in models.items():
        with part(run, of_model(name), pins(model)):
            answers[name] = sample_answers(run, model.path, "answers.jsonl", prompts, temperature)
            _check_answers(run.dir.file("answers.jsonl"), prompts, answers[name])
    return answers


def _check_answers(file: Path, prompts: Sequence[Row], rows: Sequence[Row]) -> None:
    """Kept rows are read by other commands, at other times, than wrote them."""
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True), start=1):
        if not isinstance(row, dict) or row.get("id") != prompt["id"] or not {"text", "token_ids"} <= row.keys():
            raise InputError(f"{file}:{number}: not the answer to {prompt['id']!r}; remove the file to ask anew")
