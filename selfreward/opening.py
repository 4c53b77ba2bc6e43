"""A run in its directory: what it is given is looked at, and what decides its bytes is pinned in its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from threading import Event
from typing import Any

import torch

from engine import InputError, Tokenizer, content_hash
from selfreward.context import GateError, Row, Run
from selfreward.device import check_device, device_facts
from selfreward.inputs import Templates, check_inputs, load_templates, load_tokenizer, tokenizer_hash
from selfreward.recipe import Recipe
from selfreward.recipe_file import PATH_KEYS
from selfreward.report import Reporter, print_report
from selfreward.report_html import write_report
from selfreward.state import RunDir, file_hash, own_version, written_manifest

UNDECIDING = (
    ("sampler", "kv_cache_gb"),
    ("sampler", "max_batch_tokens"),
    ("sampler", "max_sequences"),
    ("sft", "save_every"),
    ("dpo", "save_every"),
    ("sft", "activation_checkpointing"),
    ("dpo", "activation_checkpointing"),
    ("eft", "required"),
)
CHANGEABLE = "gates.* and eft.required may be changed before a resume; any other key needs a new --out directory"


@contextmanager
def opened(recipe: Recipe, out: str, report: Reporter, stop: Event) -> Iterator[Run]:
    """The run in its directory, once all that it is given was looked at. A gate's sentence goes into its report."""
    began_with = written_manifest(out).get("training_threads")
    if began_with is not None and (type(began_with) is not int or began_with < 1):
        raise InputError(f"{out}/manifest.json: training_threads is {began_with!r}; restore the file, or start anew")
    threads = recipe.threads or began_with
    if threads is not None:  # torch's sums change with the count: a resumed run takes the one that it began with
        torch.set_num_threads(threads)
    check_device(recipe)
    tokenizer = load_tokenizer(recipe)
    templates = load_templates(recipe)
    odd = check_inputs(recipe, tokenizer, templates.judge)
    with RunDir(out, _manifest(recipe, tokenizer, templates), without_places) as directory:
        for sentence in odd:
            report.warn(sentence)
        place = directory.manifest.get("gpu", "the CPU")
        report.say(f"{'resuming' if directory.resumed else 'starting'} in {directory.path}, on {place}")
        try:
            yield Run(
                recipe,
                directory,
                tokenizer,
                templates.judge,
                report,
                stop,
                templates.judge_model,
                templates.prompts,
                templates.pairwise,
            )
        except GateError as error:
            said = f"{error} ({CHANGEABLE})"
            with suppress(InputError, OSError):  # what the gate says matters more than the page
                written = write_report(directory, [], stopped=said)
                if report.as_json:
                    print_report(written, as_json=True)
            raise GateError(said) from None


def _manifest(recipe: Recipe, tokenizer: Tokenizer, templates: Templates) -> Row:
    """Everything that decides a run's bytes."""
    return {
        "recipe": deciding(recipe),
        "inputs": {key: file_hash(path) for key, path in recipe.paths().items() if path.is_file()},
        "models": {
            key: content_hash(path)
            for key, path in recipe.paths().items()
            if key in ("model", "m1", "judge_model", "prompt_model")
        },
        "tokenizer": tokenizer.template_hash,
        "judge_tokenizer": tokenizer_hash(recipe.judge_model),
        "judge_template": templates.judge.hash,
        "judge_model_template": templates.judge_model.hash if templates.judge_model else None,
        "prompt_tokenizer": tokenizer_hash(recipe.prompt_model),
        "prompt_template": templates.prompts.hash if templates.prompts else None,
        "pairwise_template": templates.pairwise.hash if templates.pairwise else None,
        "selfreward": own_version(),
        "numpy": metadata.version("numpy"),  # its permutations are the order of the data
        "training_threads": torch.get_num_threads(),
    } | device_facts(recipe)


def deciding(recipe: Recipe) -> Row:
    """The keys that decide a run's bytes: the others may be changed before a resume, such as a gate that stopped the run."""
    values = recipe.dump()
    for key in ("gates", "threads", "device"):  # threads and device are pinned as they were, not as they were asked for
        del values[key]
    for group, key in UNDECIDING:
        del values[group][key]
    return values


def without_places(manifest: Row) -> Row:
    """The manifest as a resume compares it: what a path holds is compared by its hash, so of the path there remains the
    name of a data file, after which rows without an id are named."""

    def shortened(values: Any, prefix: str) -> Any:
        if isinstance(values, dict):
            return {key: shortened(value, f"{prefix}{key}.") for key, value in values.items()}
        key = prefix[:-1]
        if key not in PATH_KEYS or not isinstance(values, str):
            return values
        return Path(values).name if key.startswith("data.") or key == "prompts.file" else "a path"

    return manifest | {"recipe": shortened(manifest.get("recipe"), "")}
