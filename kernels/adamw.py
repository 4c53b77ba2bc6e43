"""AdamW of bf16 parameters, whose write is rounded stochastically: in one pass, in place.

    g = grad * scale                               (scale: what clipping leaves of the gradient)
    mean   = beta1 * mean   + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g^2
    wide   = weight * decay - rate * mean / (sqrt(square) * root + eps)
    weight = the 16 upper bits of (bits of wide + r),  r uniform in 0 .. 2^16 - 1

weight and grad bf16, mean and square fp32, everything between fp32, one IEEE rounding a step. Adding r below the bits that
are cut off rounds away from zero in just the fraction of cases by which wide exceeds the bf16 below it: the expectation
is wide, so that updates far below half a spacing (6e-5 at a weight of 0.02) are not lost but come true as often as they
should. A value that bf16 holds stays. Of what is not finite r is 0: 0x7FFFFFFF, a GPU's NaN, plus r would be -0.0.

r is a function: 16 bits of Philox-4x32-10 with key = 64 bits of (seed, step) and counter = (high half of block, number
of the parameter, low half of block, 0) where block = element // 8; element e takes the lower (even e) or upper half of
word (e % 8) // 2. `first` is the element's place in the whole parameter, so that who holds a part of it gets the bits of
the whole. csrc/adamw.cpp gives the same bits as the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .gumbel import philox, philox_reference
from .jit import jit, tl

PIECE = 1 << 18  # elements of the reference at a time: its words take 8 bytes each, and it makes a dozen arrays of them
BLOCK = 1024
_LOW = 0xFFFFFFFF


class AdamWStep(NamedTuple):
    """The numbers of one update, the same for all elements."""

    beta1: float
    beta2: float
    eps: float
    decay: float  # 1 - lr * weight_decay
    rate: float  # lr / (1 - beta1^step)
    root: float  # 1 / sqrt(1 - beta2^step)
    scale: float


class Place(NamedTuple):
    """Which elements they are: 64 bits (as signed) of (seed, step), the parameter's number, the first element's place."""

    key: int
    number: int
    first: int = 0


def adamw_bf16_reference(
    weight: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, step: AdamWStep, place: Place
) -> None:
    """weight and grad bf16, mean and square fp32, all contiguous and of one shape; all but grad are written."""
    flat = [x.view(-1) for x in (weight, grad, mean, square)]
    for start in range(0, weight.numel(), PIECE):
        w, g, m, s = (x[start : start + PIECE] for x in flat)
        _update(w, g, m, s, step, random_halves(place._replace(first=place.first + start), len(w), weight.device))


def random_halves(place: Place, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """r of `count` elements: int32 in 0 .. 2^16 - 1."""
    block = torch.arange(place.first // 8, (place.first + count + 7) // 8, device=device)
    zero = torch.zeros_like(block)
    words = philox_reference(zero + place.key, [block >> 32, zero + place.number, block & _LOW, zero])
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).view(-1)[place.first % 8 :][:count].int()


def _update(
    weight: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    step: AdamWStep,
    random: torch.Tensor,
) -> None:
    g = grad.float() * step.scale
    mean.mul_(step.beta1).add_(g * (1.0 - step.beta1))
    square.mul_(step.beta2).add_((g * g) * (1.0 - step.beta2))
    wide = weight.float() * step.decay - mean * step.rate / (square.sqrt() * step.root + step.eps)
    weight.view(torch.int16).copy_((wide.view(torch.int32) + random * wide.isfinite()) >> 16)


@jit
def _adamw_bf16(  # type: ignore[no-untyped-def]
    weight_ptr, grad_ptr, mean_ptr, square_ptr, key, number, first, count,
    beta1, rest1, beta2, rest2, eps, decay, rate, root, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight and grad as the int16 that bf16's bits are. A program's elements begin at a multiple of 8 of the parameter."""
    start = first // 8 * 8 + tl.program_id(0).to(tl.int64) * BLOCK
    block = start // 8 + tl.arange(0, BLOCK // 8)
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    zero = low ^ low
    key, number = tl.full((), key, tl.int64), tl.full((), number, tl.uint32)  # an argument that is 1 is a constant
    w0, w1, w2, w3 = philox(key, high, zero + number, low, zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    random = tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)
    at = start - first + tl.arange(0, BLOCK)
    inside = (at >= 0) & (at < count)
    g = (tl.load(grad_ptr + at, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True) * scale
    weight = (tl.load(weight_ptr + at, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0) * beta1 + g * rest1
    square = tl.load(square_ptr + at, mask=inside, other=0.0) * beta2 + (g * g) * rest2
    wide = weight * decay - tl.div_rn(mean * rate, tl.sqrt_rn(square) * root + eps)
    bits = wide.to(tl.int32, bitcast=True)
    random = tl.where((bits & 0x7F800000) == 0x7F800000, 0, random)
    tl.store(weight_ptr + at, ((bits + random) >> 16).to(tl.int16), mask=inside)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)


def adamw_bf16(
    weight: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, step: AdamWStep, place: Place
) -> None:
    """`adamw_bf16_reference` from a kernel, without fused multiply-adds, so that the bits are its too."""
    count = weight.numel()
    if count:
        grid = (-(-(place.first % 8 + count) // BLOCK),)
        _adamw_bf16[grid](
            weight.view(torch.int16), grad.view(torch.int16), mean, square,
            place.key, place.number, place.first, count,
            step.beta1, 1.0 - step.beta1, step.beta2, 1.0 - step.beta2,
            step.eps, step.decay, step.rate, step.root, step.scale,
            BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
