"""What an `eval` is about: the settings that it uses, and the models of a run or others given by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine import InputError
from selfreward.context import Row
from selfreward.device import sampler_dtype
from selfreward.recipe import Recipe
from selfreward.recipe_file import at, merged, parse_override
from selfreward.state import MANIFEST, STAGES, read_json, written_manifest

SAMPLING = ("seed", "device", "sampler")
ANSWERING = (*SAMPLING, "evaluation.temperature", "evaluation.max_tokens")
TURNS = (*SAMPLING, "evaluation.max_tokens")  # MT-bench's temperatures are FastChat's
DRAWING = ("judge.draws", "judge.temperature", "judge.top_p", "judge.max_tokens")
RANKING = (*DRAWING, "judge.template", "judge.score", "judge.min_valid_draws")
SCORING = (*RANKING, "judge.model_template", "judge.duplicates")
USED = {  # of the recipe, by what is asked
    "--ask": ANSWERING,
    "--alpaca": ANSWERING,
    "--mt-bench": TURNS,
    "--ranked": (*SAMPLING, *RANKING),
    "--compare": (*ANSWERING, *SCORING, "judge_model"),
    "--compare with --pairwise": (*ANSWERING, *DRAWING, "judge_model"),
    "--compare with --judge-command": ANSWERING,
}
# Pinned by what they hold, and the device by what it is.
ELSEWHERE = ("device", "judge_model", "judge.template", "judge.model_template")
LONGEST_NAME = 100  # bytes: of a model, which directories are named after


def settings(asked: str, recipe: str | None, out: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe named, else that of the run in `out`. InputError: an override that has no effect on what is asked."""
    if recipe is not None:
        found = Recipe.load(recipe, overrides, check_files=False)
    elif (out / MANIFEST).is_file():
        found = _recipe_of_run(out, overrides)
    else:
        raise InputError(f"{out} holds no run; give --out with one, or --model with --recipe for the settings")
    for override in overrides:
        for key in _leaves(parse_override(override)):
            if not any(key == used or key.startswith(f"{used}.") for used in USED[asked]):
                raise InputError(
                    f"{override!r} has no effect on {asked}, which uses {', '.join(USED[asked])}; leave it out"
                )
    return found


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of `evaluation.prompts=3` and of `evaluation={prompts: 3}` alike."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def deciding(recipe: Recipe, keys: Sequence[str]) -> Row:
    """Of these keys, those that decide the rows and are not pinned elsewhere."""
    values, found = recipe.dump(), Row()
    for key in keys:
        if key == "sampler":
            sampler = values[key]
            value: Any = {"dtype": sampler_dtype(recipe)} | {
                name: sampler[name] for name in ("quantization", "block_size")
            }
        else:
            value = at(values, key)
        if key not in ELSEWHERE:
            for part in reversed(key.split(".")):
                value = {part: value}
            found = merged(found, value)
    return found


def find_models(given: Sequence[str], out: Path) -> dict[str, Path]:
    """Name -> directory: those given as NAME=DIR, else all finished ones of the run in `out`, M0 first."""
    models: dict[str, Path] = {}
    for each in given:
        name, _, place = each.partition("=")
        if not place or not re.fullmatch(r"\w(?:[\w. +-]*[\w+-])?", name) or len(name.encode()) > LONGEST_NAME:
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
