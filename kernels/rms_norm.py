"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, alone or behind the addition that a residual stream makes.

x [N, dim], weight [dim] -> y [N, dim] in x's dtype. Statistics in fp32 (fp64 for fp64 input); the normalised value n is
rounded to x's dtype *before* the product with the weight, which is where HF's LlamaRMSNorm rounds. Backward, with
g = dy * weight and scale = 1 / sqrt(mean(x^2) + eps):

    dx = scale * (g - n * mean(g * n)),   dweight = sum over rows of dy * n

A row is one program's: it is read once. dweight is summed in registers by PARTS programs over every PARTS-th row, then
over the parts in order: no atomics, so the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch

from .jit import acc, jit, power_of_two, tl

PARTS = 256  # of dweight: two for each of the 132 multiprocessors of an H100 would be 264; a power of two sums evenly


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + branch
    return total, rms_norm_reference(total, weight, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [N, dim], weight [dim], of one dtype -> [N, dim]. Differentiable."""
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and branch [N, dim] -> their sum, rounded to x's dtype, and its norm. One pass: the sum is not read back."""
    total, normed = _AddRMSNorm.apply(x, branch, weight, eps)
    return total, normed


@jit
def _rms_norm_forward(  # type: ignore[no-untyped-def]
    x_ptr, branch_ptr, weight_ptr, total_ptr, y_ptr, scale_ptr, dim, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    place = row * dim + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)
    if ADD:
        x += tl.load(branch_ptr + place, mask=inside, other=0.0).to(ACC)
        x = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, x, mask=inside)
        x = x.to(ACC)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / dim + tl.full((), eps, ACC))
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
    n = (x * scale).to(y_ptr.dtype.element_ty).to(ACC)
    tl.store(y_ptr + place, (n * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


@jit
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, scale_ptr, dy_ptr, dtotal_ptr, dx_ptr, dweight_ptr, rows, dim,
    ADD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC)
    dweight = tl.zeros((BLOCK,), ACC)
    for row in range(part, rows, tl.num_programs(0)):
        place = row * dim + column  # int64, as `part` is
        scale = tl.load(scale_ptr + row).to(ACC)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(ACC)
        exact = x * scale
        dweight += dy * exact.to(dx_ptr.dtype.element_ty).to(ACC)
        g = dy * weight
        dx = scale * (g - exact * (tl.sum(g * exact, axis=0) / dim))
        if ADD:
            dx += tl.load(dtotal_ptr + place, mask=inside, other=0.0).to(ACC)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + part * dim + column, dweight, mask=inside)


def _warps(block: int) -> int:
    """16 elements of a row for a thread: at fp32 sums that is 16 registers for each array of the backward."""
    return max(1, min(16, block // 512))


def _run_forward(x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, eps: float) -> list[torch.Tensor]:
    """-> sum (x itself where nothing is added), norm, scale [N]."""
    rows, dim = x.shape
    total = x if branch is None else torch.empty_like(x)
    y = torch.empty_like(x)
    scale = torch.empty(rows, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    block = power_of_two(dim)
    if rows:
        _rms_norm_forward[(rows,)](
            x, x if branch is None else branch, weight, total, y, scale, dim, eps,
            ADD=branch is not None, BLOCK=block, ACC=acc(x.dtype), num_warps=_warps(block),
        )  # fmt: skip
    return [total, y, scale]


def _run_backward(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dy: torch.Tensor, dtotal: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, dim = x.shape
    dx = torch.empty_like(x)
    parts = min(rows, PARTS)
    dweight = torch.empty(parts, dim, dtype=scale.dtype, device=x.device)
    block = power_of_two(dim)
    if rows:
        _rms_norm_backward[(parts,)](
            x, weight, scale, dy, dy if dtotal is None else dtotal, dx, dweight, rows, dim,
            ADD=dtotal is not None, BLOCK=block, ACC=acc(x.dtype), num_warps=_warps(block),
        )  # fmt: skip
    return dx, dweight.sum(dim=0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = x.contiguous()
        _, y, scale = _run_forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        return *_run_backward(x, weight, scale, dy.contiguous(), None), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, y, scale = _run_forward(x.contiguous(), branch.contiguous(), weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return total, y

    @staticmethod
    def backward(
        ctx: Any, dtotal: torch.Tensor, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        total, weight, scale = ctx.saved_tensors
        dx, dweight = _run_backward(total, weight, scale, dy.contiguous(), dtotal.contiguous())
        return dx, dx, dweight, None


def flops(rows: int, dim: int, backward: bool = False) -> int:
    return rows * dim * (9 if backward else 4)


def bytes(rows: int, dim: int, itemsize: int = 2, add: bool = False, backward: bool = False) -> int:
    """Read and written once: x, y (and branch, sum); backward x, dy, dx (and the sum's gradient), scale, the parts."""
    tensors = 3 if backward else 2
    tensors += (1 if backward else 2) if add else 0
    parts = 2 * 4 * min(rows, PARTS) * dim if backward else 0
    return tensors * rows * dim * itemsize + rows * 4 + dim * itemsize + parts
