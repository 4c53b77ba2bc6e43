"""Every kernel with every dtype and configuration that ships, launched at the sizes of Llama 2 on tensors without memory.

One function an operation; it calls the operation as the engine does, forward and, where there is one, backward. `LAUNCHES`
is what `benchmarks/resources.py` compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from engine.kernels.gumbel import gumbel_noise
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.rope import rope
from engine.kernels.sample import DrawRules
from engine.kernels.sample_rows import sample_rows
from engine.kernels.swiglu import swiglu

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32)
TOKENS = 8192


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


def noise(vocab: int, dtype: torch.dtype) -> None:
    rows = meta(256, dtype=torch.int64)
    gumbel_noise(rows, rows, rows, 0, vocab)


def draws(vocab: int, dtype: torch.dtype) -> None:
    """Six labels a row, as where a judge's scores are read off, and two forbidden ids."""
    rows = 256
    ids, offsets, share = (
        meta(rows, dtype=torch.int64),
        meta(rows + 1, dtype=torch.int64),
        meta(rows, dtype=torch.float64),
    )
    forbidden, labels = meta(2 * rows, dtype=torch.int64), meta(6 * rows, dtype=torch.int64)
    rules = DrawRules(
        meta(rows, dtype=torch.float32), ids, share, share, ids, ids, ids, vocab, offsets, forbidden, offsets, labels
    )
    sample_rows(meta(rows, vocab, dtype=dtype), rules)


LAUNCHES = (
    *(Launch(f"rms_norm, dim {dim}", ALL, partial(norm, dim)) for dim in (4096, 5120, 8192)),
    *(Launch(f"rope, {heads} x {dim}", ALL, partial(rotary, heads, dim)) for heads, dim in ((32, 128), (8, 128))),
    Launch("swiglu, ffn 11008", ALL, partial(activation, 11008)),
    Launch("gumbel_noise, vocab 32000", (torch.float32,), partial(noise, 32000)),
    *(Launch(f"sample_rows, vocab {vocab}", (torch.float32,), partial(draws, vocab)) for vocab in (32000, 128256)),
)
