"""The op table: for every operation its backends in order of preference, and why one does not apply.

A backend is `(name, why_not, fn)`; `why_not(device)` returns None or one sentence. `SELFREWARD_BACKEND=torch` forces the
references. `backends()` tells which one each op uses, so that a fallback can be seen and tested.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

import engine._C as _C
from engine.errors import InputError, NotBuiltError
from engine.kernels import chunk_attention as _chunk
from engine.kernels import dropout as _dropout
from engine.kernels import gumbel as _gumbel
from engine.kernels import linear as _linear
from engine.kernels import linear_logprob as _logprob
from engine.kernels import rms_norm as _rms_norm
from engine.kernels import rope as _rope
from engine.kernels import swiglu as _swiglu
from engine.kernels import tree_attention as _tree


class Backend(NamedTuple):
    name: str
    why_not: Callable[[str], str | None]
    fn: Callable[..., Any]


def _always(device: str) -> str | None:
    return None


def _native(device: str) -> str | None:
    return None if device == "cpu" else f"the native kernels run on the CPU, the tensors are on {device}"


def _native_gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, candidates: torch.Tensor, stream: int, vocab: int
) -> torch.Tensor:
    out = torch.empty(len(seeds), vocab, dtype=torch.float32)
    _C.gumbel_noise(
        seeds.numpy().view("uint64"),
        positions.numpy().astype("uint32"),
        candidates.numpy().astype("uint32"),
        stream,
        out.numpy(),
    )
    return out


def _native_dropout_mask(
    key: int, segments: torch.Tensor, positions: torch.Tensor, site: int, units: int, threshold: int
) -> torch.Tensor:
    out = torch.empty(len(segments), units, dtype=torch.bool)
    _C.dropout_mask(
        key & 0xFFFFFFFFFFFFFFFF,
        segments.numpy().view("uint64"),
        positions.numpy().astype("uint32"),
        site,
        threshold,
        out.numpy(),
    )
    return out


class PackedWeight(NamedTuple):
    """A linear's weight as `linear` wants it: panels of 64 outputs for the native backend, itself for the other."""

    weight: torch.Tensor  # [outputs, depth]
    panels: torch.Tensor | None  # [ceil(outputs / 64), depth, 64]


def _native_linear(x: torch.Tensor, packed: PackedWeight, threads: int) -> torch.Tensor:
    assert packed.panels is not None
    out = torch.empty(len(x), len(packed.weight), dtype=torch.float32)
    _C.linear(x.contiguous().numpy(), packed.panels.numpy(), out.numpy(), threads)
    return out


def _tiles_linear(x: torch.Tensor, packed: PackedWeight, threads: int) -> torch.Tensor:
    return _linear.linear_tiles(x, packed.weight)


OPS: dict[str, tuple[Backend, ...]] = {
    "rms_norm": (Backend("torch", _always, _rms_norm.rms_norm_reference),),
    "rope": (Backend("torch", _always, _rope.rope_reference),),
    "swiglu": (Backend("torch", _always, _swiglu.swiglu_reference),),
    "tree_attention": (Backend("torch", _always, _tree.tree_attention_windows),),
    "chunk_attention": (Backend("torch", _always, _chunk.chunk_attention_reference),),
    "linear_logprob": (Backend("torch", _always, _logprob.linear_logprob),),
    "linear": (
        Backend("native", _native, _native_linear),
        Backend("torch", _always, _tiles_linear),
    ),
    "gumbel_noise": (
        Backend("native", _native, _native_gumbel_noise),
        Backend("torch", _always, _gumbel.gumbel_noise_reference),
    ),
    "dropout_mask": (
        Backend("native", _native, _native_dropout_mask),
        Backend("torch", _always, _dropout.dropout_mask_reference),
    ),
}


@cache
def choose(op: str, device: str) -> Backend:
    """The first backend of `op` that applies on `device` ("cpu", "cuda"); an error with all the reasons if none does."""
    forced = os.environ.get("SELFREWARD_BACKEND")
    reasons = []
    for backend in OPS[op]:
        reason = backend.why_not(device)
        if forced and backend.name != forced:
            reason = f"SELFREWARD_BACKEND={forced}"
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise InputError(f"no backend of {op} runs on {device} ({'; '.join(reasons)})")


