"""Precision modes: updates far below bf16's spacing are not lost, and a resume has the same bits in every mode."""

import gc
import weakref

import pytest
import torch

from engine import (
    DPOConfig,
    InputError,
    Llama,
    LlamaConfig,
    SFTConfig,
    SFTRow,
    TrainingInterrupted,
    compute_model,
    copy_in,
    reference_logprobs,
    train,
)
from engine.train import checks
from engine.train import precision as precision_module
from engine.train.adamw import StochasticAdamW
from engine.train.packs import Batch
from engine.train.precision import computing
from engine.train.trainer import _backward
from tests.engine.test_train import pairs, with_reference
from tests.engine.test_train_resume import stop_at

CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=29, max_seq_len=64
)
MODES = ("fp32", "bf16-copy", "bf16-stochastic")
BF16 = {"bf16-stochastic", "nearest"}  # modes whose parameters are bf16


@pytest.fixture(autouse=True)
def one_thread():
    """Small products, and other work on the machine's cores: threads that wait for each other take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(mode="fp32", std=0.02):
    """The same weights in every mode: numbers that bf16 holds."""
    wide = Llama(CONFIG).init_weights(seed=1, std=std)
    llama = Llama(CONFIG, torch.bfloat16 if mode in BF16 else torch.float32)
    with torch.no_grad():
        for to, of in zip(llama.parameters(), wide.parameters(), strict=True):
            to.copy_(of.bfloat16())
    llama.weights_changed()
    return llama


def rows(mode="fp32", count=8):
    return with_reference(pairs(count), reference_logprobs(compute_model(start(mode), mode), pairs(count)))


def flat(llama):
    return torch.cat([parameter.detach().double().flatten() for parameter in llama.parameters()])


def moved(mode):
    """How the weights have changed after 200 steps of DPO at lr 1e-6."""
    llama, precision = start(mode), "fp32" if mode == "nearest" else mode
    before = flat(llama)
    options = {"lr": 1e-6, "min_lr": 1e-6, "epochs": 100, "batch_size": 4, "precision": precision}
    assert train(llama, rows(precision), DPOConfig(**options)).steps == 200
    return flat(llama) - before


def test_200_dpo_steps_go_as_far_as_in_fp32_and_rounded_to_nearest_they_stay_where_they_are(monkeypatch):
    """bf16-stochastic: its noise is as long as the direction, and at a right angle to it."""
    direction = moved("fp32")
    along = lambda change: float(change @ direction / (direction @ direction))
    for mode in ("bf16-copy", "bf16-stochastic"):
        assert abs(along(moved(mode)) - 1) <= 0.1
    for module in (checks, precision_module):
        monkeypatch.setattr(module, "check_parameters", lambda *_: None)  # which refuses what comes now
    assert abs(along(moved("nearest"))) <= 0.1


@pytest.mark.parametrize("mode", MODES)
def test_dpo_lowers_the_loss_and_begins_at_ln_2(mode):
    logged = []
    config = DPOConfig(lr=1e-3, min_lr=1e-3, epochs=8, batch_size=8, precision=mode)
    train(start(mode), rows(mode), config, on_step=lambda *given: logged.append(given[2]))
    assert logged[0]["loss"] == pytest.approx(0.6931472, abs=1e-6 if mode == "fp32" else 2e-3)
    assert logged[-1]["loss"] < 0.8 * logged[0]["loss"] and logged[-1]["rewards/accuracies"] == 1.0


def trained(mode, out_dir, stops=()):
    config = DPOConfig(lr=1e-3, epochs=2, batch_size=2, precision=mode, dropout=0.1, max_pack_tokens=40, save_every=2)
    given = rows(mode), config, out_dir
    for step in stops:
        with pytest.raises(TrainingInterrupted):
            train(start(mode), *given, should_stop=stop_at(step))
    llama = start(mode)
    result = train(llama, *given)
    return [parameter.detach().clone() for parameter in llama.parameters()], result.metrics_path.read_bytes()


@pytest.mark.parametrize("mode", ["bf16-copy", "bf16-stochastic"])
def test_a_resume_has_the_bits_of_the_unbroken_run(mode, tmp_path):
    expected, found = trained(mode, tmp_path / "whole"), trained(mode, tmp_path / "broken", stops=(1, 4, 2))
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True)) and found[1] == expected[1]


@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_masked_tokens_alone_changes_nothing(mode):
    llama = start(mode)
    before = flat(llama)
    result = train(llama, [SFTRow([1, 2, 3], [4, 5, 6], [False] * 3)] * 2, SFTConfig(precision=mode, weight_decay=0.0))
    assert result.steps == 1 and torch.equal(flat(llama), before)


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), 3.0, 0.5])
def test_clipping_scales_as_torchs_does_also_where_the_norm_is_no_number(norm):
    """A NaN makes every weight one, rather than the others moving on by gradients of any size."""
    mine, theirs = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    mine.grad, theirs.grad = (torch.tensor([norm, 0, 0, 0]).bfloat16() for _ in range(2))
    optimizer = StochasticAdamW([mine], 0, 1e-3, (0.9, 0.95), 0.0)
    found, expected = optimizer.clip(1.0), torch.nn.utils.clip_grad_norm_([theirs], 1.0)
    scaled = mine.grad.float() * torch.tensor(optimizer._scale)
    torch.testing.assert_close(torch.tensor(found), expected.float(), equal_nan=True)
    torch.testing.assert_close(scaled, theirs.grad.float(), rtol=1e-2, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", ["bf16-copy", "bf16-stochastic"])
@pytest.mark.parametrize(
    "change", [{"clip": 1e-8}, {"weight_decay": 0.5}, {"betas": (0.5, 0.5)}, {"precision": "fp32"}]
)
def test_every_option_of_the_update_counts(mode, change):
    results = []
    for options in ({"precision": mode}, {"precision": mode} | change):
        llama = start(options["precision"])
        train(llama, rows(), DPOConfig(lr=1e-3, min_lr=1e-3, max_steps=2, batch_size=4, **options))
        results.append(flat(llama))
    assert not torch.equal(*results)


def test_the_seed_decides_how_writes_are_rounded():
    """One batch with all rows, so that the seed orders nothing."""
    results = []
    for seed in (0, 0, 1):
        llama = start("bf16-stochastic")
        train(
            llama,
            rows(),
            DPOConfig(lr=1e-6, min_lr=1e-6, max_steps=4, batch_size=8, seed=seed, precision="bf16-stochastic"),
        )
        results.append(flat(llama))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def gradient(llama, mode, budget):
    config = DPOConfig(batch_size=8, max_pack_tokens=budget)
    llama.zero_grad()
    with computing(llama, mode) as compute:
        assert compute is compute_model(llama, mode)
        _backward(compute, Batch.take(rows(), (), config, 0, range(8)), config)
        assert compute is llama or all(parameter.grad is None for parameter in compute.parameters())
    assert all(parameter.grad.dtype == parameter.dtype for parameter in llama.parameters())
    return torch.cat([parameter.grad.flatten() for parameter in llama.parameters()]).float()


@pytest.mark.parametrize("mode", ["bf16-copy", "bf16-stochastic"])
def test_a_gradient_is_that_of_fp32_but_for_bf16s_rounding_in_one_pack_and_in_many(mode):
    exact = gradient(start(), "fp32", 4096)
    for budget in (4096, 22):
        assert (gradient(start(mode), mode, budget) - exact).norm() <= 0.03 * exact.norm()


def test_a_copy_follows_the_weight_epoch_in_place_and_dies_with_its_model():
    llama = start()
    copy = copy_in(llama, torch.bfloat16)
    assert copy_in(llama, torch.float32) is llama
    with torch.no_grad():
        llama.embed.mul_(2.0)
    with pytest.raises(InputError, match="embed was changed in place"):
        copy_in(llama, torch.bfloat16)
    llama.weights_changed()
    assert not torch.equal(copy.embed.float(), llama.embed)
    before = copy.embed.data_ptr()
    assert copy_in(llama, torch.bfloat16) is copy and copy.embed.data_ptr() == before
    assert torch.equal(copy.embed, llama.embed.bfloat16()) and copy.weight_epoch == llama.weight_epoch
    copy.check_weights()
    gone = weakref.ref(copy)
    del copy, llama
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ("bf16", r"precision is 'bf16', and a bf16 weight of 0\.02 has a half spacing of 6e-5"),
        ("bfloat16", "would nearly all be lost: take 'bf16-stochastic'"),
        ("fp16", "precision is 'fp16'; expected one of fp32, bf16-copy, bf16-stochastic"),
        (None, "precision is None; expected"),
    ],
)
def test_other_precisions_are_refused_by_name(precision, said):
    with pytest.raises(InputError, match=said):
        SFTConfig(precision=precision)
    with pytest.raises(InputError, match=said):
        compute_model(start(), precision)


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_asks_for_no_gradient_is_refused_rather_than_trained_in_the_copy(mode):
    llama = start(mode)
    llama.embed.requires_grad_(False)
    with pytest.raises(InputError, match="embed asks for no gradient; all parameters are trained"):
        train(llama, rows(mode), DPOConfig(lr=1e-4, precision=mode, max_steps=1))


@pytest.mark.parametrize(
    ("dtype", "precision", "said"),
    [
        (torch.bfloat16, "fp32", "embed is torch.bfloat16; a bf16 weight of 0.02 has a half spacing"),
        (torch.bfloat16, "bf16-copy", "load the model as torch.float32"),
        (torch.float16, "fp32", "embed is torch.float16"),
        (torch.float32, "bf16-stochastic", "embed is torch.float32; load the model as torch.bfloat16"),
    ],
)
def test_a_model_of_another_dtype_is_refused(dtype, precision, said):
    llama = Llama(CONFIG, dtype).init_weights()
    before = llama.embed.detach().clone()
    with pytest.raises(InputError, match=said.replace(".", r"\.")):
        train(llama, [SFTRow([1, 2], [3])], SFTConfig(precision=precision))
    assert torch.equal(llama.embed, before)
