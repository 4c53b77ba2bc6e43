"""The whole loop on the genuine tokenizer and Open Assistant's trees, by a small model that was built to judge readably."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import LLM, InputError, LlamaConfig, SamplingParams, Tokenizer, save_checkpoint
from selfreward.run import main
from tests.selfreward.hand_built import chain, hand_built

SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 16, "ffn_dim": 96, "max_seq_len": 4096}


@pytest.fixture(scope="module")
def directory(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(test_data / "llama2/tokenizer.model")
    path = tmp_path_factory.mktemp("hand_built") / "m0"
    model = hand_built(LlamaConfig(**SMALL, vocab_size=tokenizer.vocab_size), tokenizer)  # type: ignore[arg-type]
    save_checkpoint(model, path, tokenizer)
    return path


def test_it_says_each_score_as_often_and_stops(directory: Path) -> None:
    llm = LLM(directory, device="cpu", kv_cache_gb=0.1)
    assert llm.tokenizer is not None
    prompts = [llm.tokenizer.chat_prompt(text) for text in ("Hello", "Score: 5", "3")]
    params = SamplingParams(n=200, temperature=0.7, top_p=0.9, max_tokens=9, seed=1)
    outputs = llm.generate(prompts, params)
    said = Counter(answer.text for output in outputs for answer in output.outputs)
    assert {answer.finish_reason for output in outputs for answer in output.outputs} == {"stop"}
    # At top-p 0.9 of six equal ones the sixth is left out of a draw or not, by rounding.
    assert set(said) <= {f"Score: {digit}" for digit in range(6)} and len(said) >= 5
    assert all(60 <= count <= 180 for count in said.values())  # of 600, 100 to 120 each: 4 standard deviations are 40


def test_a_vocabulary_without_these_words_is_refused() -> None:
    spelled = SimpleNamespace(path="other.model", eos_id=2, encode=lambda text: [7, 8, 100 + len(text)])
    with pytest.raises(InputError, match=r"other.model does not spell each of the scores as one token"):
        chain(spelled)  # type: ignore[arg-type]
    spelled.encode = lambda text: [7, 7, ord(text[-1])]
    with pytest.raises(InputError, match=r"other.model spells 'Score: ' with one token twice"):
        chain(spelled)  # type: ignore[arg-type]


def test_the_7b_recipe_runs_through_to_m2(directory: Path, test_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [
        *("--recipe", "llama2-7b", "--quiet", "--out", str(out), f"model={directory}", "device=cpu", "rounds=1"),
        f"data.ranked={test_data / 'oasst/en_100_tree.jsonl'}",
        "prompts.mode=file",
        f"prompts.file={test_data / 'oasst/prompt_lottery_en_250_text.jsonl'}",
        *("data.ift_limit=4", "data.eft_limit=6", "data.max_tokens=256", "evaluation.judge_groups=1"),
        *("prompts.count=8", "gates.min_pairs=1", "sft.max_steps=1", "dpo.max_steps=1", "sampler.kv_cache_gb=0.2"),
    ]
    assert main(words) == 0
    stages = json.loads((out / "stages.json").read_text())
    assert set(stages["iter_1/judgements"]["statuses"]) == {"ok", "duplicate"}  # it knows six answers
    assert stages["eft"]["train"] > 0 and stages["m1/model"]["eft"] == stages["eft"]["train"]
    assert stages["iter_1/pairs"]["pairs"] >= 4 and stages["iter_1/model"]["lora_rank"] == 16
    models = json.loads((out / "report.json").read_text())["models"]
    assert [row["name"] for row in models] == ["M0", "SFT", "M1", "M2"]
    assert (out / "iter_1/model/model.safetensors").is_file() and (out / "iter_1/adapter").is_dir()
