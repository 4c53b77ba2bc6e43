"""The sampler's linear with bf16 weights: y[n, o] = sum over k of bf16(x[n, k]) * w[o, k], fp32 sums, a row's bits the same
for any number of rows.

The order is that of the CPU's dot instruction for bf16, which multiplies pairs. x is rounded to bf16 (nearest, ties to
even). A product of two bf16 is exact in fp32. Within each block of 256 along k: one chain from zero over the pairs
(k, k + 1) in ascending order, the odd product first, each addition rounded to fp32 as a fused multiply-add rounds it; an
odd K is padded with a zero. Block sums are added in ascending order:

    y = (chain(0..255) + chain(256..511)) + ...
    chain: s = fma(x[n, k + 1], w[o, k + 1], s), then s = fma(x[n, k], w[o, k], s), from s = 0

Subnormal numbers (below 2^-126 in magnitude) count as zero, as inputs and as results, everywhere: the instruction does
not know them. csrc/linear_bf16.cpp gives these bits with the instruction, with AVX-512, AVX2 and portable code.

Shapes: x [N, K] fp32, weight [O, K] bf16 -> y [N, O] fp32. Packed weight: [ceil(O / 64), ceil(K / 2), 64, 2].
"""

import torch
import torch.nn.functional as F

from engine.kernels.linear import BLOCK, PANEL, fma


def linear_bf16_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The contract, one k at a time: for small shapes."""
    odd = x.shape[1] % 2
    x, weight = flush(F.pad(x.bfloat16().float(), (0, odd))), flush(F.pad(weight.float(), (0, odd)))
    total = torch.zeros(len(x), len(weight), dtype=torch.float32)
    for start in range(0, x.shape[1], BLOCK):
        chain = torch.zeros_like(total)
        for pair in range(start, min(start + BLOCK, x.shape[1]), 2):
            for k in (pair + 1, pair):
                chain = flush(fma(x[:, k, None], weight[None, :, k], chain))
        total = flush(total + chain) if start else chain
    return total


def flush(x: torch.Tensor) -> torch.Tensor:
    """Subnormal numbers made zero, signs kept."""
    return torch.where(x.abs() < 2.0**-126, x * 0, x)


def bytes(rows: int, outputs: int, depth: int) -> int:
    """Read and written once: packed weights (panels padded to 64 outputs), x, y."""
    return 2 * (-(-outputs // PANEL) * PANEL * (depth + depth % 2)) + 4 * (rows * depth + rows * outputs)
