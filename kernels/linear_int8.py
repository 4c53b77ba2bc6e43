"""The sampler's linear with 8-bit weights, a row's bits the same for any number of rows.

Weights: one scale for each output, s_o = max |w[o, :]| / 127, q[o, k] = w[o, k] / s_o rounded to the nearest integer, ties
to even. x: one scale for each row and group of 64 along k, s_ng = max |x| / 127, q[n, k] = x[n, k] * (127 / max |x|)
rounded alike. Each operation is one of fp32. Sums of products within a group are integers, hence exact; groups are added
in ascending order with fused multiply-adds:

    total = fma(float(sum of the group's q[n, k] * q[o, k]), s_ng, total)   from total = 0
    y[n, o] = total * s_o

Magnitudes below 2^-100 at a group's or an output's largest count as zeros. A NaN or an infinity in a row of x makes this
row of y NaN; one in a weight makes its output NaN. csrc/linear_int8.cpp gives these bits with the dot instruction for
8 bits (AVX-512 or AVX VNNI), with AVX2 and portable code.

Shapes: x [N, K], weight [O, K] -> y [N, O], all fp32. Packed weight: uint8 [ceil(O / 64), 16 * ceil(K / 64), 64, 4], 128
added, and scales [64 * ceil(O / 64)].
"""

import torch

from engine.kernels.linear import PANEL, fma

GROUP = 64  # along k
LEAST = 2.0**-100


def linear_int8_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    whole, scales = quantize_weight(weight)
    total = torch.zeros(len(x), len(weight))
    for start in range(0, x.shape[1], GROUP):
        group, group_scales = quantize_group(x[:, start : start + GROUP])
        sums = group.double() @ whole[:, start : start + GROUP].double().T
        total = fma(sums.float(), group_scales[:, None], total)
    return total * scales


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [O, K] -> whole numbers [O, K] as fp32, scales [O]."""
    largest = weight.abs().amax(1)
    counts = largest >= LEAST
    whole = torch.where((counts & largest.isfinite())[:, None], (weight / (largest / 127)[:, None]).round(), 0.0)
    return whole, scale(largest)


def quantize_group(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, at most 64] -> whole numbers [N, ...] as fp32, scales [N]."""
    largest = x.abs().amax(1)
    counts = (largest >= LEAST) & largest.isfinite()
    whole = torch.where(counts[:, None], (x * (127 / largest)[:, None]).round(), 0.0)
    return whole, scale(largest)


def scale(largest: torch.Tensor) -> torch.Tensor:
    return torch.where(largest.isfinite(), torch.where(largest >= LEAST, largest / 127, 0.0), torch.nan)


def bytes(rows: int, outputs: int, depth: int) -> int:
    """Read and written once: packed weights (panels padded to 64 outputs, the depth to groups) and scales, x, y."""
    padded = -(-outputs // PANEL) * PANEL
    return padded * (-(-depth // GROUP) * GROUP + 4) + 4 * (rows * depth + rows * outputs)
