"""A training step of the model on the GPU's kernels against torch's: the same loss and gradients. In Triton's interpreter
without a GPU."""

import pytest
import torch

from engine import DPOConfig, ops, train
from engine.train.batches import DPORow
from engine.train.trainer import pack_logprobs, reference_logprobs
from engine.tree import TokenTree
from tests.engine.helpers import random_llama, small_config

pytestmark = pytest.mark.gpu_too

GPU = torch.cuda.is_available()
CONFIG = small_config(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48)
ROWS = [DPORow([3, 4, 5], [6, 7], [8, 9, 10]), DPORow([11], [12, 13], [14])]


@pytest.fixture
def backend(monkeypatch):
    def use(name):
        monkeypatch.setenv("SELFREWARD_BACKEND", name)
        ops.choose.cache_clear()

    yield use
    ops.choose.cache_clear()


def gradients(name, backend, trees):
    backend(name)
    model = random_llama(CONFIG, seed=1).to("cuda" if GPU else "cpu")
    (pack,) = TokenTree.pack(trees, 999)
    pack = pack.to(model.embed.device)
    logp = pack_logprobs(model, pack)
    (logp * torch.linspace(-1, 2, len(logp), device=logp.device)).sum().backward()
    used = {op: ops.choose(op, model.embed.device.type).name for op in ("rms_norm", "add_rms_norm", "rope", "swiglu")}
    assert set(used.values()) == {name}
    return logp.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("branches", [True, False], ids=["trees", "chains"])
def test_loss_and_every_gradient_are_torchs(branches, backend):
    answers = [TokenTree([6, 7, 8], weight=1.0), TokenTree([9, 10], weight=1.0, sequence=1)][: 1 + branches]
    trees = [TokenTree([3, 4, 5], children=tuple(answers)), TokenTree([20, 21, 22, 23], weight=1.0, sequence=2)]
    logp, found = gradients("triton", backend, trees)
    expected, theirs = gradients("torch", backend, trees)
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=2e-5)
    for name, gradient in found.items():
        bound = 1e-4 * max(1.0, theirs[name].abs().max().item())
        assert (gradient - theirs[name]).abs().max().item() <= bound, name


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="atomics are a GPU's")
def test_two_trainings_have_the_same_bits():
    rows = [DPORow([3] * 40, [6, 7] * 20, [8, 9, 10] * 15, reference=(-1.0, -1.0))] * 8
    found = []
    for _ in range(2):
        model = random_llama(CONFIG, seed=1).to("cuda")
        train(model, rows, DPOConfig(lr=1e-3, min_lr=1e-3, batch_size=8, epochs=3))
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_reference_log_probs_are_the_policys_numbers(backend):
    backend("triton")
    model = random_llama(CONFIG, seed=1).to("cuda" if GPU else "cpu")
    found = reference_logprobs(model, ROWS)
    assert found == reference_logprobs(model, ROWS)
    backend("torch")
    expected = reference_logprobs(random_llama(CONFIG, seed=1), ROWS)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
