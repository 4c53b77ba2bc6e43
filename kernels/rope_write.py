"""RoPE and the writing of keys and values to their pages, in one pass: what a forward of the sampler does before attention.

q [N, H, D] is turned and returned; k [N, G, D], turned, and v [N, G, D] go to slots of key_pages [blocks, G, D, B] and
value_pages [blocks, G, B, D]; then heads of blocks are copied for sequences that fork inside a block.
"""

from __future__ import annotations

import torch

from .rope import rope_reference


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
