"""How a kernel's values are judged: against float64 from the same inputs, by the error that torch makes in the same dtype."""

import torch

POISON = float("nan")


def within(found: torch.Tensor, exact: torch.Tensor, torch_result: torch.Tensor, factor: float = 2.0) -> None:
    """max |found - exact| <= factor * max |torch_result - exact| + half a unit in the last place of the largest value,
    and 1e-6 for what cancels out of numbers around one. Written so that NaN fails. factor: 2 for results, 3 for gradients.
    """
    assert found.dtype == torch_result.dtype and found.shape == exact.shape == torch_result.shape
    if not exact.numel():
        return
    error = (found.double() - exact.double()).abs().max().item()
    yardstick = (torch_result.double() - exact.double()).abs().max().item()
    bound = 1e-6 + factor * yardstick + 0.5 * torch.finfo(found.dtype).eps * exact.double().abs().max().item()
    assert error <= bound, f"error {error:.3g}, torch's {yardstick:.3g}, allowed {bound:.3g}"


def gradients(fn, inputs, upstream):
    """Results and input gradients of fn(*inputs) under the given upstream gradients (one per output)."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [g.to(y.dtype) for g, y in zip(upstream, outputs)])
    return [y.detach() for y in outputs], [x.grad for x in leaves if x.requires_grad]


def check(kernel, reference, inputs, outputs=1, seed=0):
    """Values and gradients of `kernel` against `reference` in float64, with `reference` in the inputs' dtype as yardstick.

    Upstream gradients are random, some of them zero and some negative.
    """
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = reference(*wide)
    shapes = [y.shape for y in (exact if outputs > 1 else (exact,))]
    generator = torch.Generator().manual_seed(seed)
    dtype = next(x.dtype for x in inputs if x.is_floating_point())
    upstream = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    for g in upstream:
        g[torch.rand(g.shape, generator=generator) < 0.2] = 0.0
    device = inputs[0].device
    upstream = [g.to(device) for g in upstream]
    found, theirs, truth = (
        gradients(fn, given, upstream) for fn, given in ((kernel, inputs), (reference, inputs), (reference, wide))
    )
    for mine, torchs, exactly in zip(found[0], theirs[0], truth[0]):
        within(mine, exactly, torchs)
    for mine, torchs, exactly in zip(found[1], theirs[1], truth[1]):
        within(mine, exactly, torchs, factor=3.0)
