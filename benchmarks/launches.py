"""Every kernel with every dtype and configuration that ships, launched at the sizes of Llama 2 on tensors without memory.

One function an operation; it calls the operation as the engine does, forward and, where there is one, backward. `LAUNCHES`
is what `benchmarks/resources.py` compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from engine.kernels.linear_logprob import TRITON, linear_logprob, linear_logprob_loss
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.rope import rope
from engine.kernels.swiglu import swiglu

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32)
TOKENS = 8192
HEADS = ((4096, 32000), (8192, 32000), (4096, 32001))  # 7B, 70B, and a vocabulary that fits no tile


class Launch(NamedTuple):
    name: str
    dtypes: tuple[torch.dtype, ...]
    run: Callable[[torch.dtype], object]


def meta(*shape: int, dtype: torch.dtype, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


def norm(dim: int, dtype: torch.dtype) -> None:
    x, weight = meta(TOKENS, dim, dtype=dtype, grad=True), meta(dim, dtype=dtype, grad=True)
    backward(rms_norm(x, weight, 1e-5))
    backward(*add_rms_norm(x, meta(TOKENS, dim, dtype=dtype, grad=True), weight, 1e-5))


def rotary(heads: int, dim: int, dtype: torch.dtype) -> None:
    angles = meta(TOKENS, dim // 2, dtype=torch.float32)
    backward(rope(meta(TOKENS, heads, dim, dtype=dtype, grad=True), angles, angles))


def activation(ffn: int, dtype: torch.dtype) -> None:
    backward(swiglu(meta(TOKENS, 2 * ffn, dtype=dtype, grad=True)))


def head(dim: int, vocab: int, dtype: torch.dtype) -> None:
    """Recompute, then one pass with all logits held and one pass without."""
    weight = meta(vocab, dim, dtype=dtype, grad=True)
    for rows, one_pass in ((TOKENS, False), (1024, True), (TOKENS, True)):
        hidden, targets = meta(rows, dim, dtype=dtype, grad=True), meta(rows, dtype=torch.int64)
        if one_pass:
            backward(linear_logprob_loss(hidden, weight, targets, lambda logp: (logp.sum(), {}), True, TRITON)[0])
        else:
            backward(*linear_logprob(hidden, weight, targets, TRITON))


LAUNCHES = (
    *(Launch(f"rms_norm, dim {dim}", ALL, partial(norm, dim)) for dim in (4096, 5120, 8192)),
    *(Launch(f"rope, {heads} x {dim}", ALL, partial(rotary, heads, dim)) for heads, dim in ((32, 128), (8, 128))),
    Launch("swiglu, ffn 11008", ALL, partial(activation, 11008)),
    *(Launch(f"linear_logprob, {dim} x {vocab}", ALL, partial(head, dim, vocab)) for dim, vocab in HEADS),
)
