"""The ablation's rows: what they count is what the workload says, and every variant draws the same tokens."""

import json
import subprocess
import sys

import pytest

from benchmarks.limits import Limits
from benchmarks.models import MODELS, product_flops
from benchmarks.throughput import measure
from benchmarks.workloads import COMPARED, judging, sampling
from engine import Llama
from tests.engine.helpers import random_llama, small_config

MODEL = random_llama(small_config(vocab_size=32000, max_seq_len=1024, dim=32, ffn_dim=64))


def rows_of(name, scale):
    rows = measure(name, MODEL, rounds=1, scale=scale, limits=Limits(100.0, 10.0))
    return {row["variant"]: row for row in rows}


def test_prefill_does_not_grow_with_the_number_of_candidates():
    rows = rows_of("sampling", 0.1)
    prompts = len(sampling(0, 0.1).prompts)
    assert rows["engine"]["prompt_tokens"] == prompts * 128 * 4
    assert rows["engine"]["prompt_tokens_computed"] == prompts * 128
    assert rows["no sharing"]["prompt_tokens_computed"] == prompts * 128 * 4
    assert rows["engine"]["kv_gb_read"] < 0.6 * rows["engine"]["kv_gb_ungrouped"]
    assert rows["ungrouped"]["kv_gb_read"] == rows["ungrouped"]["kv_gb_ungrouped"]


def test_judge_prompts_pay_for_the_rubric_once():
    rows = rows_of("judging", 0.1)
    prompts = len(judging(0, 0.1).prompts)
    assert rows["engine"]["prompt_tokens_computed"] == 256 + prompts * 256
    assert rows["no sharing"]["prompt_tokens_computed"] == prompts * 3 * 512
    assert rows["engine"]["preemptions"] == 0


def test_rounds_have_prompts_of_their_own_and_the_rubric_is_shared():
    first, second = judging(0).prompts, judging(1).prompts
    assert len(first) == 48 and first != second
    assert len({tuple(prompt[:256]) for prompt in first}) == 1 and len({tuple(prompt) for prompt in first}) == 48


def test_the_loads_that_engines_are_compared_at():
    loads = {name: make(0, 1.0) for name, make in COMPARED.items()}
    assert {
        name: (load.prompt_tokens, load.distinct_prompt_tokens, load.new_tokens) for name, load in loads.items()
    } == {
        "sampling": (1024, 1024, 4096),
        "judging": (4096, 2304, 1536),
        "prefill": (4096, 4096, 8),
        "single": (128, 128, 128),
    }
    assert {len(params.params) for params in loads.values()} == {1, 8}
    assert loads["single"].params[0].temperature == 0 and loads["sampling"].params[0].temperature > 0


def test_the_model_has_the_products_that_its_speed_is_counted_in():
    model = Llama(MODELS["110M"])
    assert product_flops(model) == 2 * 12 * (4 * 768 * 768 + 3 * 768 * 2048)
    assert model.head.numel() == 32000 * 768


@pytest.mark.full
def test_the_command_prints_a_table_and_writes_its_rows(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "sampling", "--model", "15M", "--rounds", "1", "--scale", "0.1"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "rows.json")], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0 and "| no sharing |" in done.stdout
    result = json.loads((tmp_path / "rows.json").read_text())
    assert next(row["variant"] for row in result["rows"]) == "engine" and result["limits"]["gflops"] > 0
    wrong = subprocess.run([*command[:4], "--model", "9T"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "expected one of 110M" in wrong.stderr
