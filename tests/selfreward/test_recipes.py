"""The shipped recipes: how they differ, and that what docs/recipes.md says of memory and time follows from the engine, the
recipes and the H200's records."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import PRESETS, Llama, LlamaConfig, LoRA
from engine.runner_gpu import GpuRunner
from selfreward.recipe import Recipe
from selfreward.recipe_file import RECIPES, recipe_names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/recipes.md").read_text()
PROMPT, ANSWER, JUDGEMENT, RUBRIC = 30, 300, 130, 280  # tokens, as the page assumes
SIZES = ("7B", "13B")


def differences(one: Any, other: Any, key: str = "") -> set[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return set().union(*(differences(one[name], other[name], f"{key}.{name}") for name in one))
    return set() if one == other else {key[1:]}


def loaded(name: str) -> dict[str, Any]:
    return Recipe.load(name, check_files=False).model_dump()


def test_13b_is_7b_with_another_model() -> None:
    assert differences(loaded("llama2-7b"), loaded("llama2-13b")) == {"model"}


def test_trial_is_7b_at_reduced_counts() -> None:
    """What is tried must be what runs later: formats, template, LoRA, losses and how they are driven."""
    reduced = {
        "data.ift_limit",
        "data.eft_limit",
        "data.max_tokens",
        "sft.batch_size",
        "dpo.batch_size",
        "prompts.count",
    }
    reduced |= {f"{name}.max_tokens" for name in ("eft", "candidates", "judge")} | {"eft.attempts", "gates.min_pairs"}
    assert differences(loaded("llama2-7b"), loaded("trial")) == reduced | {
        *("rounds", "device", "model", "tokenizer", "init", "eft.required", "evaluation.judge_groups"),
        *("prompts.mode", "prompts.file"),  # random weights write none
    }


def test_what_has_a_fixed_world_stays_on_the_cpu() -> None:
    assert {name for name in recipe_names() if loaded(name)["device"] == "cpu"} == {"tiny", "micro", "trial"}


def table(first: str) -> dict[str, list[str]]:
    """Rows of the page's table whose header begins with these cells: name -> its other cells."""
    lines = PAGE.split(f"\n| {first} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: values for name, *values in cells}


def records(name: str) -> dict[str, dict[str, Any]]:
    """Kernel -> its record, the engine's own where there are variants."""
    lines = (ROOT / f"benchmarks/results/h200/{name}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["kernel"]: row for row in rows if not row.get("shape", "").startswith(("no ", "ungrouped"))}


def lora() -> dict[str, dict[str, Any]]:
    """What a step by LoRA took on the H200: `python -m benchmarks.lora`."""
    rows = json.loads((ROOT / "benchmarks/results/h200/lora.json").read_text())["rows"]
    return {
        " ".join([row["what"], *([row["activation_checkpointing"]] if "peak_gb" in row else [])]): row for row in rows
    }


def test_the_memory_that_a_training_was_said_to_take_is_what_it_took() -> None:
    """The tables are sums of parts; the peaks are torch's own, of whole steps at 7B in packs of 4,096 tokens."""
    said = [float(each) for each in memory("7B")[10:12]]
    for name, expected in zip(("none", "full"), said, strict=True):
        peaks = [lora()[f"{what} {name}"]["peak_gb"] for what in ("SFT", "DPO")]
        assert max(peaks) == pytest.approx(expected, rel=0.02) and min(peaks) > 0.95 * expected


def activation_bytes(config: LlamaConfig) -> float:
    """Of a token of a pack: two measured steps at 7B differ in 512 tokens of a pack; by dim and ffn at other sizes."""
    steps, of = records("train"), PRESETS["7B"]
    measured = (steps["DPO step"]["extra_memory"] - steps["SFT step"]["extra_memory"]) / 512
    dims = (measured / 2 / of.n_layers - 3 * of.ffn_dim) / of.dim
    assert f"{of.n_layers} layers of {dims:.1f} dim + 3 ffn numbers" in PAGE
    return 2 * config.n_layers * (dims * config.dim + 3 * config.ffn_dim)


def rest_bytes() -> float:
    """What a step at 7B took beside 12 bytes a parameter and activations. The record is beside the weights but the embedding."""
    config = PRESETS["7B"]
    weights = 2 * (config.n_parameters - config.vocab_size * config.dim)
    peak = records("train")["DPO step"]["extra_memory"] + weights
    return peak - 12 * config.n_parameters - 2048 * activation_bytes(config)


@cache
def memory(size: str) -> list[str]:
    config, recipe = PRESETS[size], Recipe.load(f"llama2-{size.lower()}", check_files=False)
    with torch.device("meta"):
        base = Llama(config, torch.bfloat16, device="meta")
    thin = LoRA(base, 1, recipe.lora.alpha, recipe.lora.targets)  # a sixteenth: drawing the numbers takes seconds
    count = recipe.lora.rank * sum(parameter.numel() for parameter in thin.parameters())
    weights, trained = sum(parameter.nbytes for parameter in base.parameters()), 16 * count
    runner = GpuRunner.__new__(GpuRunner)  # asked for one number; a whole one would take the memory
    runner.model, runner._chunks = base, config.max_seq_len // recipe.sampler.block_size
    step, slot = (
        runner.step_bytes(8192, recipe.sampler.max_sequences),
        4 * config.n_layers * config.n_kv_heads * config.head_dim,
    )
    pack, kept = recipe.dpo.max_pack_tokens, activation_bytes(config)
    full = 2 * 2 * config.dim * config.n_layers
    training = weights + trained + rest_bytes()
    return [
        f"{config.n_parameters:,}",
        f"{weights / 1e9:.1f}",
        f"{step / 1e9:.1f}",
        f"{slot / 1e6:.3f}",
        f"{int((0.9 * (80e9 - weights) - step) / slot):,}",
        f"{count:,}",
        f"{trained / 1e9:.1f}",
        f"{kept / 1e6:.2f}",
        f"{full / 1e6:.2f}",
        f"{rest_bytes() / 1e9:.1f}",
        f"{(training + pack * kept) / 1e9:.1f}",
        f"{(training + pack * (full + kept / config.n_layers)) / 1e9:.1f}",
        f"{(2 * weights + trained) / 1e9:.1f}",
    ]


@pytest.mark.parametrize("size", SIZES)
def test_memory_is_what_the_engine_takes(size: str) -> None:
    rows = table("| 7B | 13B")
    assert [cells[SIZES.index(size)] for cells in rows.values()] == memory(size)
    head = (RECIPES / f"llama2-{size.lower()}.yaml").read_text().split("\nseed:")[0]
    _, weights, step, _, tokens, _, trained, _, _, _, training, full, writing = memory(size)
    activations = (
        f"{Recipe.load('llama2-7b', check_files=False).dpo.max_pack_tokens * activation_bytes(PRESETS[size]) / 1e9:.1f}"
    )
    for said in (
        f"{weights} GB of weights, {step} a step",
        f"keys and values of {int(tokens.replace(',', '')) // 1000},000 tokens",
        f"training: {training} GB",
        f"AdamW {trained},",
        f"4,096 tokens {activations} ",
        f"makes it {full})",
        f"writing a model: {writing} GB",
    ):
        assert said in re.sub(r"\n# +", " ", head), said


def test_time_is_tokens_over_measured_rates() -> None:
    sampler = records("sampler")
    drawn, judged = (sampler[name]["new_tokens_per_second"] for name in ("sampling", "judging"))
    reference, sft, dpo = (lora()[name]["tokens_per_second"] for name in ("reference", "SFT none", "DPO none"))
    for rate in (drawn, judged, sft, dpo, reference):
        assert f"{rate:,.0f}" in PAGE
    recipe = Recipe.load("llama2-7b", check_files=False)
    count, answers = recipe.prompts.count or 0, recipe.candidates.n
    a_round = [
        (count // 2 * recipe.prompts.max_tokens, drawn),
        (count * answers * ANSWER, drawn),
        (count * answers * recipe.judge.draws * JUDGEMENT, judged),
        (count * (PROMPT + 2 * ANSWER), dpo),
        (count * (PROMPT + 2 * ANSWER), reference),
    ]
    once = [
        (2 * 3200 * (PROMPT + ANSWER) + 1600 * (RUBRIC + PROMPT + ANSWER + JUDGEMENT), sft),
        (int(600 * 3.3 * recipe.eft.attempts * JUDGEMENT), judged),
        (5 * int(200 * 3.3 * recipe.judge.draws * JUDGEMENT), judged),
    ]
    longer = PRESETS["13B"].n_parameters / PRESETS["7B"].n_parameters
    assert f"{longer:.2f} times as long" in PAGE
    of_round, of_rest = (sum(tokens / rate / 60 for tokens, rate in part) for part in (a_round, once))
    for first, part, total in (
        ("a round", a_round, of_round),
        ("once", once, 2 * of_round + of_rest),
    ):
        expected = [
            [f"{tokens:,}", f"{tokens / rate / 60:.1f}", f"{longer * tokens / rate / 60:.1f}"] for tokens, rate in part
        ]
        assert list(table(f"{first} | tokens").values()) == [*expected, ["", f"{total:.1f}", f"{longer * total:.1f}"]]
    for size, times in (("7b", 1.0), ("13b", longer)):
        parts = [round(times * tokens / rate / 60) for tokens, rate in a_round]
        said = (RECIPES / f"llama2-{size}.yaml").read_text()
        assert (
            f"({times * of_round:.0f} a round: sampling {parts[0] + parts[1]}, judging {parts[2]}, DPO {parts[3] + parts[4]})"
            in said
        )
        whole = times * (2 * of_round + of_rest)  # said to five minutes
        stated = re.findall(r"# time    (?:(\d+) hours )?(\d+) minutes", said)[0]
        assert 0 <= 60 * int(stated[0] or 0) + int(stated[1]) - whole < 5
