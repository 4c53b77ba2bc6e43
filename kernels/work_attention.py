"""Chunk attention on a GPU: the fold of `chunk_attention.py` over a list of work of fixed size.

An item of work is a run of consecutive chunks for some neighbouring rows, which all have these pages there; a program
takes it for one key/value head, with the query heads of that group beside each other in the tile, and reads each page
once for all of them. A run that begins at chunk 0 keeps the fold in registers and stores one state at its end, or, where
that is the rows' whole context, the result itself. Any other run stores a partial per chunk, because to fold a later run
first would be another association; `_merge_slots` then folds a row's slots in ascending order.

Two variants of one kernel: wide tiles (prompts: 128 rows of one sequence) and narrow ones (decoding: 16; of each chunk all
rows see something). Page numbers are known a chunk ahead, so that the loads from a page need not wait for its number. A
row's bits depend on the variant, not on which rows share its tile, on how runs are cut or on padding. Lists may be longer
than what they hold: an item without rows ends at once, so that a CUDA graph can be replayed with other work.

Decoding is bound by bytes: every page once for the rows that share it, and (D + 2) fp32 for each slot, written and read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .chunk_attention import chunk_attention_reference
from .jit import jit, power_of_two, tl

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), which is one instruction


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


class Tile(NamedTuple):
    """One variant of the kernel: M rows of its products, which are `rows` rows times the query heads of a group."""

    m: int
    rows: int
    warps: int
    stages: int


def tiles(heads_per_group: int, block: int, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """The wide and the narrow variant, for pages of `block` tokens. A chunk's sums and the state that it is folded into are
    2 * M * D fp32 registers, its scores another M * B: at D = 128, B = 64 and M = 128 they fill what 8 warps have without
    spilling. fp32 products are FMAs of registers, which hold less. Narrow is the smallest product there is (more where a
    group has more heads); its three stages keep two chunks under way, 64 KB at D = 128, for each of the two programs that
    a multiprocessor then holds."""
    small = block <= 64
    if dtype == torch.float32:
        wide, narrow = ((32, 16, 2), (16, 8, 3)) if small else ((16, 8, 2), (16, 8, 2))
    else:
        wide, narrow = (128, 8, 3) if small else (32, 8, 2), (16, 4, 3)
    least = power_of_two(heads_per_group)

    def tile(m: int, warps: int, stages: int) -> Tile:
        m = max(m, least)
        return Tile(m, m // heads_per_group, warps, stages)

    return tile(*wide), tile(*narrow)


def work_attention(q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, work: Work) -> torch.Tensor:
    """q [R, H, D], key_pages [blocks, G, D, B] and value_pages [blocks, G, B, D] (any strides, a value's last one
    excepted, which is 1) -> [R, H, D].

    Slots of pages that no row of an item sees may hold anything. Rows that are in no item get no result. Nothing here
    depends on what the work list holds, only on its shapes.
    """
    rows, heads, dim = q.shape
    groups, size = key_pages.shape[1], key_pages.shape[3]
    q = q.contiguous()
    out = torch.empty_like(q)
    maxima, sums = (torch.empty(work.slots, heads, dtype=torch.float32, device=q.device) for _ in range(2))
    weighted = torch.empty(work.slots, heads, dim, dtype=torch.float32, device=q.device)
    variants = tiles(heads // groups, size, q.dtype)
    for items, tile, wide in zip((work.wide, work.narrow), variants, (True, False), strict=True):
        if len(items):
            _fold_items[(len(items) * groups,)](
                q, key_pages, value_pages, out, maxima, sums, weighted,
                items, work.pages, work.positions, work.fold,
                *key_pages.stride(), *value_pages.stride()[:3], LOG2_E * dim**-0.5,
                GROUPS=groups, HEADS=heads // groups, D=dim, B=size,
                M=tile.m, BLOCK_D=max(16, power_of_two(dim)), BLOCK_B=max(16, size), WIDE=wide,
                PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
                num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
            )  # fmt: skip
    if rows and work.slots:
        block_d = max(16, power_of_two(dim))
        block_h = min(power_of_two(heads), max(1, 512 // block_d))
        _merge_slots[(rows, -(-heads // block_h))](
            work.fold, maxima, sums, weighted, out,
            H=heads, D=dim, BLOCK_H=block_h, BLOCK_D=block_d, AHEAD=8, num_warps=4, enable_fp_fusion=False,
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


@jit
def _load(at, inside, MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    if MASK:
        x = tl.load(at, mask=inside, other=0.0)
    else:
        x = tl.load(at)
    return x


@jit
def _empty(M: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M, D), tl.float32)


@jit
def merge(m, z, o, pm, pz, po):  # type: ignore[no-untyped-def]
    """The state (m, z, o), where z is the l above, with one more partial. Every rounding is written out, and the kernels
    are compiled without fusing others, so the bits are the same wherever this is inlined. A partial of nothing, (-inf, 0,
    0), changes nothing."""
    new = tl.maximum(m, pm)
    base = tl.where(new == float("-inf"), 0.0, new)
    a = tl.exp2(m - base)
    b = tl.exp2(pm - base)
    return new, tl.fma(a, z, b * pz), tl.fma(a[:, None], o, b[:, None] * po)


@jit
def _partial(  # type: ignore[no-untyped-def]
    q, key_at, value_at, slot, seen, last, scale,
    MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q [M, D], pointers to a page's keys [D, B] and values [B, D] -> m [M], z [M], o [M, D]; maxima count powers of two.
    MASK: each of the M sees its first `seen` slots, nobody more than `last`: those behind may hold anything, NaN too."""
    d = tl.arange(0, BLOCK_D)
    behind = MASK or D != BLOCK_D
    k = _load(key_at, (d[:, None] < D) & (slot[None, :] < last), behind)
    v = _load(value_at, (slot[:, None] < last) & (d[None, :] < D), behind)
    s = tl.dot(q, k, input_precision=PRECISION)
    if MASK:
        s = tl.where(slot[None, :] < seen[:, None], s, float("-inf"))
    m = tl.max(s, axis=1) * scale
    base = tl.where(m == float("-inf"), 0.0, m)
    p = tl.exp2(tl.fma(s, scale, -base[:, None]))
    return m, tl.sum(p, axis=1), tl.dot(p.to(v.dtype), v, input_precision=PRECISION)


