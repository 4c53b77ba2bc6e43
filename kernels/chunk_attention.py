"""The sampler's attention: a row folds the chunks (KV pages) of its context in ascending order.

Shapes: R rows, H query heads, G key/value heads, D head dim, B tokens in a page.
    partial of a chunk:  m = max s,  l = sum exp(s - m),  o = sum exp(s - m) v      over the chunk's visible keys alone
    merge(state, p):     m' = max(m, p.m),  a = exp(m - m'),  b = exp(p.m - m'),  l' = a l + b p.l,  o' = a o + b p.o
A partial never depends on other chunks, and the fold starts from the empty state, so a row gets the same bits whoever
shares its chunks and however its context was computed. Out = o / l.

Work comes as items (page, chunk, first row, last row): a page, which chunk of its rows' contexts it is, and all rows that
see it, so that it is read once for all of them. Items are listed in ascending order of chunks.
"""

from typing import NamedTuple

import torch


class Partial(NamedTuple):
    """Of some rows: max [rows, G, H/G, 1], sum [rows, G, H/G, 1] and weighted values [rows, G, H/G, D], fp32."""

    m: torch.Tensor
    l: torch.Tensor  # noqa: E741
    o: torch.Tensor


def chunk_partial(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> Partial:
    """q [rows, G, H/G, D] (already scaled) over one page: keys [G, D, B], values [G, B, D]; row i sees seen[i] slots."""
    hidden = torch.arange(keys.shape[-1], device=q.device)[None, :] >= seen[:, None]  # [rows, B]
    scores = torch.einsum("rghd,gdb->rghb", q, keys.float()).masked_fill(hidden[:, None, None, :], float("-inf"))
    m = scores.amax(dim=-1, keepdim=True)
    weights = (scores - m).exp()
    return Partial(m, weights.sum(dim=-1, keepdim=True), torch.einsum("rghb,gbd->rghd", weights, values.float()))


def merge(state: Partial, partial: Partial) -> Partial:
    """Fold one chunk into the state. The empty state, m = -inf, gives a = 0 and b = 1: the partial itself."""
    m = torch.maximum(state.m, partial.m)
    a, b = torch.exp(state.m - m), torch.exp(partial.m - m)
    return Partial(m, state.l * a + partial.l * b, state.o * a + partial.o * b)


def chunk_attention_reference(
    q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, items: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """q [R, H, D], key_pages [blocks, G, D, B], value_pages [blocks, G, B, D], items [I, 4], positions [R] -> [R, H, D] in
    q's dtype. A row at position p sees keys 0..p; slots behind the furthest row of an item are not read."""
    _, groups, dim, size = key_pages.shape
    scaled = (q.float() * dim**-0.5).view(len(q), groups, -1, dim)
    out = torch.zeros_like(scaled)
    total = out.new_zeros(*out.shape[:3], 1)
    most = torch.full_like(total, float("-inf"))
    for page, chunk, first, last in items.tolist():
        rows = slice(first, last)
        seen = (positions[rows] + 1 - chunk * size).clamp(max=size)
        read = int(seen.max())
        partial = chunk_partial(scaled[rows], key_pages[page, :, :, :read], value_pages[page, :, :read], seen)
        most[rows], total[rows], out[rows] = merge(Partial(most[rows], total[rows], out[rows]), partial)
    return (out / total).view(q.shape).to(q.dtype)
