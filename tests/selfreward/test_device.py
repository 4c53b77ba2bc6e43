"""Where the loop computes: what is asked for, what is refused, what the manifest pins."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import InputError, NotBuiltError
from engine.llm import GPU_BLOCKS as ENGINE_BLOCKS
from selfreward import context
from selfreward.context import Run
from selfreward.device import GPU_BLOCKS, check_device, device_facts, find_device, sampler_dtype
from selfreward.inputs import load_tokenizer
from selfreward.judge import JudgeTemplate
from selfreward.recipe import PACKAGE, Recipe
from selfreward.report import Reporter
from selfreward.run import main
from selfreward.state import RunDir
from tests.selfreward.test_run import UNMEASURED

M0 = PACKAGE / "tiny/m0"


def recipe(*overrides: str) -> Recipe:
    return Recipe.load("micro", overrides)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch as it is with a GPU, as far as it is asked here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_is_taken_where_there_is_one(gpu: None) -> None:
    found = {name: recipe(f"device={name}") for name in ("auto", "cpu", "cuda")}
    assert {name: find_device(r) for name, r in found.items()} == {"auto": "cuda", "cpu": "cpu", "cuda": "cuda"}
    assert [sampler_dtype(r) for r in found.values()] == ["bfloat16", "float32", "bfloat16"]
    assert sampler_dtype(recipe("device=cuda", "sampler.dtype=float32")) == "float32"
    facts = device_facts(found["auto"])
    assert (facts["device"], facts["gpu"]) == ("cuda", "NVIDIA H200") and "cuda" in facts
    assert facts["backends"] != device_facts(found["cpu"])["backends"]


def test_auto_is_the_cpu_elsewhere(no_gpu: None) -> None:
    found = recipe("device=auto")
    assert (find_device(found), sampler_dtype(found)) == ("cpu", "float32")
    assert device_facts(found) == device_facts(recipe()) and "gpu" not in device_facts(found)


def test_a_gpu_that_is_not_there_is_one_sentence(
    no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", "micro", "--out", str(tmp_path / "run"), "device=cuda"]) == 2
    assert capsys.readouterr().err == (
        "error: device is 'cuda', and torch finds no GPU here; set device=cpu, or install a torch for CUDA\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "kind", "said"),
    [
        ("sampler.quantization=int8", NotBuiltError, "sampler.quantization is 'int8'; on a GPU it is not built yet"),
        (
            "sampler.block_size=48",
            InputError,
            "sampler.block_size is 48; on a GPU expected one of (8, 16, 32, 64, 128)",
        ),
    ],
)
def test_what_a_gpu_cannot_is_refused_before_the_run(gpu: None, override: str, kind: type, said: str) -> None:
    with pytest.raises(kind) as caught:
        check_device(recipe("device=auto", override))
    assert said in str(caught.value)
    check_device(recipe("device=cpu", override))


def test_the_blocks_are_the_engines() -> None:
    assert GPU_BLOCKS == ENGINE_BLOCKS


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def make(*overrides: str) -> Run:
        found = recipe(*overrides)
        directory = RunDir(tmp_path / "run", {})
        return Run(found, directory, load_tokenizer(found), JudgeTemplate(found.judge.template), Reporter(quiet=True))

    return make


def test_sampler_and_training_are_asked_for_on_that_device(
    gpu: None, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def sampler(*given: Any, **options: Any) -> Any:
        asked.append(("LLM", options["device"], options["dtype"]))
        return SimpleNamespace(stats=dict)  # that it did nothing

    monkeypatch.setattr(context, "LLM", sampler)
    monkeypatch.setattr(context, "load_checkpoint", lambda path, dtype, device: asked.append((dtype, device)))
    monkeypatch.setattr(context, "LoRA", lambda *a: None)
    one = run("device=auto")
    one.llm(M0)
    one.fresh(M0, "fp32")
    one.fresh(M0, "bf16-stochastic")
    one.recipe = recipe("device=auto", "lora={rank: 2, base: bf16}")
    one.fresh(M0, "fp32")
    assert asked == [
        ("LLM", "cuda", "bfloat16"),
        (torch.float32, "cuda"),
        (torch.bfloat16, "cuda"),
        (torch.bfloat16, "cuda"),
    ]


def test_the_sampler_is_gone_before_a_training_takes_memory(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = run()
    loaded = weakref.ref(one.llm(M0))
    there = []
    load = context.load_checkpoint
    monkeypatch.setattr(context, "load_checkpoint", lambda *a: (there.append(loaded()), load(*a))[1])
    one.fresh(M0, "fp32")
    assert there == [None]  # by its count of references: no collector ran


def test_the_samplers_dtype_and_bits_reach_it(run: Any) -> None:
    stats = run("sampler.dtype=bfloat16", "sampler.quantization=int8").llm(M0).stats()
    assert (stats["dtype"], stats["quantization"]) == ("bfloat16", "int8")
    assert run().llm(M0).stats()["dtype"] == "float32"


@pytest.mark.parametrize(
    ("override", "rough"), [("dtype=bfloat16", True), ("quantization=int8", True), ("dtype=float32", False)]
)
def test_a_sampler_that_rounds_more_is_known_to_the_parity_gate(override: str, rough: bool, run: Any) -> None:
    assert run(f"sampler.{override}").rough_sampler is rough


LITTLE = ["prompts.count=24", "data.eft_limit=12", "eft.required=false", "gates.min_pairs=1"]


@pytest.mark.full
def test_a_loop_with_a_rough_sampler_passes_its_gates(tmp_path: Path) -> None:
    words = ["--recipe", "micro", "--quiet", "--out", str(tmp_path / "run"), *LITTLE, "rounds=1", *UNMEASURED]
    assert main([*words, "sampler={dtype: bfloat16, quantization: int8}"]) == 0
    stages = json.loads((tmp_path / "run/stages.json").read_text())
    assert 1e-3 < stages["iter_1/model"]["parity_max"] < 0.1  # above what the gate allows in fp32
