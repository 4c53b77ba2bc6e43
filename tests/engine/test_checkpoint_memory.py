"""Loading needs no second copy of the weights, whatever the layout.

Measured is the peak of *all* resident memory of a process of its own (VmHWM): anonymous memory and also the pages of
mapped files, although the system could take those back at any time. What import and a first small load need is taken
off. (ru_maxrss would not do: it starts with what the parent process had when it forked.)
"""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint import save_checkpoint
from tests.engine.helpers import random_llama, small_config
from tests.engine.meta_layout import save_meta

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")

MEASURE = """
import sys
from engine import content_hash, load_checkpoint, save_checkpoint

def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

small, large, what = sys.argv[1:]
load_checkpoint(small)
before = resident("VmRSS:")
if what == "hash":
    content_hash(large)
else:
    model = load_checkpoint(large, dtype=None)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert resident("RssAnon:") >= weights  # what is measured is there
if what == "save":
    save_checkpoint(model, large + "-again")
print(resident("VmHWM:") - before)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories by layout of one model of 308 MB, the largest tensor a tenth of it."""
    root = tmp_path_factory.mktemp("memory")
    save_checkpoint(random_llama(small_config()), root / "small")
    sizes = {"dim": 1024, "n_layers": 5, "n_heads": 16, "n_kv_heads": 16, "head_dim": 64, "ffn_dim": 2816}
    config = small_config(**sizes, vocab_size=8000)
    model = random_llama(config)
    save_checkpoint(model, root / "single")
    save_checkpoint(model, root / "sharded", max_shard_bytes=50 << 20)
    tensors = load_file(root / "single" / "model.safetensors")
    for count in (1, 2, 8):
        save_meta(tensors, config, root / f"meta-{count}", count)
    save_checkpoint(model.to(torch.bfloat16), root / "bf16")
    return root, config.n_parameters


def peak(models, layout, what):
    """Peak memory in units of the weights."""
    root, parameters = models
    weights = (2 if layout == "bf16" else 4) * parameters
    command = [sys.executable, "-c", MEASURE, str(root / "small"), str(root / layout), what]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / weights


@LINUX
@pytest.mark.full
@pytest.mark.parametrize("layout", ["single", "sharded", "meta-1", "meta-2", "meta-8", "bf16"])
def test_loading_peaks_under_1_2_times_the_weights(models, layout):
    found = peak(models, layout, "load")
    print(f"{layout}: {found:.3f}")
    assert 1.0 <= found <= 1.2


@LINUX
@pytest.mark.full
def test_saving_needs_no_second_copy(models):
    found = peak(models, "single", "save")
    print(f"save: {found:.3f}")
    assert 1.0 <= found <= 1.2


@LINUX
@pytest.mark.full
@pytest.mark.parametrize("layout", ["single", "meta-8"])
def test_hashing_holds_one_tensor_and_little_of_the_files(models, layout):
    found = peak(models, layout, "hash")
    print(f"{layout}: {found:.3f}")
    assert 0.05 <= found <= 0.3
