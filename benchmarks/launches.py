"""Every kernel with every dtype and configuration that ships, launched at the sizes of Llama 2 on tensors without memory.

One function an operation; it calls the operation as the engine does, forward and, where there is one, backward. `LAUNCHES`
is what `benchmarks/resources.py` compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.rope import rope
from engine.kernels.swiglu import swiglu
from engine.kernels.tree_attention import tree_attention, tree_tiles

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


def attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """q and k as rope leaves them, v as a view of the tensor that the fused projection made."""
    qkv = meta(TOKENS, heads + 2 * kv_heads, dim, dtype=dtype, grad=True)
    q, k = (meta(TOKENS, h, dim, dtype=dtype, grad=True) for h in (heads, kv_heads))
    tiles = tree_tiles(meta(TOKENS, dtype=torch.int64))
    backward(tree_attention(q, k, qkv.split([heads, kv_heads, kv_heads], dim=1)[2], tiles))


LAUNCHES = (
    *(Launch(f"rms_norm, dim {dim}", ALL, partial(norm, dim)) for dim in (4096, 5120, 8192)),
    *(Launch(f"rope, {heads} x {dim}", ALL, partial(rotary, heads, dim)) for heads, dim in ((32, 128), (8, 128))),
    Launch("swiglu, ffn 11008", ALL, partial(activation, 11008)),
    *(
        Launch(f"tree_attention, {heads}/{kv_heads} x {dim}", ALL, partial(attention, heads, kv_heads, dim))
        for heads, kv_heads, dim in ((32, 32, 128), (64, 8, 128), (32, 32, 64))
    ),
    Launch("tree_attention, 16/4 x 256", (torch.bfloat16, torch.float32), partial(attention, 16, 4, 256)),
)
