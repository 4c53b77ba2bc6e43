"""RoPE, and the write of keys and values into their pages, in one pass: the sampler's way into attention.

Shapes: N rows, H query heads, G key/value heads, D head dim, B tokens in a page.
slots [N]: block * B + slot, where a row's turned key and its value go; rows may name one slot only with the same content.
copies [C, 3]: (source block, target block, tokens): after all writes the first slots of source also stand in target.
"""

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
    """q [N, H, D], k and v [N, G, D], cos and sin [N, D/2], key_pages [blocks, G, D, B], value_pages [blocks, G, B, D]
    (both written) -> q turned [N, H, D]."""
    size = key_pages.shape[-1]
    block, slot = slots // size, slots % size
    key_pages[block, :, :, slot] = rope_reference(k, cos, sin).to(key_pages.dtype)
    value_pages[block, :, slot] = v.to(value_pages.dtype)
    for source, target, tokens in copies.tolist():
        key_pages[target, :, :, :tokens] = key_pages[source, :, :, :tokens]
        value_pages[target, :, :tokens] = value_pages[source, :, :tokens]
    return rope_reference(q, cos, sin)
