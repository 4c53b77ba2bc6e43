"""Rotary position embedding in the half-split layout of HF's Llama: pair (i, i + D/2) turns by position * theta^(-2i/D).

x [N, heads, D], cos and sin [N, D/2] (fp32) -> [N, heads, D]. A turn keeps lengths, so the backward is the turn back:
the same kernel with -sin. Computed in fp32 (fp64 for fp64 input) and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch

from .jit import acc, jit, power_of_two, tl

PAIRS = 1024  # of a program: 8 for each of 128 threads, one 16-byte access of a 16-bit type


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [N, heads, D] whose heads lie one after the other (rows may be apart), cos and sin [N, D/2] -> [N, heads, D].
    Differentiable in x."""
    return _Rope.apply(x, cos, sin)


@jit
def _rope(  # type: ignore[no-untyped-def]
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_stride, heads,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS_BLOCK: tl.constexpr, BACK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)[:, None]
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < heads) & (pair < HALF)
    cos = tl.load(cos_ptr + row * HALF + pair, mask=pair < HALF, other=0.0).to(ACC)
    sin = tl.load(sin_ptr + row * HALF + pair, mask=pair < HALF, other=0.0).to(ACC)
    if BACK:
        sin = -sin
    place = head * (2 * HALF) + pair
    first = tl.load(x_ptr + row * x_stride + place, mask=inside, other=0.0).to(ACC)
    second = tl.load(x_ptr + row * x_stride + place + HALF, mask=inside, other=0.0).to(ACC)
    dtype = out_ptr.dtype.element_ty
    out = out_ptr + row * (heads * 2 * HALF) + place
    tl.store(out, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(out + HALF, (second * cos + first * sin).to(dtype), mask=inside)


def _run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    rows, heads, dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != dim:
        x = x.contiguous()
    out = torch.empty(rows, heads, dim, dtype=x.dtype, device=x.device)
    half = dim // 2
    half_block = power_of_two(half)
    heads_block = min(power_of_two(heads), max(1, PAIRS // half_block))
    if rows:
        _rope[(rows, -(-heads // heads_block))](
            x, cos, sin, out, x.stride(0), heads,
            HALF=half, HALF_BLOCK=half_block, HEADS_BLOCK=heads_block, BACK=back, ACC=acc(x.dtype), num_warps=4,
        )  # fmt: skip
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _run(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _run(dout, cos, sin, back=True), None, None


def flops(rows: int, heads: int, dim: int) -> int:
    return 3 * rows * heads * dim


def bytes(rows: int, heads: int, dim: int, itemsize: int = 2) -> int:
    """x read and written once, one row of cos and sin for all its heads."""
    return 2 * rows * heads * dim * itemsize + 4 * rows * dim
