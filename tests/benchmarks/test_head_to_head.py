"""Four models' answers judged by pairs and by scores: what is computed, to the token, against what the prompts share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.head_to_head import BASELINE, Bench, block_tokens, measure, model_answers, table, texts_asked
from benchmarks.stages import once_each
from engine import Tokenizer
from selfreward.verdict import PairwiseTemplate
from tests.benchmarks.test_sharing import distinct_tokens
from tests.engine.helpers import random_llama, small_config

DATA = os.environ.get("SELFREWARD_TEST_DATA")
OASST = Path(DATA or "") / "oasst"
PROMPTS, TREES = OASST / "prompt_lottery_en_250_text.jsonl", OASST / "en_100_tree.jsonl"
TOKENIZER = Path(DATA or "") / "llama2" / "tokenizer.model"
needs_data = pytest.mark.skipif(DATA is None, reason="SELFREWARD_TEST_DATA is not set: no genuine tokenizer, no trees")
SMALL = small_config(vocab_size=32000, max_seq_len=1024, dim=32, ffn_dim=64, n_layers=1)


@needs_data
def test_a_prompt_that_stands_first_is_computed_once_for_all_matches():
    tokenizer, template = Tokenizer(TOKENIZER), PairwiseTemplate("llama2")
    answers = model_answers(PROMPTS, TREES, tokenizer, 4)
    found = measure(random_llama(SMALL), tokenizer, answers, ["judge.max_tokens=1"], rounds=2, control=2)
    pairs, scores = found["rows"]
    asked = texts_asked("pairs", answers)
    ids = [template.token_ids(tokenizer, *texts) for texts in asked]
    blocks = {tuple(prompt[: end + 64]) for prompt in ids for end in range(0, len(prompt) - 63, 64)}
    assert pairs["requests"] == len(asked) == 4 * 10 - 2  # five matches in both orders; of prompt 0 M3's answer is M2's
    assert pairs["block_tokens"] == 64 * len(blocks) and pairs["evicted_tokens"] == scores["evicted_tokens"] == 0
    again = 2  # M2's and M3's match against SFT are the same prompt 0: a request that finds all computes its last token
    assert pairs["prefill_tokens"] <= pairs["block_tokens"] + pairs["tail_tokens"] - pairs["copied_tokens"] + again
    assert distinct_tokens(ids) <= pairs["prefill_tokens"] <= distinct_tokens(ids) + 8 * len(ids)
    assert pairs["ratio_to_ideal"] == pairs["prefill_tokens"] / once_each(template, tokenizer, asked) <= 1.1
    assert pairs["factor"] > 1.6 and scores["requests"] == 4 * 4
    control = found["control"]
    first = [len(prompt) for prompt, texts in zip(ids, asked, strict=True) if texts[0] in prompts_of(answers, 2)]
    assert len(control["cpu_ratios"]) == 2 and " times the CPU time" in table(found)
    assert control["alone_tokens"] == sum(first) > 1.5 * control["shared_tokens"]
    assert f"{pairs['ratio_to_ideal']:.3f}" in table(found) and "cache had lost them: 0 tokens" in table(found)


@needs_data
def test_a_cache_of_one_comparison_is_enough_where_prompts_stand_in_tree_order(tmp_path, monkeypatch):
    tokenizer = Tokenizer(TOKENIZER)
    answers = model_answers(PROMPTS, TREES, tokenizer, 2)
    block = 2 * 4 * SMALL.n_layers * SMALL.n_kv_heads * SMALL.head_dim * 64
    settings = ["judge.draws=1", "judge.max_tokens=1", f"sampler.kv_cache_gb={14.5 * block / 2**30}"]
    (tmp_path / "a").mkdir()
    found = Bench(random_llama(SMALL), tokenizer, tmp_path / "a", settings).row("pairs", answers)
    assert found["evicted_tokens"] == 0 and found["ratio_to_ideal"] <= 1.1
    monkeypatch.setattr("engine.scheduler.in_tree_order", lambda sequences: [*sequences][::2] + [*sequences][1::2])
    (tmp_path / "b").mkdir()
    found = Bench(random_llama(SMALL), tokenizer, tmp_path / "b", settings).row("pairs", answers)
    assert found["evicted_tokens"] > 0 and found["ratio_to_ideal"] > 1.1


def prompts_of(answers, count):
    return [row["prompt"] for row in answers[BASELINE][:count]]


@needs_data
def test_answers_have_about_200_tokens_and_differ_but_for_every_tenth_prompt():
    tokenizer = Tokenizer(TOKENIZER)
    answers = model_answers(PROMPTS, TREES, tokenizer, 21)
    assert all(175 <= len(row["token_ids"]) <= 221 for rows in answers.values() for row in rows)
    different = [len({row["text"] for row in rows}) for rows in zip(*answers.values(), strict=True)]
    assert [place for place, count in enumerate(different) if count != 4] == [0, 10, 20]


def test_a_block_counts_with_all_that_stands_before_it():
    ids = list(range(64))
    assert block_tokens([ids, ids + ids, [*ids, 1]]) == 2 * 64
    assert block_tokens([[7] * 64 + ids, [8] * 64 + ids, ids[:63]]) == 4 * 64


def test_what_the_cache_lost_is_told():
    row = {"by": "pairs", "requests": 1, "prompt_tokens": 1, "prefill_tokens": 1, "block_tokens": 1, "tail_tokens": 0}
    row |= {"copied_tokens": 0, "ratio_to_ideal": 1.0, "factor": 1.0, "seconds": 1.0, "computed_per_second": 1.0}
    row |= {"requests_per_second": 1.0, "share_outside_engine": 0.1, "evicted_tokens": 1280}
    said = table({"rows": [row, row], "control": None})
    assert "cache had lost them: 2,560 tokens" in said and "without sharing" not in said


@pytest.mark.full  # 15 s on an idle machine
@needs_data
def test_the_command_prints_and_writes_the_figures(tmp_path):
    out = tmp_path / "head-to-head.json"
    command = [sys.executable, "-m", "benchmarks", "head-to-head", "--model", "15M", "--limit", "2", "--control", "1"]
    command += ["--rounds", "1", "--quantization", "int8"]
    command += ["--tokenizer", str(TOKENIZER), "--trees", str(TREES), "--prompts", str(PROMPTS), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Python outside the engine" in done.stdout
    assert [row["by"] for row in json.loads(out.read_text())["rows"]] == ["pairs", "scores"]
    for words, said in (
        (["--limit", "0"], "expected at least 1"),
        (["--limit", "251"], "has 250 prompts"),
        (["--control", "-1"], "at least 0"),
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_the_document_has_the_tables_of_the_records():
    root = Path(__file__).parents[2]
    document = (root / "docs/evaluation.md").read_text()
    records = sorted((root / "benchmarks/results").glob("*/head-to-head-*.json"))
    assert records
    for record in records:
        for line in table(json.loads(record.read_text())).split("\n"):
            assert line in document, record
