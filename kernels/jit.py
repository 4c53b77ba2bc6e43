"""Triton where it is installed. Without it the kernels' files still import: their references need torch alone.

    jit         decorates a kernel
    tl          the language, inside kernels
    why_not()   why no kernel can run here, or None
    acc(dtype)  the type that sums are kept in: fp32, and fp64 for fp64, so that `gradcheck` can look at a kernel

Kernels keep to what Triton's interpreter and its compilers from 3.6 on agree on: raw pointers (block pointers are gone
in 3.9), no libdevice and no inline assembly, `other=` on every masked load, int64 row offsets, scalars that join a sum
through `tl.full((), x, ACC)`, every load widened before it is computed with, `input_precision="ieee"` on fp32 products
(the default is TF32). The interpreter is wrong on bf16 without saying so: bf16 is compiled here and run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def _plain(fn: Any) -> Any:
    return fn


jit: Any = triton.jit if triton else _plain


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when Triton was imported."""
    return bool(triton) and triton.knobs.runtime.interpret


def why_not(device: str) -> str | None:
    if triton is None:
        return "Triton is not installed"
    if device == "cpu" and not interpreted():
        return "Triton's kernels run on a GPU, the tensors are on cpu (TRITON_INTERPRET=1 runs them slowly, for tests)"
    return None


def acc(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def power_of_two(n: int) -> int:
    """The smallest one from n on: the shapes of tiles are powers of two."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
