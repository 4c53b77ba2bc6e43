"""The native CPU kernels as differentiable functions of fp32 tensors: what the trainer computes with on a CPU.

Every one gives the same bits with and without gradients and for any number of threads (torch's number is taken), and
keeps for its backward what it was given, not what it made on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

import engine._C as _C


def array(x: torch.Tensor) -> Any:
    """As numpy has it, bf16 as its bits; copied if it is not contiguous. Called some 400 times a step of 12 layers, so
    nothing without need: with detach() and contiguous() always, such a step of a tiny model took 1.67 ms instead of 1.47."""
    return view(x if x.is_contiguous() else x.contiguous())


def view(x: torch.Tensor) -> Any:
    """As `array`, but never a copy: for what is written, and rows that lie apart."""
    if x.requires_grad:
        x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a [rows, depth] @ b [depth, columns], each of them or its transpose contiguous in its rows; added to `out`, if
    there is one. Not differentiable."""
    add = out is not None
    if out is None:
        out = torch.empty(len(a), b.shape[1])
    _C.product(_matrix(a), _matrix(b), view(out), add, torch.get_num_threads())
    return out


def dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [N, in], weight [out, in] -> x @ weight.T [N, out]. Differentiable."""
    return _Dense.apply(x, weight)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        return product(dy, weight) if for_x else None, product(dy.T, x) if for_weight else None


def _matrix(x: torch.Tensor) -> Any:
    rows, columns = x.stride()
    by_rows = columns == 1 and rows >= x.shape[1]
    by_columns = rows == 1 and columns >= x.shape[0]
    return view(x if by_rows or by_columns else x.contiguous())