def backends(device: str = "cpu") -> dict[str, str]:
    """Which backend every op uses on this device."""
    return {op: choose(op, device).name for op in OPS}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., dim], weight [dim] -> [..., dim]."""
    return choose("rms_norm", x.device.type).fn(x, weight, eps)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [N, heads, D], cos and sin [N, D/2] -> [N, heads, D]."""
    return choose("rope", x.device.type).fn(x, cos, sin)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2 * ffn], gate first -> [..., ffn]."""
    return choose("swiglu", gate_up.device.type).fn(gate_up)


def tree_windows(end: torch.Tensor) -> _tree.TreeWindows:
    """What `tree_attention` needs to know of a pack, computed once for all layers. end [N] int64."""
    return _tree.tree_windows(end)


def tree_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, windows: _tree.TreeWindows) -> torch.Tensor:
    """q [N, H, D], k and v [N, G, D] -> [N, H, D]; query i sees key j iff j <= i < end[j]. Differentiable."""
    return choose("tree_attention", q.device.type).fn(q, k, v, windows)


def chunk_attention(
    q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, tables: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """q [R, H, D] over the pages of each row's context, folded in ascending order -> [R, H, D].

    key_pages [blocks, G, D, B], value_pages [blocks, G, B, D], tables [R, chunks] int64, positions [R] int64.
    """
    return choose("chunk_attention", q.device.type).fn(q, key_pages, value_pages, tables, positions)


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and the log of the softmax's sum, fp32, without holding all logits.

    hidden [N, dim], weight [vocab, dim] (the head), targets [N] int64 in [0, vocab) -> logp [N], lse [N].
    Differentiable in hidden and weight, through both outputs. Pass `hidden[edges.row]` for the edges of a pack.
    """
    return choose("linear_logprob", hidden.device.type).fn(hidden, weight, targets)


def pack_linear(weight: torch.Tensor) -> PackedWeight:
    """weight [outputs, depth] fp32, packed for `linear`: a copy of its own size where the backend is native."""
    weight = weight.detach()
    if weight.dtype != torch.float32:
        raise InputError(f"the weight of a sampler's linear is {weight.dtype}; expected torch.float32")
    if choose("linear", weight.device.type).name != "native":
        return PackedWeight(weight, None)
    outputs, depth = weight.shape
    panels = torch.empty(-(-outputs // _linear.PANEL), depth, _linear.PANEL)
    _C.linear_pack(weight.contiguous().numpy(), panels.numpy())
    return PackedWeight(weight, panels)


def linear(x: torch.Tensor, packed: PackedWeight, threads: int = 1) -> torch.Tensor:
    """x [N, depth] fp32 times the weight -> [N, outputs]. A row's bits depend neither on the other rows nor on `threads`.

    Not differentiable: for sampling. The torch backend keeps the promise under one torch thread, with bits of its own.
    """
    return choose("linear", x.device.type).fn(x, packed, threads)


def logprob_loss(hidden: torch.Tensor, weight: torch.Tensor, edges: Any, loss: Any) -> Any:
    """Loss and gradients in one pass over the head's tiles where they fit; not built yet."""
    raise NotBuiltError(
        "logprob_loss is not built yet; use loss(token_logprobs(hidden[edges.row], weight, edges.target)[0])"
    )


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, candidates: torch.Tensor, stream: int, vocab: int
) -> torch.Tensor:
    """Gumbel noise as a function of (seed, position, candidate, token, stream): three [rows] int64 -> fp32 [rows, vocab]."""
    return choose("gumbel_noise", seeds.device.type).fn(seeds, positions, candidates, stream, vocab)


def dropout_mask(
    key: int, segments: torch.Tensor, positions: torch.Tensor, site: int, units: int, rate: float
) -> torch.Tensor:
    """Which units dropout keeps, as a function of (key, segment, position, site, unit): bool [N, units], True: kept.

    segments and positions [N] int64; key the bit pattern of 64 bits as a signed int; site < 2^16; 0 <= rate < 1.
    """
    threshold = min(round(rate * 2**32), 2**32 - 1)
    return choose("dropout_mask", segments.device.type).fn(key, segments, positions, site, units, threshold)
