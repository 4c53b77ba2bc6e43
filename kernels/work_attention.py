"""Chunk attention on a GPU: the fold of `chunk_attention.py` over a list of work of fixed size.

An item of work is a run of consecutive chunks for some neighbouring rows, which all have these pages there; a program
takes it for one key/value head, with the query heads of that group beside each other in the tile, and reads each page
once for all of them. A run that begins at chunk 0 keeps the fold in registers and stores one state at its end, or, where
that is the rows' whole context, the result itself. Any other run stores a partial per chunk, because to fold a later run
first would be another association; `_merge_slots` then folds a row's slots in ascending order.

Two variants of one kernel: wide tiles (prompts: 64 rows of one sequence) and narrow ones (decoding: 16; of each chunk all
rows see something). A row's bits depend on the variant, not on which rows share its tile, on how runs are cut or on
padding. Lists may be longer than what they hold: an item without rows ends at once, so that a CUDA graph can be replayed
with other work.

Decoding is bound by bytes: every page once for the rows that share it, and (D + 2) fp32 for each slot, written and read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .chunk_attention import chunk_attention_reference
from .jit import jit, power_of_two, tl

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), which is one instruction
NARROW, WIDE = 16, 64  # rows times query heads of a group: the smallest tile of a tensor core, and of wgmma


class Work(NamedTuple):
    """What a step's rows attend to, for all layers. int32 tensors, made by `engine/work.py`.

    Items [I, 6]: place of its first page in `pages`, chunks, first chunk, first row, rows (0: no item), and 1 where the
    run is the whole context of its rows. fold [R, 3]: base, so that the state of chunks .. c of a row, or the partial of
    chunk c, is in slot base + c; the first slot to fold; how many (0: the row's result was stored at once).
    """

    pages: torch.Tensor  # [P]
    wide: torch.Tensor  # [I, 6]
    narrow: torch.Tensor  # [I, 6]
    positions: torch.Tensor  # [R]
    fold: torch.Tensor  # [R, 3]
    slots: int  # how many there is room for


def tiles(dtype: torch.dtype) -> tuple[int, int]:
    """Of wide and narrow items. fp32 is for comparisons: 64 rows of it would spill."""
    return (NARROW if dtype == torch.float32 else WIDE), NARROW


def tile_rows(heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[int, int]:
    """How many rows a wide and a narrow item may have."""
    wide, narrow = (max(1, tile // (heads // kv_heads)) for tile in tiles(dtype))
    return wide, narrow


def work_attention(q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, work: Work) -> torch.Tensor:
    """q [R, H, D], key_pages [blocks, G, D, B] and value_pages [blocks, G, B, D] with any strides -> [R, H, D].

    Slots of pages that no row of an item sees may hold anything. Rows that are in no item get no result.
    """
    rows, heads, dim = q.shape
    q = q if q.stride()[1:] == (dim, 1) else q.contiguous()
    out = torch.empty(rows, heads, dim, dtype=q.dtype, device=q.device)
    kept = torch.empty(work.slots, heads, dim, dtype=torch.float32, device=q.device)  # o of every slot
    scales = torch.empty(work.slots, heads, 2, dtype=torch.float32, device=q.device)  # m and l of every slot
    kv_heads, page = key_pages.shape[1], key_pages.shape[3]
    for items, tile in zip((work.wide, work.narrow), tiles(q.dtype), strict=True):
        if len(items):
            warps, stages = config(tile, q.dtype)
            _fold_items[(len(items), kv_heads)](
                q, key_pages, value_pages, work.pages, items, work.positions, work.fold, out, kept, scales,
                q.stride(0), *key_pages.stride(), *value_pages.stride(), dim**-0.5 * LOG2_E,
                HEADS=heads, GROUP=heads // kv_heads, D=dim, BLOCK_D=max(16, power_of_two(dim)),
                PAGE=page, BLOCK_P=max(16, page), TILE=max(tile, power_of_two(heads // kv_heads)),
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
    if work.slots and rows:
        block = min(8, power_of_two(heads))
        _merge_slots[(rows, -(-heads // block))](
            work.fold, kept, scales, out,
            HEADS=heads, BLOCK_H=block, D=dim, BLOCK_D=max(16, power_of_two(dim)), num_warps=4,
        )  # fmt: skip
    return out


def work_attention_reference(
    q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, work: Work
) -> torch.Tensor:
    """The items' chunks folded one after the other, as `chunk_attention_reference` folds a CPU's items."""
    page_tokens = key_pages.shape[3]
    items = [item for item in (*work.wide.tolist(), *work.narrow.tolist()) if item[4]]
    chunks = []
    for place, count, first, row, rows, _ in items:
        for c, page in enumerate(work.pages[place : place + count].tolist()):
            sees = work.positions[row : row + rows] >= (first + c) * page_tokens  # the last rows of a tile at least
            start = row + int((~sees).sum())
            chunks.append((page, first + c, start, row + rows))
    ordered = torch.tensor(sorted(chunks, key=lambda chunk: chunk[1]), dtype=torch.int64).view(-1, 4)
    used = int(ordered[:, 3].max()) if len(ordered) else 0  # rows behind are padding
    out = torch.zeros_like(q)
    out[:used] = chunk_attention_reference(q[:used], key_pages, value_pages, ordered, work.positions[:used].long())
    return out


def config(tile: int, dtype: torch.dtype) -> tuple[int, int]:
    """Warps and stages: the fewest warps that spill nothing (a thread holds two accumulators: the fold's and the chunk's).
    Of three stages the first loads page numbers, so one chunk is on its way while another is computed; with two programs
    of 32 KB a chunk on a multiprocessor that is twice what the memory's latency asks for."""
    if dtype == torch.float32:
        return 8, 2
    return (8, 3) if tile == WIDE else (4, 3)


@jit
def _merge(m, l, o, m_new, l_new, o_new):  # type: ignore[no-untyped-def]  # noqa: E741
    """Fold one more partial into a state; explicit multiply-adds, so that it rounds alike wherever it stands. A partial of
    nothing (m_new -inf) changes nothing; the empty state (m -inf) becomes the partial."""
    top = tl.maximum(m, m_new)
    safe = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp2(m - safe), tl.exp2(m_new - safe)
    return top, tl.fma(a, l, b * l_new), tl.fma(a[:, None], o, b[:, None] * o_new)


@jit
def _fold_items(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, pages_ptr, items_ptr, positions_ptr, fold_ptr, out_ptr, kept_ptr, scales_ptr,
    q_row, k_block, k_head, k_dim, k_slot, v_block, v_head, v_slot, v_dim, scale2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    item_ptr = items_ptr + tl.program_id(0).to(tl.int64) * 6
    rows = tl.load(item_ptr + 4)
    if rows > 0:
        kv_head = tl.program_id(1)
        place, chunks, first = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
        first_row, whole = tl.load(item_ptr + 3), tl.load(item_ptr + 5)
        lane = tl.arange(0, TILE)
        inside = lane // GROUP < rows
        row = (first_row + lane // GROUP).to(tl.int64)
        head = kv_head * GROUP + lane % GROUP
        position = tl.load(positions_ptr + row, mask=inside, other=-1)
        last = tl.max(position, axis=0)
        base = tl.load(fold_ptr + row * 3, mask=inside, other=0)
        column = tl.arange(0, BLOCK_D)
        slot = tl.arange(0, BLOCK_P)
        here = inside[:, None] & (column[None, :] < D)
        q = tl.load(q_ptr + (row * q_row + head * D)[:, None] + column[None, :], mask=here, other=0.0)
        m = tl.full((TILE,), float("-inf"), tl.float32)
        l = tl.zeros((TILE,), tl.float32)  # noqa: E741
        o = tl.zeros((TILE, BLOCK_D), tl.float32)
        k_tile = k_ptr + kv_head * k_head + column[:, None] * k_dim + slot[None, :] * k_slot
        v_tile = v_ptr + kv_head * v_head + slot[:, None] * v_slot + column[None, :] * v_dim
        for c in range(0, chunks):
            page = tl.load(pages_ptr + place + c).to(tl.int64)
            token = (first + c) * PAGE + slot
            seen = (token <= last) & (slot < PAGE)  # by some row; what is behind may be anything, NaN too
            k = tl.load(k_tile + page * k_block, mask=(column[:, None] < D) & seen[None, :], other=0.0)
            v = tl.load(v_tile + page * v_block, mask=seen[:, None] & (column[None, :] < D), other=0.0)
            s = tl.dot(q, k, input_precision="ieee") * scale2
            s = tl.where((token[None, :] <= position[:, None]) & (slot[None, :] < PAGE), s, float("-inf"))
            m_new = tl.max(s, axis=1)
            p = tl.exp2(s - tl.where(m_new == float("-inf"), 0.0, m_new)[:, None])
            l_new = tl.sum(p, axis=1)
            o_new = tl.dot(p.to(v.dtype), v, input_precision="ieee")
            if first > 0:
                slots = (base + first + c).to(tl.int64) * HEADS + head
                _keep(kept_ptr, scales_ptr, slots, inside, m_new, l_new, o_new, D, BLOCK_D)
            else:
                m, l, o = _merge(m, l, o, m_new, l_new, o_new)  # noqa: E741
        if first == 0:
            if whole != 0:
                result = o / tl.where(inside, l, 1.0)[:, None]
                place_out = (row * HEADS + head) * D
                tl.store(out_ptr + place_out[:, None] + column[None, :], result.to(out_ptr.dtype.element_ty), mask=here)
            else:
                _keep(
                    kept_ptr, scales_ptr, (base + chunks - 1).to(tl.int64) * HEADS + head, inside, m, l, o, D, BLOCK_D
                )


@jit
def _keep(kept_ptr, scales_ptr, slots, mine, m, l, o, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
    column = tl.arange(0, BLOCK_D)[None, :]
    tl.store(kept_ptr + slots[:, None] * D + column, o, mask=mine[:, None] & (column < D))
    tl.store(scales_ptr + slots * 2, m, mask=mine)
    tl.store(scales_ptr + slots * 2 + 1, l, mask=mine)


@jit
def _merge_slots(  # type: ignore[no-untyped-def]
    fold_ptr, kept_ptr, scales_ptr, out_ptr,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(fold_ptr + row * 3 + 2)
    if count > 0:
        first = tl.load(fold_ptr + row * 3 + 1)
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        column = tl.arange(0, BLOCK_D)[None, :]
        mine = head < HEADS
        here = mine[:, None] & (column < D)
        m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK_H,), tl.float32)  # noqa: E741
        o = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        for number in range(0, count):
            slots = (first + number).to(tl.int64) * HEADS + head
            o_new = tl.load(kept_ptr + slots[:, None] * D + column, mask=here, other=0.0)
            m_new = tl.load(scales_ptr + slots * 2, mask=mine, other=float("-inf"))
            l_new = tl.load(scales_ptr + slots * 2 + 1, mask=mine, other=0.0)
            m, l, o = _merge(m, l, o, m_new, l_new, o_new)  # noqa: E741
        result = (o / tl.where(mine, l, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * HEADS + head)[:, None] * D + column, result, mask=here)


def flops(pairs: int, heads: int, dim: int) -> int:
    """pairs: of a row and a key that it sees."""
    return 4 * pairs * heads * dim


def bytes(tokens_read: int, rows: int, slots: int, heads: int, kv_heads: int, dim: int, itemsize: int = 2) -> int:
    """tokens_read: keys of all items, each once for the rows that share it; slots: states and partials, written and read."""
    pages = 2 * tokens_read * kv_heads * dim * itemsize
    return pages + 2 * rows * heads * dim * itemsize + 2 * 4 * slots * heads * (dim + 2)
