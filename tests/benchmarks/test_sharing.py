"""Judging 48 x 3 under the shipped rubric: what is computed, to the token, against what the prompts have in common."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sharing import judge_items, measure, table
from benchmarks.stages import once_each
from engine import Tokenizer
from selfreward.judge import JudgeTemplate
from tests.engine.helpers import random_llama, small_config

DATA = os.environ.get("SELFREWARD_TEST_DATA")
TREES = Path(DATA or "") / "oasst" / "en_100_tree.jsonl"
TOKENIZER = Path(DATA or "") / "llama2" / "tokenizer.model"
needs_data = pytest.mark.skipif(DATA is None, reason="SELFREWARD_TEST_DATA is not set: no genuine tokenizer, no trees")
MODEL = random_llama(small_config(vocab_size=32000, max_seq_len=1024, dim=32, ffn_dim=64, n_layers=1))


@needs_data
def test_judge_prompts_compute_their_blocks_once_and_their_tails_less_what_is_copied():
    tokenizer, template = Tokenizer(TOKENIZER), JudgeTemplate("llama2")
    prompts = judge_items(TREES, tokenizer)
    texts = [(item.prompt, item.answer) for items in prompts for item in items]
    ids = [template.token_ids(tokenizer, *each) for each in texts]
    assert len(ids) == 48 and all(180 <= len(tokenizer.encode(i.answer)) <= 221 for items in prompts for i in items)
    blocks = {tuple(prompt[: end + 64]) for prompt in ids for end in range(0, len(prompt) - 63, 64)}
    mean, expected = measure(MODEL, tokenizer, TREES, new=8, rounds=1)
    for row in (mean, expected):  # the 3 draws of a request pay for its prompt once
        assert row["block_tokens"] == 64 * len(blocks)
        assert row["tail_tokens"] == sum(len(prompt) % 64 for prompt in ids)
        assert row["prefill_tokens"] == row["block_tokens"] + row["tail_tokens"] - row["copied_tokens"]
        assert row["prompt_tokens"] == sum(map(len, ids)) and row["preemptions"] == 0
        assert distinct_tokens(ids) <= row["prefill_tokens"] <= distinct_tokens(ids) + 8 * len(ids)
        assert row["ratio_to_ideal"] == row["prefill_tokens"] / once_each(template, tokenizer, texts) <= 1.3
    assert f"ratio {mean['ratio_to_ideal']:.3f}" in table([mean, expected])


def distinct_tokens(ids):
    """What an engine would compute that shares every token: those behind the longest common beginning with a neighbour."""
    ordered = sorted(ids)
    shared = [
        sum(itertools.takewhile(bool, (a == b for a, b in zip(first, second, strict=False))))
        for first, second in itertools.pairwise(ordered)
    ]
    return sum(map(len, ids)) - sum(shared)


@pytest.mark.full  # 10 s on an idle machine
@needs_data
def test_the_command_prints_the_figures(tmp_path):
    out = tmp_path / "sharing.json"
    command = [sys.executable, "-m", "benchmarks", "sharing", "--model", "15M", "--new", "1", "--rounds", "1"]
    command += ["--tokenizer", str(TOKENIZER), "--trees", str(TREES), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Python outside the engine" in done.stdout
    assert [row["score"] for row in json.loads(out.read_text())["rows"]] == ["mean", "expected"]
    done = subprocess.run([*command, "--new", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "expected at least 1" in done.stderr