@jit
def _fold_items(  # type: ignore[no-untyped-def]
    q_ptr, key_ptr, value_ptr, out_ptr, max_ptr, sum_ptr, weighted_ptr,
    items_ptr, pages_ptr, positions_ptr, fold_ptr,
    key_page, key_group, key_d, key_slot, value_page, value_group, value_slot, scale,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
    M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One item for one group: the M are its rows times HEADS, the group's query heads."""
    item = items_ptr + tl.program_id(0) // GROUPS * 6
    group = tl.program_id(0) % GROUPS
    rows = tl.load(item + 4)
    if rows == 0:
        return
    chunks = tl.load(item + 1)
    chunk = tl.load(item + 2)
    pages = pages_ptr + tl.load(item)
    number = tl.arange(0, M)
    d = tl.arange(0, BLOCK_D)
    slot = tl.arange(0, BLOCK_B)
    mine = number // HEADS < rows
    row = tl.load(item + 3) + number // HEADS
    head = group * HEADS + number % HEADS
    seen = tl.load(positions_ptr + row, mask=mine, other=-1) + 1 - chunk * B  # from the item's first chunk on
    last = tl.max(seen, axis=0)
    inside = mine[:, None] & (d < D)[None, :]
    place = (row.to(tl.int64) * (GROUPS * HEADS) + head)[:, None] * D + d[None, :]
    q = tl.load(q_ptr + place, mask=inside, other=0.0)
    key_at = key_ptr + group.to(tl.int64) * key_group + (d[:, None] * key_d + slot[None, :] * key_slot)
    value_at = value_ptr + group.to(tl.int64) * value_group + (slot[:, None] * value_slot + d[None, :])
    page = tl.load(pages).to(tl.int64)  # always known a chunk ahead, so that the loads from it need not wait
    if chunk == 0:
        m, z, o = _empty(M, BLOCK_D)
        full = 0
        if WIDE and B == BLOCK_B:  # the chunks that all rows see whole
            full = tl.minimum(tl.min(tl.where(mine, seen, B * chunks), axis=0) // B, chunks)
            for i in range(0, full):
                pm, pz, po = _partial(
                    q, key_at + page * key_page, value_at + page * value_page, slot, seen, last, scale,
                    False, D, BLOCK_D, PRECISION,
                )  # fmt: skip
                m, z, o = merge(m, z, o, pm, pz, po)
                page = tl.load(pages + tl.minimum(i + 1, chunks - 1)).to(tl.int64)
        for i in range(full, chunks):
            pm, pz, po = _partial(
                q, key_at + page * key_page, value_at + page * value_page, slot,
                tl.minimum(seen - i * B, B), tl.minimum(last - i * B, B), scale, True, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            m, z, o = merge(m, z, o, pm, pz, po)
            page = tl.load(pages + tl.minimum(i + 1, chunks - 1)).to(tl.int64)
        if tl.load(item + 5) != 0:
            tl.store(out_ptr + place, (o / z[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
        else:
            at = (tl.load(fold_ptr + row * 3, mask=mine, other=0) + chunks - 1).to(tl.int64) * (GROUPS * HEADS) + head
            tl.store(max_ptr + at, m, mask=mine)
            tl.store(sum_ptr + at, z, mask=mine)
            tl.store(weighted_ptr + at[:, None] * D + d[None, :], o, mask=inside)
    else:
        base = tl.load(fold_ptr + row * 3, mask=mine, other=0) + chunk
        for i in range(0, chunks):
            pm, pz, po = _partial(
                q, key_at + page * key_page, value_at + page * value_page, slot,
                tl.minimum(seen - i * B, B), tl.minimum(last - i * B, B), scale, True, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            page = tl.load(pages + tl.minimum(i + 1, chunks - 1)).to(tl.int64)
            at = (base + i).to(tl.int64) * (GROUPS * HEADS) + head
            sees = seen > i * B
            tl.store(max_ptr + at, pm, mask=sees)
            tl.store(sum_ptr + at, pz, mask=sees)
            tl.store(weighted_ptr + at[:, None] * D + d[None, :], po, mask=sees[:, None] & (d < D)[None, :])


@jit
def _merge_slots(  # type: ignore[no-untyped-def]
    fold_ptr, max_ptr, sum_ptr, weighted_ptr, out_ptr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Folds a row's slots, for some of its heads; AHEAD of them are on their way."""
    row = tl.program_id(0)
    count = tl.load(fold_ptr + row * 3 + 2)
    if count == 0:
        return
    first = tl.load(fold_ptr + row * 3 + 1)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    inside = (head < H)[:, None] & (d < D)[None, :]
    m, z, o = _empty(BLOCK_H, BLOCK_D)
    for i in tl.range(0, count, num_stages=AHEAD + 1):
        at = (first + i).to(tl.int64) * H + head
        pm = tl.load(max_ptr + at, mask=head < H, other=0.0)
        pz = tl.load(sum_ptr + at, mask=head < H, other=0.0)
        po = tl.load(weighted_ptr + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        m, z, o = merge(m, z, o, pm, pz, po)
    place = (row.to(tl.int64) * H + head)[:, None] * D + d[None, :]
    tl.store(out_ptr + place, (o / z[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def flops(pairs: int, heads: int, dim: int) -> int:
    """pairs: of a row and a key that it sees."""
    return 4 * pairs * heads * dim


def bytes(tokens_read: int, rows: int, slots: int, heads: int, kv_heads: int, dim: int, itemsize: int = 2) -> int:
    """tokens_read: keys of all items, each once for the rows that share it; slots: states and partials, written and read."""
    pages = 2 * tokens_read * kv_heads * dim * itemsize
    return pages + 2 * rows * heads * dim * itemsize + 2 * 4 * slots * heads * (dim + 2)
