"""The tiled log-prob op against all logits at once, with gradients through both outputs."""

import pytest
import torch

from engine.kernels.linear_logprob import TorchTiles, linear_logprob, linear_logprob_reference


def inputs(rows, dim, vocab, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64) * dim**-0.5
    targets = torch.randint(vocab, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def gradients(fn, hidden, weight, targets, up_logp, up_lse):
    logp, lse = fn(hidden, weight, targets)
    return torch.autograd.grad((logp * up_logp).sum() + (lse * up_lse).sum(), (hidden, weight))


@pytest.mark.parametrize(("rows", "vocab"), [(1, 7), (37, 111), (130, 1000)])
def test_float64_gradients_pass_gradcheck_or_equal_autograd(rows, vocab):
    hidden, weight, targets = inputs(rows, 8, vocab, torch.float64)
    up = torch.randn(2, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    up[0, ::3] = 0.0  # masked rows
    tiled = gradients(lambda *a: linear_logprob(*a, TorchTiles(16 * vocab * 8)), hidden, weight, targets, *up)
    plain = gradients(linear_logprob_reference, hidden, weight, targets, *up)
    for ours, theirs in zip(tiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_gradcheck_in_float64():
    hidden, weight, targets = inputs(5, 4, 9, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_eager_in_the_same_dtype(dtype):
    hidden, weight, targets = inputs(200, 64, 500, dtype)
    exact = linear_logprob_reference(hidden.double(), weight.double(), targets)[0]
    eager = torch.log_softmax((hidden.float() @ weight.float().T), -1).gather(1, targets[:, None]).squeeze(1)
    ours = linear_logprob(hidden, weight, targets, TorchTiles(16 * 500 * 4))[0]
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-7


def test_large_logits_do_not_overflow():
    hidden, weight, targets = inputs(20, 16, 50, torch.float32)
    logp, lse = linear_logprob(hidden * 1e4, weight, targets)
    exact, _ = linear_logprob_reference((hidden * 1e4).double(), weight.double(), targets)
    assert torch.isfinite(lse).all()
    torch.testing.assert_close(logp.double(), exact, rtol=1e-5, atol=1e-2)
