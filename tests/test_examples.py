"""The examples run as they stand, and do what they say; docs/embedding.md names each of them."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from engine import Tokenizer, load_checkpoint, rows_from_trl
from selfreward.pairs import build_pairs

ROOT = Path(__file__).parent.parent


def example(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


def test_token_logprobs_train_somebody_elses_model():
    first, last = example("token_logprobs_loop")(steps=40)
    assert last < 0.1 * first


def test_our_sampler_follows_a_transformers_model_step_by_step():
    pytest.importorskip("transformers")
    rewards, gap = example("sampler_beside_transformers")(steps=12)
    assert sum(rewards[-4:]) > sum(rewards[:4])  # 0.39 against 0.10
    assert gap <= 1e-4  # weights that were a step old would be 1e-2 apart


def test_pairs_train_the_same_in_trl_and_here(monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs, ours, gap = example("pairs_in_trl")()
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert len(ours) == 3 and ours[0] == pytest.approx(0.693147, abs=1e-5) and ours[-1] < 0.6
    assert gap <= 1e-4


def test_a_runs_own_pairs_train_the_same_in_trl_with_the_ids_that_the_loop_trains_on(monkeypatch, tmp_path):
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = runpy.run_path(str(ROOT / "examples/pairs_in_trl.py"))
    model, pairs = names["checkpoint"](tmp_path), tmp_path / "pairs.jsonl"
    tokenizer, rows, expected = Tokenizer(model), [], []
    for number, pair in enumerate(names["PAIRS"]):
        answers = [[*tokenizer.encode(pair[kind].strip()), tokenizer.eos_id] for kind in ("chosen", "rejected")]
        candidates = [
            {"id": f"{number}-{i}", "prompt_id": str(number), "prompt": pair["prompt"], "index": i, "draws": [score],
             "text": tokenizer.decode(ids), "token_ids": ids, "finish_reason": "stop", "score": score}
            for i, (ids, score) in enumerate(zip(answers, (4.5, 2.0)))
        ]  # fmt: skip
        rows += [row for row, _ in build_pairs({"id": str(number), "prompt": pair["prompt"]}, candidates)]
        expected.append((tokenizer.chat_prompt(pair["prompt"]), *answers))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs, records = names["train_in_trl"](model, pairs, tmp_path / "out")
    assert [(row.prompt, row.chosen, row.rejected) for row in rows_from_trl(records)] == expected
    ours, gap = names["train_here"](model, records)
    assert ours == pytest.approx(theirs, abs=1e-4) and gap <= 1e-4 and len(ours) == 3


def test_the_embedding_page_names_every_example_and_its_code_runs():
    text = (ROOT / "docs/embedding.md").read_text()
    found = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert set(re.findall(r"examples/(\w+\.py)", text)) == found
    assert run_blocks(text)["result"].best_step is not None


def test_the_training_pages_lora_trains_is_saved_and_samples():
    names = run_blocks((ROOT / "docs/training.md").read_text())
    assert names["result"].steps == 1 and names["model"].rank == 16
    assert names["llm"].weight_epoch == names["model"].weight_epoch
    merged = load_checkpoint(Path(names["folder"]) / "merged")
    assert not torch.equal(merged.blocks[0].attention.o, names["base"].blocks[0].attention.o.float())


def run_blocks(text):
    """The names that a page's Python code leaves behind."""
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(code, names)
    return names
