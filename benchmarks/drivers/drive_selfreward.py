"""This project's engine, under the same conditions as its peers: a process, a core or two, a model read from disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from protocol import Generate, Workload, serve


def load(settings: dict[str, Any]) -> tuple[str, Any, Generate]:
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the tree that this file is in
    import torch

    torch.set_num_threads(settings["threads"])
    from engine import LLM, SamplingParams

    quantized = settings["format"] == "int8"
    llm = LLM(
        settings["model"],
        device="cpu",
        dtype="auto" if quantized else settings["format"],
        quantization="int8" if quantized else None,
        kv_cache_gb=2.0,
    )

    def generate(workload: Workload) -> list[list[list[int]]]:
        params = [
            SamplingParams(
                n=workload["n"],
                temperature=workload["temperature"],
                top_p=workload["top_p"],
                max_tokens=workload["max_tokens"],
                ignore_eos=True,
                seed=workload["seed"] + number,
            )
            for number in range(len(workload["prompts"]))
        ]
        outputs = llm.generate(workload["prompts"], params)
        return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]

    return f"on torch {torch.__version__}", llm.reset_prefix_cache, generate


if __name__ == "__main__":
    serve(load)
