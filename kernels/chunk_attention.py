"""The sampler's attention: a row folds the chunks (KV pages) of its context in ascending order.

Shapes: R rows, H query heads, G key/value heads, D head dim, B tokens in a page.
    partial of a chunk:  m = max s,  l = sum exp(s - m),  o = sum exp(s - m) v      over the chunk's visible keys alone
    merge(state, p):     m' = max(m, p.m),  a = exp(m - m'),  b = exp(p.m - m'),  l' = a l + b p.l,  o' = a o + b p.o
A partial never depends on other chunks, and the fold starts from the empty state, so a row gets the same bits whoever
shares its chunks and however its context was computed. Out = o / l.
"""

from typing import NamedTuple

import torch


class Partial(NamedTuple):
    """max [R, H, 1], sum [R, H, 1] and weighted values [R, H, D], fp32."""

    m: torch.Tensor
    l: torch.Tensor  # noqa: E741
    o: torch.Tensor


def chunk_partial(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor) -> Partial:
    """q [R, H, D] (already scaled), keys [R, G, D, B] and values [R, G, B, D] gathered per row, visible [R, B] bool.

    One product per row and head, of the same shape for every chunk: [R * H, 1, D] x [R * H, D, B]. A row without any
    visible key gives NaN; `merge` must not take it. Values at invisible places must be finite.
    """
    rows, heads, dim = q.shape
    groups = heads // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    size = keys.shape[-1]
    scores = torch.bmm(q.reshape(rows * heads, 1, dim), keys.reshape(rows * heads, dim, size)).view(rows, heads, size)
    scores = scores.masked_fill(~visible[:, None, :], float("-inf"))
    m = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - m)
    o = torch.bmm(weights.view(rows * heads, 1, size), values.reshape(rows * heads, size, dim))
    return Partial(m, weights.sum(dim=-1, keepdim=True), o.view(rows, heads, dim))


def merge(state: Partial | None, partial: Partial, present: torch.Tensor) -> Partial:
    """Fold one chunk into the state; `present` [R] bool: rows that have this chunk, the others keep their state.

    The empty state is None: m = -inf gives a = 0 and b = 1 exactly, so the partial itself is the result.
    """
    if state is None:
        return partial
    m = torch.maximum(state.m, partial.m)
    a, b = torch.exp(state.m - m), torch.exp(partial.m - m)
    keep = present[:, None, None]
    return Partial(
        torch.where(keep, m, state.m),
        torch.where(keep, state.l * a + partial.l * b, state.l),
        torch.where(keep, state.o * a + partial.o * b, state.o),
    )


def chunk_attention_reference(
    q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, tables: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """q [R, H, D], key_pages [blocks, G, D, B], value_pages [blocks, G, B, D], tables [R, chunks] (0: no such chunk),
    positions [R] -> [R, H, D] in q's dtype. A row at position p sees keys 0..p."""
    size = key_pages.shape[-1]
    scaled = q.float() * q.shape[-1] ** -0.5
    slot = torch.arange(size, device=q.device)
    state: Partial | None = None
    for chunk in range(tables.shape[1]):
        page = tables[:, chunk]
        visible = chunk * size + slot[None, :] <= positions[:, None]
        partial = chunk_partial(
            scaled, key_pages.index_select(0, page).float(), value_pages.index_select(0, page).float(), visible
        )
        state = merge(state, partial, visible[:, 0])
    assert state is not None, "every row has at least the chunk of its own position"
    return (state.o / state.l).to(q.dtype)
