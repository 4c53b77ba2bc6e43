"""Every kernel with every dtype and configuration that ships, launched at the sizes of Llama 2 on tensors without memory.

One function an operation; it calls the operation as the engine does, forward and, where there is one, backward. `LAUNCHES`
is what `benchmarks/resources.py` compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from engine.kernels.adamw import AdamWStep, Place, adamw_bf16
from engine.kernels.gumbel import gumbel_noise
from engine.kernels.linear_logprob import TRITON, linear_logprob, linear_logprob_loss
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.rope import rope
from engine.kernels.rope_write import rope_write
from engine.kernels.sample import DrawRules
from engine.kernels.sample_rows import sample_rows
from engine.kernels.swiglu import swiglu
from engine.kernels.tree_attention import tree_attention, tree_tiles
from engine.kernels.work_attention import Work, work_attention

BLOCKS, PAGE = 1024, 64  # of the sampler's cache
HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32)
TOKENS = 8192
# Kernels whose products have 64 rows or more up to head dim 128: 16-bit ones are wgmma's on sm_90.
WIDE = {"_tree_forward", "_tree_backward_queries", "_tree_backward_keys"}


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
    backward(rms_norm(meta(TOKENS, dim, dtype=dtype, grad=True), meta(dim, dtype=dtype, grad=True), 1e-5))


def add_norm(dim: int, dtype: torch.dtype) -> None:
    x, branch = (meta(TOKENS, dim, dtype=dtype, grad=True) for _ in range(2))
    backward(*add_rms_norm(x, branch, meta(dim, dtype=dtype, grad=True), 1e-5))


def rotary(heads: int, dim: int, dtype: torch.dtype) -> None:
    angles = meta(TOKENS, dim // 2, dtype=torch.float32)
    backward(rope(meta(TOKENS, heads, dim, dtype=dtype, grad=True), angles, angles))


def activation(ffn: int, dtype: torch.dtype) -> None:
    backward(swiglu(meta(TOKENS, 2 * ffn, dtype=dtype, grad=True)))


def chunks(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """A sampler's layer: 256 rows, both kinds of items, partial slots."""
    rows, index = 256, torch.int32
    qkv = meta(rows, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = meta(rows, dim // 2, dtype=torch.float32)
    pages = meta(BLOCKS, kv_heads, PAGE, dim, dtype=dtype)
    slots, copies = meta(rows, dtype=torch.int64), meta(4, 3, dtype=torch.int64)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    q = rope_write(q, k, v, angles, angles, pages.transpose(-1, -2), pages, slots, copies)
    items = meta(rows, 6, dtype=index)
    work = Work(meta(8 * rows, dtype=index), items, items, meta(rows, dtype=index), meta(rows, 3, dtype=index), rows)
    work_attention(q, pages.transpose(-1, -2), pages, work)


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


def update(dtype: torch.dtype) -> None:
    weight, grad = (meta(4096, 4096, dtype=dtype) for _ in range(2))
    mean, square = (meta(4096, 4096, dtype=torch.float32) for _ in range(2))
    step = AdamWStep(0.9, 0.95, 1e-8, 1.0, 1e-6, 1.5, 1.0)
    for place in (Place(1 << 62, 3), Place(1, 1, 1)):  # Triton compiles anew for arguments that are 1
        adamw_bf16(weight, grad, mean, square, step, place)


def attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """q and k as rope leaves them, v as a view of the tensor that the fused projection made."""
    qkv = meta(TOKENS, heads + 2 * kv_heads, dim, dtype=dtype, grad=True)
    q, k = (meta(TOKENS, h, dim, dtype=dtype, grad=True) for h in (heads, kv_heads))
    tiles = tree_tiles(meta(TOKENS, dtype=torch.int64))
    backward(tree_attention(q, k, qkv.split([heads, kv_heads, kv_heads], dim=1)[2], tiles))


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
    *(Launch(f"rms_norm, dim {dim}", ALL, partial(norm, dim)) for dim in (4096, 8192)),
    *(Launch(f"add + rms_norm, dim {dim}", ALL, partial(add_norm, dim)) for dim in (4096, 5120, 8192)),
    *(Launch(f"rope, {heads} x {dim}", ALL, partial(rotary, heads, dim)) for heads, dim in ((32, 128), (8, 128))),
    *(
        Launch(f"sampler's layer, {heads}/{kv_heads} x {dim}", ALL, partial(chunks, heads, kv_heads, dim))
        for heads, kv_heads, dim in ((32, 32, 128), (64, 8, 128), (8, 1, 128), (12, 12, 64))
    ),
    Launch("swiglu, ffn 11008", ALL, partial(activation, 11008)),
    Launch("gumbel_noise, vocab 32000", (torch.float32,), partial(noise, 32000)),
    *(Launch(f"sample_rows, vocab {vocab}", (torch.float32,), partial(draws, vocab)) for vocab in (32000, 128256)),
    *(
        Launch(f"tree_attention, {heads}/{kv_heads} x {dim}", ALL, partial(attention, heads, kv_heads, dim))
        for heads, kv_heads, dim in ((32, 32, 128), (64, 8, 128), (32, 32, 64))
    ),
    Launch("tree_attention, 16/4 x 256", (torch.bfloat16, torch.float32), partial(attention, 16, 4, 256)),
    Launch("adamw_bf16", (torch.bfloat16,), update),
    *(Launch(f"linear_logprob, {dim} x {vocab}", ALL, partial(head, dim, vocab)) for dim, vocab in HEADS),
)
