"""The README's example runs as it stands."""

import re
from pathlib import Path


def test_the_embedding_example_runs():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    before, after = names["outputs"][0].outputs[0], names["again"][0].outputs[0]
    assert after.weight_epoch == before.weight_epoch + 1
    assert after.logprobs != before.logprobs


MARK = "Not yet run on hardware"


def test_the_gpu_path_is_marked_as_not_run_on_hardware_until_a_result_exists():
    root = Path(__file__).parent.parent
    results = [path for path in (root / "benchmarks" / "results").rglob("*.json*") if path.parent.name[:1] == "h"]
    for page in ("README.md", "docs/kernels.md"):
        assert (MARK in (root / page).read_text()) == (not results), page
