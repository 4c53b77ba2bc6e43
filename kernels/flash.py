"""FlashAttention as others ship it, for packs of plain causal sequences: the same numbers as `tree_attention` to rounding.

Three calling conventions for one thing; each adapter takes q [N, H, D], k and v [N, G, D] (16-bit, on a GPU) of sequences
that lie one after the other, `bounds` int32 [S + 1] (where each begins, and N) and the longest one's length. FA2 and FA3
are asked for their deterministic backward; torch has no such argument. A tree with branches is not theirs to do:
`engine/ops.py` asks first.

| name         | from                                        | causal is written                                   |
|--------------|---------------------------------------------|-----------------------------------------------------|
| fa3          | flash_attn_interface.flash_attn_varlen_func | causal=True                                         |
| fa2          | flash_attn.flash_attn_varlen_func           | causal=True                                         |
| torch_varlen | torch.nn.attention.varlen.varlen_attn       | window_size=(-1, 0); is_causal=True where it has that |

Which one an engine takes is in `engine/ops.py`: none unless asked for. torch_varlen is slower than our kernel on an H200:
it takes 1.4 to 1.9 times as long, more where it is given K and V repeated (benchmarks/results/h200). fa2 and fa3 were
not measured beside it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def _first(result: Any) -> torch.Tensor:
    """Some versions return (out, lse), some out alone."""
    return result[0] if isinstance(result, tuple) else result


def _tri_dao(function: Any) -> Varlen:
    """FA2 and FA3 name these arguments alike."""

    def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        return _first(function(q, k, v, bounds, bounds, longest, longest, causal=True, deterministic=True))

    return varlen


def _torch_varlen(function: Any) -> Varlen:
    known = inspect.signature(function).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

    def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        if q.shape[1] == k.shape[1]:
            return _first(function(q, k, v, bounds, bounds, longest, longest, **causal))
        if "enable_gqa" in known:
            return _first(function(q, k, v, bounds, bounds, longest, longest, enable_gqa=True, **causal))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return _first(function(q, k, v, bounds, bounds, longest, longest, **causal))

    return varlen


ADAPTERS: dict[str, tuple[str, str, Callable[[Any], Varlen]]] = {
    "fa3": ("flash_attn_interface", "flash_attn_varlen_func", _tri_dao),
    "fa2": ("flash_attn", "flash_attn_varlen_func", _tri_dao),
    "torch_varlen": ("torch.nn.attention.varlen", "varlen_attn", _torch_varlen),
}


@cache
def find(name: str) -> Varlen | None:
    """The adapter of this name, or None where what it adapts is not installed."""
    module, function, adapt = ADAPTERS[name]
    try:
        return adapt(getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError):
        return None


def repeats(name: str) -> bool:
    """Whether the adapter gives every query head a copy of K and V, because what it calls knows no groups of heads."""
    module, function, adapt = ADAPTERS[name]
    known = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    return adapt is _torch_varlen and "enable_gqa" not in known


def standing(name: str) -> str:
    """Why it is not taken unasked."""
    if name == "torch_varlen":
        return "slower than the project's own kernel, 1.4 to 1.9 times its time on an H200"
    return "not measured beside the project's own kernel yet"


def why_not(name: str, device: str, dtype: torch.dtype, causal: bool) -> str | None:
    if not causal:
        return "FlashAttention knows no trees, and the pack has branches"
    if device != "cuda":
        return f"FlashAttention runs on a GPU, the tensors are on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention computes in 16 bits, the tensors are {dtype}"
    return None if find(name) else f"{ADAPTERS[name][0]} is not installed or has no {ADAPTERS[name][1]}"
