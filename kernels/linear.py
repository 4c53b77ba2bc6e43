"""The sampler's linear: y[n, o] = sum over k of x[n, k] * w[o, k], with a row's bits the same for any number of rows.

The order of the sums is the contract. Within each block of 256 along k: one chain of fused multiply-adds in ascending
order, from zero. Block sums are added in ascending order, each addition rounded to fp32:

    y = ((chain(0..255) + chain(256..511)) + chain(512..767)) + ...     chain: s = fma(x[n, k], w[o, k], s) from s = 0

(One chain over k = 11,008 has 5.1 times the rms error of a library's product, blocks of 256 have 0.85.) csrc/linear.cpp
does this with vector lanes over outputs; AVX-512, AVX2 and portable code and the reference here give the same bits.

Shapes: x [N, K], weight [O, K] -> y [N, O], all fp32. Packed weight: [ceil(O / 64), K, 64], panels of 64 outputs.
"""

import torch

BLOCK = 256  # along k
PANEL = 64  # outputs


def linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The contract, one k at a time: for small shapes."""
    total = torch.zeros(len(x), len(weight), dtype=torch.float32)
    for start in range(0, x.shape[1], BLOCK):
        chain = torch.zeros_like(total)
        for k in range(start, min(start + BLOCK, x.shape[1])):
            chain = fma(x[:, k, None], weight[None, :, k], chain)
        total = total + chain if start else chain
    return total


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of fp32 tensors with one rounding.

    In float64 the product is exact and the sum's rounding error is known exactly (TwoSum). Where it is not zero, the sum
    is moved to the neighbour with an odd last bit, in the direction of the error (rounding to odd): then the rounding
    to fp32, whose precision is more than two bits smaller, gives what rounding the exact sum would.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & total.isfinite() & (bits & 1 == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


def flops(rows: int, outputs: int, depth: int) -> int:
    return 2 * rows * outputs * depth


def bytes(rows: int, outputs: int, depth: int) -> int:
    """Read and written once: packed weights (panels padded to 64 outputs), x, y."""
    return 4 * (-(-outputs // PANEL) * PANEL * depth + rows * depth + rows * outputs)
