"""Rotary position embedding in the half-split layout of HF's Llama: pair (i, i + D/2) turns by position * theta^(-2i/D).

x [rows, heads, D], cos and sin [rows, D/2] -> [rows, heads, D].
"""

import torch


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_write_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    copies: torch.Tensor,
) -> torch.Tensor:
    """q [N, H, D], turned, is the result; k [N, G, D], turned, and v go to the slots [N] of key_pages [blocks, G, D, B]
    and value_pages [blocks, G, B, D], slot s of block b being b * B + s. Then the copies [C, 3], in their order: the
    first `tokens` slots of block `source` also go to block `target`."""
    block, slot = slots // key_pages.shape[3], slots % key_pages.shape[3]
    key_pages[block, :, :, slot] = rope_reference(k, cos, sin).to(key_pages.dtype)
    value_pages[block, :, slot] = v.to(value_pages.dtype)
    for source, target, tokens in copies.tolist():
        key_pages[target, :, :, :tokens] = key_pages[source, :, :, :tokens]
        value_pages[target, :, :tokens] = value_pages[source, :, :tokens]
    return rope_reference(q, cos, sin)
