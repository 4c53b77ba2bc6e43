"""`python -m benchmarks.lora [--model 7B] [--json FILE]`: steps of a whole Llama 2 by LoRA on a GPU, with random weights.

What docs/recipes.md counts with: tokens a second of SFT, of DPO and of the reference's log-probs, and the peak of memory, with
activations kept and made again. Values of the recipe llama2-7b; rows are 30 tokens of a prompt and 300 of each answer. --smoke
runs the same at toy size on this machine, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from engine import PRESETS, DPOConfig, DPORow, Llama, LlamaConfig, LoRA, SFTConfig, SFTRow, reference_logprobs, train

PROMPT, ANSWER = 30, 300  # tokens, as docs/recipes.md counts
BATCH, STEPS = 16, 5  # pairs or examples a step; the first step is not counted: it compiles
SMALL = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16, ffn_dim=96, vocab_size=128, max_seq_len=1024
)


@torch.no_grad()
def random_llama(config: LlamaConfig, device: str) -> Llama:
    """In bf16, made where it is used: drawing 7 billion numbers on a CPU takes minutes."""
    model = Llama(config, torch.bfloat16, device)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.normal_(0, 0.02)
    model.weights_changed()
    return model


def steps(model: Llama, rows: list[Any], config: SFTConfig) -> dict[str, float]:
    """Seconds of a step (median) and GB at the peak, of a fresh adapter."""
    device = model.embed.device.type
    ends: list[float] = []

    def on_step(step: int, of: int, metrics: Any) -> None:
        _wait(device)
        ends.append(time.perf_counter())

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train(LoRA(model, 16, 32.0), rows, config, on_step=on_step)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return {
        "seconds": statistics.median(b - a for a, b in pairwise(ends)),
        "peak_gb": round(peak, 2),
    }


def measure(config: LlamaConfig, device: str) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    model = random_llama(config, device)

    def ids(count: int) -> list[int]:
        return torch.randint(3, config.vocab_size, (count,), generator=generator).tolist()

    sft = [SFTRow(ids(PROMPT), ids(ANSWER)) for _ in range(BATCH * STEPS)]
    dpo = [DPORow(ids(PROMPT), ids(ANSWER), ids(ANSWER)) for _ in range(BATCH * STEPS)]
    reference_logprobs(model, dpo[:BATCH], 4096)  # compiles
    _wait(device)
    started = time.perf_counter()
    values = reference_logprobs(model, dpo, 4096)
    _wait(device)
    pair = PROMPT + 2 * ANSWER
    yield {"what": "reference", "tokens_per_second": round(len(dpo) * pair / (time.perf_counter() - started))}
    referenced = [replace(row, reference=value) for row, value in zip(dpo, values, strict=True)]
    for kept in ("none", "full"):
        common: dict[str, Any] = {
            "batch_size": BATCH,
            "max_pack_tokens": 4096,
            "dropout": 0.1,
            "lr": 1e-5,
            "min_lr": 1e-6,
        }
        options = common | {"activation_checkpointing": kept}
        for what, rows, config_of, tokens in (
            ("SFT", sft, SFTConfig(**options), PROMPT + ANSWER),
            ("DPO", referenced, DPOConfig(**options), pair),
        ):
            found = steps(model, rows, config_of)
            rate = round(BATCH * tokens / found["seconds"])
            yield {"what": what, "activation_checkpointing": kept, "tokens_per_second": rate, **found}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__)
    parser.add_argument("--model", choices=sorted(PRESETS), default="7B")
    parser.add_argument("--smoke", action="store_true", help="toy size, on this machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record goes")
    given = parser.parse_args(arguments)
    if not given.smoke and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --smoke runs it at toy size on a CPU")
    device = "cuda" if torch.cuda.is_available() and not given.smoke else "cpu"
    rows = []
    for row in measure(SMALL if given.smoke else PRESETS[given.model], device):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if given.json:
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        command = f"python -m benchmarks.lora --model {given.model}"
        record = {"device": name, "torch": torch.__version__, "model": given.model, "command": command, "rows": rows}
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
