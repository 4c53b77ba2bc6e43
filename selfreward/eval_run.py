"""What `eval` works with: the models of a run, or others given by name, and a directory of its own that can be resumed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from engine import InputError, Tokenizer, content_hash
from selfreward.context import Row, Run
from selfreward.device import check_device, device_facts, sampler_dtype
from selfreward.evaluation import sample_answers
from selfreward.files import stem
from selfreward.formats import Read, as_prompt, read_file, usable
from selfreward.inputs import tokenizer_hash
from selfreward.judge import JudgeTemplate
from selfreward.pairwise import PairwiseTemplate
from selfreward.recipe import Recipe
from selfreward.report import Reporter
from selfreward.state import MANIFEST, STAGES, RunDir, file_hash, own_version, read_json, written_manifest

USED = ("seed", "evaluation", "judge", "judge_model", "sampler", "device")  # of the recipe
FOR_THE_LOOP = (
    *("evaluation.oracle", "evaluation.prompts", "evaluation.greedy", "evaluation.judge_groups"),
    *("evaluation.head_to_head", "evaluation.pairwise_template", "judge.by"),
)


def settings(recipe: str | None, out: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe named, else that of the run in `out`; of it `eval` takes what USED names but FOR_THE_LOOP."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.partition(".")[0] not in USED:
            raise InputError(f"{override!r} has no effect on eval, which uses {', '.join(USED)}; leave it out")
        if key in FOR_THE_LOOP:
            raise InputError(f"{override!r} has no effect on eval, only on a run; leave it out")
    if recipe is not None:
        return Recipe.load(recipe, overrides, check_files=False)
    if (out / MANIFEST).is_file():
        return _recipe_of_run(out, overrides)
    raise InputError(f"{out} holds no run; give --out with one, or --model with --recipe for the settings")


def find_models(given: Sequence[str], out: Path) -> dict[str, Path]:
    """Name -> directory: those given as NAME=DIR, else all finished ones of the run in `out`, M0 first."""
    models: dict[str, Path] = {}
    for each in given:
        name, _, place = each.partition("=")
        if not place or not re.fullmatch(r"[\w][\w. +-]*", name):
            raise InputError(f"--model {each!r} is not NAME=DIRECTORY, with a name that a file can have")
        if name in models:
            raise InputError(f"--model names {name!r} twice; give every model its own name")
        models[name] = Path(place).absolute()
    found = models or _models_of_run(out)
    for name, path in found.items():
        if not path.is_dir():
            raise InputError(f"the model {name} should be in {path}, which is no directory; correct the path")
    return found


def _recipe_of_run(out: Path, overrides: Sequence[str]) -> Recipe:
    """The manifest keeps the device apart from the recipe, as it was found and not as it was asked for."""
    written = written_manifest(out)
    values, device = written.get("recipe"), written.get("device")
    if isinstance(values, dict) and device is not None:
        values = values | {"device": device}
    return Recipe.of_manifest(out / MANIFEST, values, overrides)


def _models_of_run(out: Path) -> dict[str, Path]:
    """By the run's own recipe, whatever the settings are from."""
    if not (out / MANIFEST).is_file() or not (out / STAGES).is_file():
        raise InputError(f"{out} holds no finished models; give --out with a run, or --model NAME=DIRECTORY")
    recipe = _recipe_of_run(out, [])
    stages, models = read_json(out / STAGES), dict[str, Path]()
    if recipe.m1 is not None:
        models["M1"] = recipe.m1
    elif recipe.model is not None:
        models["M0"] = recipe.model
    for stage, name in (("m0/model", "M0"), ("sft/model", "SFT"), ("m1/model", "M1")):
        if stage in stages:
            models[name] = out / stages[stage].get("same_as", stage)
    k = 1
    while f"iter_{k}/model" in stages:
        models[f"M{k + 1}"] = out / f"iter_{k}/model"
        k += 1
    return {name: path.absolute() for name, path in models.items()}


@contextmanager
def opened(
    what: str,
    file: Path,
    recipe: Recipe,
    models: dict[str, Path],
    out: Path,
    report: Reporter,
    stop: Event,
    pairwise: PairwiseTemplate | None = None,
) -> Iterator[Run]:
    """A run in `OUT/eval/WHAT-FILE`: the same command goes on there, another model or setting is refused.

    All models must share the tokenizer, which is that of the first. InputError says which does not.
    """
    check_device(recipe)
    tokenizers = {name: Tokenizer(path) for name, path in models.items()}
    first, tokenizer = next(iter(tokenizers.items()))
    for name, each in tokenizers.items():
        if each.template_hash != tokenizer.template_hash:
            raise InputError(f"the tokenizers of {first} and {name} differ; evaluate them one at a time")
    template, by_other = JudgeTemplate(recipe.judge.template), recipe.judge.model_template
    other = JudgeTemplate(by_other) if by_other else None
    manifest = {
        "what": what,
        "file": file_hash(file),
        "recipe": _deciding(recipe),
        "models": {name: content_hash(path) for name, path in models.items()},
        "judge": recipe.judge_model and content_hash(recipe.judge_model),
        "judge_tokenizer": tokenizer_hash(recipe.judge_model),
        "tokenizer": tokenizer.template_hash,
        "judge_template": template.hash,
        "judge_model_template": other and other.hash,
        "pairwise_template": pairwise and pairwise.hash,
        "selfreward": own_version(),
    } | device_facts(recipe)
    with RunDir(out / "eval" / f"{what}-{stem(file)}", manifest) as directory:
        report.say(f"{'resuming' if directory.resumed else 'starting'} in {directory.path}")
        yield Run(recipe, directory, tokenizer, template, report, stop, judge_model_template=other)


def _deciding(recipe: Recipe) -> Row:
    """The settings that decide the rows which `eval` writes; templates are pinned by what they say."""
    values = recipe.dump()
    found = {key: dict(values[key]) for key in ("evaluation", "judge")}
    for key in (*FOR_THE_LOOP, "judge.template", "judge.model_template"):
        group, _, name = key.partition(".")
        del found[group][name]
    sampler = {"dtype": sampler_dtype(recipe)} | {key: values["sampler"][key] for key in ("quantization", "block_size")}
    return {"seed": recipe.seed, **found, "sampler": sampler}


def read_prompts(file: Path) -> list[Row]:
    """The instructions of a file in any format of docs/data.md."""
    read: Read = read_file(file, as_prompt)
    return usable(read)


def answer_all(run: Run, models: dict[str, Path], prompts: list[Row]) -> dict[str, list[Row]]:
    """Every model's answer to every prompt, sampled as in the loop's own evaluation: answers/NAME.jsonl."""
    temperature = run.recipe.evaluation.temperature
    return {
        name: sample_answers(run, path, f"answers/{name}.jsonl", prompts, temperature) for name, path in models.items()
    }
