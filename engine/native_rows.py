"""The native CPU kernels of the sampler's forward, and those that draw and update, as functions of tensors: what their
entries in `engine/ops.py` call. None is differentiable; the ops say what they compute and promise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import engine._C as _C
from engine.kernels import linear as _linear
from engine.kernels import linear_int8 as _linear_int8
from engine.kernels.adamw import AdamWStep, Place
from engine.kernels.sample import DrawRules, Draws
from engine.native import array, view


class _Rows(threading.local):
    """Where the native kernels of the sampler's forward write their rows."""

    empty: Callable[[Sequence[int]], torch.Tensor] = staticmethod(partial(torch.empty, dtype=torch.float32))


_rows = _Rows()


@contextmanager
def rows_from(empty: Callable[[Sequence[int]], torch.Tensor]) -> Iterator[None]:
    """In this thread, the memory of those rows is what `empty(shape)` returns, fp32 and contiguous."""
    before, _rows.empty = _rows.empty, empty
    try:
        yield
    finally:
        _rows.empty = before


class PackedWeight(NamedTuple):
    """A linear's weight as its op wants it: panels of 64 outputs for the native backends, itself for the references."""

    op: str  # "linear", "linear_bf16" or "linear_int8"
    outputs: int
    weight: torch.Tensor | None  # [outputs, depth]; None: only the panels are there
    panels: NDArray[Any] | None  # [ceil(outputs / 64), ...], as csrc/linear.h has them
    scales: NDArray[np.float32] | None = None  # [ceil(outputs / 64) * 64], of int8

    def bytes(self) -> int:
        return sum(x.nbytes for x in (self.panels, self.scales) if x is not None)


def gumbel_noise(
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


def dropout_mask(
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


def adamw_bf16(
    weight: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, step: AdamWStep, place: Place
) -> None:
    w, g, m, s = (view(x.view(-1)) for x in (weight, grad, mean, square))
    _C.adamw_bf16(
        w, g, m, s, place.key & 0xFFFFFFFFFFFFFFFF, place.number, place.first,
        step.beta1, 1.0 - step.beta1, step.beta2, 1.0 - step.beta2,
        step.eps, step.decay, step.rate, step.root, step.scale, torch.get_num_threads(),
    )  # fmt: skip


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, threads: int) -> torch.Tensor:
    out = _rows.empty(x.shape)
    _C.rms_norm(array(x), array(weight), eps, out.numpy(), threads)
    return out


def add_rms_norm(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float, threads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    total, out = _rows.empty(x.shape), _rows.empty(x.shape)
    _C.add_rms_norm(array(x), array(branch), array(weight), eps, total.numpy(), out.numpy(), threads)
    return total, out


def embed(tokens: torch.Tensor, table: torch.Tensor, threads: int) -> torch.Tensor:
    out = _rows.empty((len(tokens), table.shape[1]))
    _C.embed(array(tokens), array(table), out.numpy(), threads)
    return out


def swiglu(gate_up: torch.Tensor, threads: int) -> torch.Tensor:
    rows, width = gate_up.shape
    out = _rows.empty((rows, width // 2))
    _C.swiglu(array(gate_up), out.numpy(), threads)
    return out


def chunk_attention(
    q: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    items: torch.Tensor,
    positions: torch.Tensor,
    threads: int,
) -> torch.Tensor:
    out = _rows.empty(q.shape)
    pages = view(key_pages), view(value_pages)  # not contiguous is an error
    _C.chunk_attention(array(q), *pages, array(items), array(positions), out.numpy(), threads)
    return out


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    copies: torch.Tensor,
    threads: int,
) -> torch.Tensor:
    out = _rows.empty(q.shape)
    rows = view(q), view(k), view(v)  # views of one tensor: only rows are contiguous
    pages = view(key_pages), view(value_pages)
    _C.rope_write(*rows, array(cos), array(sin), *pages, array(slots), array(copies), out.numpy(), threads)
    return out


def sample(logits: torch.Tensor, rules: DrawRules, threads: int) -> Draws:
    rows = len(logits)
    raw, sampled, labels = (torch.empty(n, dtype=torch.float32) for n in (rows, rows, len(rules.label_ids)))
    draws = Draws(torch.empty(rows, dtype=torch.int64), raw, sampled, labels)
    columns: Any = {name: value if name == "vocab" else array(value) for name, value in rules._asdict().items()}
    columns.update((name, value.numpy()) for name, value in draws._asdict().items())
    _C.sample(array(logits), threads=threads, **columns)
    return draws


def linear(x: torch.Tensor, packed: PackedWeight, threads: int) -> torch.Tensor:
    assert packed.panels is not None
    out = _rows.empty((len(x), packed.outputs))
    _C.linear(array(x), packed.panels, out.numpy(), threads)
    return out


def linear_bf16(x: torch.Tensor, packed: PackedWeight, threads: int) -> torch.Tensor:
    assert packed.panels is not None
    out = _rows.empty((len(x), packed.outputs))
    _C.linear_bf16(array(x), packed.panels, out.numpy(), threads)
    return out


def linear_int8(x: torch.Tensor, packed: PackedWeight, threads: int) -> torch.Tensor:
    assert packed.panels is not None and packed.scales is not None
    out = _rows.empty((len(x), packed.outputs))
    _C.linear_int8(array(x), packed.panels, packed.scales, out.numpy(), threads)
    return out


def panels(op: str, outputs: int, depth: int) -> PackedWeight:
    """Empty ones."""
    count = -(-outputs // _linear.PANEL)
    panels: NDArray[Any]
    scales = None
    if op == "linear":
        panels = np.empty((count, depth, _linear.PANEL), np.float32)
    elif op == "linear_bf16":
        panels = np.empty((count, -(-depth // 2), _linear.PANEL, 2), np.uint16)
    else:
        padded = -(-depth // _linear_int8.GROUP) * _linear_int8.GROUP
        panels = np.empty((count, padded // 4, _linear.PANEL, 4), np.uint8)
        scales = np.empty(count * _linear.PANEL, np.float32)
    panels[-1].fill(0)  # what stands behind the last output is not used, but a subnormal number there would take time
    return PackedWeight(op, outputs, None, panels, scales)


def repack_linear(packed: PackedWeight, weight: torch.Tensor, first: int = 0) -> None:
    """Replace the outputs from `first` on by weight [rows, depth] of any floating-point dtype."""
    assert packed.panels is not None
    panels = packed.panels
    if packed.op == "linear_bf16":
        _C.linear_pack_bf16(array(weight.to(torch.bfloat16)), panels, first)
    elif packed.op == "linear":
        _C.linear_pack(array(weight.float()), panels, first)
    else:
        assert packed.scales is not None
        _C.linear_pack_int8(array(weight.float()), panels, packed.scales, first)
