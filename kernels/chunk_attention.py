"""The sampler's attention: a row folds the chunks (KV pages) of its context in ascending order.

Shapes: R rows, H query heads, G key/value heads, D head dim, B tokens in a page.
    item:                (page, chunk, first, last): the rows [first, last) have this page as that chunk of their context
    partial of a chunk:  m = max s,  l = sum exp(s - m),  o = sum exp(s - m) v      over the chunk's visible keys alone
    merge(state, p):     m' = max(m, p.m),  a = exp(m - m'),  b = exp(p.m - m'),  l' = a l + b p.l,  o' = a o + b p.o
A partial never depends on other chunks, and the fold starts from the empty state, so what a row gets does not depend on
who shares its chunks or how its context was computed: how rows are grouped into items is no part of the result. The
native kernel keeps that bit for bit; here it holds to the rounding of torch's products, whose shape is the item's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Partial(NamedTuple):
    """max [G, R, H/G, 1], sum [G, R, H/G, 1] and weighted values [G, R, H/G, D], fp32."""

    m: torch.Tensor
    l: torch.Tensor  # noqa: E741
    o: torch.Tensor


def empty_state(q: torch.Tensor) -> Partial:
    """q [G, R, H/G, D] -> the state of rows that have folded nothing."""
    zero = torch.zeros_like(q[..., :1])
    return Partial(torch.full_like(zero, float("-inf")), zero, torch.zeros_like(q))


def chunk_partial(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor) -> Partial:
    """q [G, R, H/G, D] (already scaled), one page's keys [G, D, B] and values [G, B, D], visible [R, B] bool, which has
    at least one visible key in every row."""
    scores = torch.bmm(q.flatten(1, 2), keys).view(*q.shape[:3], -1)  # [G, R, H/G, B]
    scores = scores.masked_fill(~visible[:, None, :], float("-inf"))
    m = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - m)
    o = torch.bmm(weights.flatten(1, 2), values).view(q.shape)
    return Partial(m, weights.sum(dim=-1, keepdim=True), o)


def merge(state: Partial, partial: Partial) -> Partial:
    m = torch.maximum(state.m, partial.m)
    a, b = torch.exp(state.m - m), torch.exp(partial.m - m)
    return Partial(m, state.l * a + partial.l * b, state.o * a + partial.o * b)


def chunk_attention_reference(
    q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, items: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """q [R, H, D], key_pages [blocks, G, D, B], value_pages [blocks, G, B, D], items [I, 4], positions [R] -> [R, H, D]
    in q's dtype. A row at position p sees keys 0..p; the order of the items is the order of the fold, unchecked."""
    _, groups, dim, size = key_pages.shape
    scaled = (q.float() * dim**-0.5).view(len(q), groups, -1, dim).transpose(0, 1).contiguous()  # [G, R, H/G, D]
    state = empty_state(scaled)
    for page, chunk, first, last in items.tolist():
        seen = positions[first:last] + 1 - chunk * size  # of the page's slots, or more
        slots = min(size, int(seen.max()))  # what is behind them may be anything
        keys, values = key_pages[page, :, :, :slots].float(), value_pages[page, :, :slots].float()
        visible = torch.arange(slots, device=q.device) < seen[:, None]
        rows = Partial(*(x[:, first:last] for x in state))
        for old, new in zip(
            rows, merge(rows, chunk_partial(scaled[:, first:last], keys, values, visible)), strict=True
        ):
            old.copy_(new)
    return (state.o / state.l).transpose(0, 1).reshape(q.shape).to(q.dtype)
