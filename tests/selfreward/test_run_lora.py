"""The loop with a LoRA: adapters are trained, models are exported, and a stopped training ends with the same bytes."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from engine import LoRA, load_adapter, load_checkpoint
from engine.lora import PROJECTIONS
from selfreward import run as run_module
from selfreward.recipe import PACKAGE
from selfreward.recipe_training import Adapters
from tests.selfreward.test_run import UNMEASURED, command, rows

M0 = PACKAGE / "tiny/m0"
OPTIONS = [
    "lora={rank: 3, alpha: 6, targets: [q_proj, v_proj, down_proj]}",
    "sft.lr=1e-3",
    "sft.max_steps=3",
    "sft.warmup_steps=0",
    "dpo.lr=1e-3",
    "dpo.batch_size=4",
    "data.eft=null",
    "evaluation.prompts=2",
    "evaluation.judge_groups=2",
    "prompts.count=12",
]
TRAINED = ("sft", "iter_1", "iter_2")  # without judge data the SFT baseline is M1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    assert command(out, *OPTIONS) == 0
    return out


def files(out):
    """Every file's bytes, but for those with times."""
    found = [path for path in sorted(out.rglob("*")) if path.is_file()]
    timed = ("timing.jsonl", "report.json", "report.html", ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in found if path.name not in timed}


def test_every_model_is_m0_with_the_adapter_beside_it(finished):
    base = load_checkpoint(M0)
    for folder in TRAINED:
        lora = load_adapter(load_checkpoint(M0), finished / folder / "adapter")
        assert (lora.rank, lora.alpha, lora.targets) == (3, 6.0, ("q_proj", "v_proj", "down_proj"))
        exported, merged = load_checkpoint(finished / folder / "model"), lora.merged()
        for (name, one), two, of in zip(exported.named_parameters(), merged.parameters(), base.parameters()):
            assert torch.equal(one, two), name
            assert torch.equal(one, of) == (not name.endswith(("qkv", "down"))), name


def test_a_round_goes_on_with_the_adapter_of_the_one_before(finished):
    """The policy is its reference, and the model that the sampler drew from."""
    stages = json.loads((finished / "stages.json").read_text())
    assert [stages[f"{folder}/model"]["lora_rank"] for folder in TRAINED] == [3, 3, 3]
    for k in (1, 2):
        assert 0 < stages[f"iter_{k}/model"]["parity_max"] <= 2e-5
        first = rows(finished / f"iter_{k}/metrics.jsonl")[0]
        assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)  # the policy is its reference


def test_the_adapter_loads_in_peft(finished):
    peft = pytest.importorskip("peft")
    config = peft.PeftConfig.from_pretrained(str(finished / "iter_2/adapter"))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (3, 6, str(M0))
    tensors = load_file(finished / "iter_2/adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * 3  # A and B, layers, targets
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(M0, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, finished / "iter_2/adapter").merge_and_unload().state_dict()
    exported = load_file(finished / "iter_2/model/model.safetensors")
    assert exported
    for name, tensor in exported.items():
        torch.testing.assert_close(theirs[name], tensor.float(), rtol=1e-6, atol=1e-6)


def test_a_training_that_is_stopped_and_goes_on_ends_with_the_same_bytes(finished, tmp_path, monkeypatch):
    """Once in SFT, once in a round's DPO, each time after a step whose state is saved; and once before the export."""
    out = tmp_path / "run"
    for folder in ("sft", "iter_2"):
        with monkeypatch.context() as patch:
            patch.setattr(run_module.training, "train", stopping(folder))
            assert command(out, *OPTIONS) == 128 + signal.SIGTERM
        assert (out / folder / "state/state.json").exists() and not (out / folder / "model").exists()
    with monkeypatch.context() as patch:
        patch.setattr(run_module.training, "save_checkpoint", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
        assert command(out, *OPTIONS) == 2
    assert (out / "iter_2/adapter").exists() and not (out / "iter_2/model").exists()
    assert command(out, *OPTIONS) == 0
    assert files(out) == files(finished)


def stopping(folder, real=run_module.training.train):
    """`train` with a SIGTERM after the first step in this folder."""

    def train(model, data, config, out_dir, on_step, **options):
        assert isinstance(model, LoRA)

        def after(step, steps, metrics):
            on_step(step, steps, metrics)
            if out_dir.name == folder and step == 1:
                signal.raise_signal(signal.SIGTERM)

        return real(model, data, config, out_dir, on_step=after, **options)

    return train


def test_an_adapter_that_is_gone_is_named(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "iter_1/adapter")
    assert command(out, *OPTIONS) == 2
    err = capsys.readouterr().err.strip()
    assert "iter_1/adapter is missing; the finished stage 'iter_1/model' wrote it" in err and len(err.splitlines()) == 1


def test_a_bf16_base_is_computed_in_and_exported(tmp_path):
    """From a given M1, whose round is the first training."""
    out = tmp_path / "run"
    assert command(out, *OPTIONS, "model=null", f"m1={M0}", "rounds=1", "lora.base=bf16", *UNMEASURED) == 0
    exported = load_file(out / "iter_1/model/model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    adapter = load_file(out / "iter_1/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert 2e-5 < json.loads((out / "stages.json").read_text())["iter_1/model"]["parity_max"] < 0.1


def test_a_rank_above_the_models_dim_is_one_sentence_before_anything_is_computed(tmp_path, capsys):
    assert command(tmp_path / "run", "lora.rank=5000") == 2
    err = capsys.readouterr().err.strip()
    assert "lora.rank is 5000, above the model's dim (" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_recipes_projections_are_the_engines():
    assert tuple(Adapters().targets) == PROJECTIONS


def test_the_weights_that_measured_best_are_kept(tmp_path):
    """At this rate the third step of SFT is worse than the second."""
    options = ["rounds=1", "keep_best={share: 0.2, every: 1}", "sft.lr=0.03", "sft.min_lr=0.03"]
    assert command(tmp_path / "run", *OPTIONS, *UNMEASURED, *options) == 0
    stages = json.loads((tmp_path / "run/stages.json").read_text())
    sft, last = stages["sft/model"], stages["iter_1/model"]
    assert sft["rows"] + sft["held_out"] == sft["ift"] and sft["held_out"] == 5  # of 24
    measured = [row["eval_loss"] for row in rows(tmp_path / "run/sft/metrics.jsonl")]
    assert sft["best_step"] == 1 + measured.index(min(measured)) < len(measured) == 3
    assert last["held_out"] == max(1, round(0.2 * last["pairs"])) and 1 <= last["best_step"] <= last["steps"]
