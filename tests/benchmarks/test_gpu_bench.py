"""`python -m benchmarks.gpu`: every case runs at toy size and agrees with its reference; rows are whole; nothing is kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_engine, training
from benchmarks.gpu_bench import Bench, Case
from engine import Llama, LlamaConfig

ROOT = Path(__file__).parent.parent.parent


def smoke(part, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", part, "--smoke", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.iterdir())
    return [line for line in done.stdout.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(
    "part,names",
    [
        (
            "kernels",
            {
                *("rms_norm", "rms_norm backward", "add + rms_norm", "rope", "swiglu", "swiglu backward", "rope_write"),
                *("tree_attention", "tree_attention backward", "work_attention", "sample_rows", "adamw_bf16"),
                *("linear_logprob forward", "linear_logprob recompute", "linear_logprob one pass"),
            },
        ),
        pytest.param("sampler", {"decode step", "prefill", "sampling", "judging"}, marks=pytest.mark.full),
        ("train", {"SFT step", "DPO step"}),
        pytest.param("peers", {"sampling", "judging"}, marks=pytest.mark.full),
    ],
)
def test_every_case_of_a_part_runs_at_toy_size(part, names, tmp_path):
    rows = smoke(part, tmp_path)
    assert {row.split(" | ")[0].removeprefix("| ") for row in rows if "| kernel |" not in row} == names


def test_a_steps_flops_are_those_of_products_with_weights_and_the_head_counts_for_targets_alone():
    model = Llama(LlamaConfig(32, 2, 4, 2, 8, 48, vocab_size=300, max_seq_len=64))
    expected = training.flops_of("train", model, 128, 128)  # 4 prompts, 8 answers
    assert gpu_engine.step_flops(model, 4 * 128 + 8 * 128, 8 * 128) == expected


def bench(tmp_path, smoke=True):
    if torch.cuda.is_available():
        pytest.skip("for a machine without a GPU")
    return Bench("kernels", smoke, tmp_path)


def case(ours, exact):
    return Case(
        "some kernel", "2", lambda: torch.tensor(ours), {"peer": lambda: None}, lambda: torch.tensor(exact), 10, 20
    )


def test_a_row_has_time_quantiles_floor_and_peers(tmp_path):
    made = bench(tmp_path)
    made.run(case([1.0, 2.0], [1.0, 2.01]))
    row = json.loads(json.dumps(made.rows[-1]))
    assert (
        row["smoke"] is True and row["kernel"] == "some kernel" and row["command"] == "python -m benchmarks.gpu kernels"
    )
    assert row["ms_low_high"][0] <= row["ms"] <= row["ms_low_high"][1]
    assert set(row["peers"]) == {"peer"} and {"device", "versions", "gbps", "tflops", "share_of_floor"} <= set(row)


@pytest.mark.parametrize("wrong", [[1.0, 2.2], [1.0, float("nan")]])
def test_a_kernel_that_computes_something_else_is_not_timed(wrong, tmp_path):
    with pytest.raises(AssertionError, match="some kernel 2: relative error"):
        bench(tmp_path).run(case(wrong, [1.0, 2.0]))


def test_what_begins_after_the_time_is_over_is_a_row_that_says_so(tmp_path):
    made = bench(tmp_path)
    made.deadline = 0.0

    def late(bench):
        raise AssertionError("was run")
        yield

    made.all([late])
    assert made.rows[-1]["kernel"] == "late" and "minutes are over" in made.rows[-1]["skipped"]


def test_without_a_gpu_nothing_is_measured():
    if torch.cuda.is_available():
        pytest.skip("for a machine without a GPU")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "torch finds no GPU here" in done.stderr
