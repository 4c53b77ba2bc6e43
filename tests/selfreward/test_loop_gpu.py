"""The loop on a GPU, where its own packages are installed: the engine's tests need none of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
LITTLE = ["prompts.count=24", "data.eft_limit=12", "eft.required=false", "gates.min_pairs=1"]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("more", [[], ["lora={rank: 8, base: bf16}", "sft.lr=1e-3", "dpo.lr=1e-3"]])
def test_the_loop_runs_on_a_gpu(more: list[str], tmp_path: Path) -> None:
    for package in ("pydantic", "rapidfuzz", "jinja2", "yaml", "rich", "matplotlib"):
        pytest.importorskip(package, reason=f"the loop needs {package}, which the engine does not")
    from selfreward.run import main

    out = tmp_path / "run"
    words = ["--recipe", "micro", "--quiet", "--out", str(out), "device=cuda", *LITTLE, *more]
    assert main(words) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["gpu"] == torch.cuda.get_device_name() and "triton" in set(manifest["backends"].values())
    assert [row["name"] for row in json.loads((out / "report.json").read_text())["models"]] == [
        "M0",
        "SFT",
        "M1",
        "M2",
        "M3",
    ]
    assert main(words) == 0  # resumed, finished
