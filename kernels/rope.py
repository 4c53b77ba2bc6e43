"""Rotary position embedding in the half-split layout of HF's Llama: pair (i, i + D/2) turns by position * theta^(-2i/D).

x [rows, heads, D], cos and sin [rows, D/2] -> [rows, heads, D].
"""

import torch


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
