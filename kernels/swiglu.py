"""SwiGLU: silu(gate) * up, on the fused projection.

gate_up [N, 2 * ffn], gate first -> [N, ffn]. silu is rounded to the dtype before the product, as in HF's Llama.
Backward, with s = sigmoid(gate): dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * silu(gate). Nothing but gate_up
is kept for it: silu is cheaper to make again than to read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .jit import acc, jit, tl

BLOCK = 1024  # columns of a program: 8 for each of 128 threads, one 16-byte access of a 16-bit type


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [N, 2 * ffn] -> [N, ffn]. Differentiable."""
    return _SwiGLU.apply(gate_up)


@jit
def _swiglu_forward(gate_up_ptr, out_ptr, ffn, BLOCK: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ffn
    gate = tl.load(gate_up_ptr + row * 2 * ffn + column, mask=inside, other=0.0).to(ACC)
    up = tl.load(gate_up_ptr + row * 2 * ffn + ffn + column, mask=inside, other=0.0).to(ACC)
    dtype = out_ptr.dtype.element_ty
    silu = (gate * _sigmoid(gate)).to(dtype).to(ACC)
    tl.store(out_ptr + row * ffn + column, (silu * up).to(dtype), mask=inside)


@jit
def _swiglu_backward(gate_up_ptr, dout_ptr, dgate_up_ptr, ffn, BLOCK: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ffn
    gate = tl.load(gate_up_ptr + row * 2 * ffn + column, mask=inside, other=0.0).to(ACC)
    up = tl.load(gate_up_ptr + row * 2 * ffn + ffn + column, mask=inside, other=0.0).to(ACC)
    dout = tl.load(dout_ptr + row * ffn + column, mask=inside, other=0.0).to(ACC)
    s = _sigmoid(gate)
    dtype = dgate_up_ptr.dtype.element_ty
    dgate = dout * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dgate_up_ptr + row * 2 * ffn + column, dgate.to(dtype), mask=inside)
    tl.store(dgate_up_ptr + row * 2 * ffn + ffn + column, (dout * gate * s).to(dtype), mask=inside)


@jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """exp of a number that is not positive, so that fp64 and fp32 alike cannot overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


def _grid(rows: int, ffn: int) -> tuple[int, int]:
    return rows, -(-ffn // BLOCK)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        rows, ffn = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty(rows, ffn, dtype=gate_up.dtype, device=gate_up.device)
        if rows:
            _swiglu_forward[_grid(rows, ffn)](gate_up, out, ffn, BLOCK=BLOCK, ACC=acc(out.dtype), num_warps=4)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        rows, ffn = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty_like(gate_up)
        if rows:
            _swiglu_backward[_grid(rows, ffn)](
                gate_up, dout.contiguous(), out, ffn, BLOCK=BLOCK, ACC=acc(out.dtype), num_warps=4
            )
        return out


def flops(rows: int, ffn: int, backward: bool = False) -> int:
    return rows * ffn * (12 if backward else 6)


def bytes(rows: int, ffn: int, itemsize: int = 2, backward: bool = False) -> int:
    """Read and written once: gate, up and the result; backward gate, up, dy and both gradients."""
    return (5 if backward else 3) * rows * ffn * itemsize
