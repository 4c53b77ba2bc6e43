"""RoPE and the writing of keys and values to their pages, in one pass: what a forward of the sampler does before attention.

q [N, H, D] is turned and returned; k [N, G, D], turned, and v [N, G, D] go to slots of key_pages [blocks, G, D, B] and
value_pages [blocks, G, B, D]; then heads of blocks are copied for sequences that fork inside a block.

On a GPU a program takes a row and some of its H + 2G heads, whichever of the three they belong to; pages may have any
strides. A slot below 0 is written nowhere: rows that pad a CUDA graph.
"""

from __future__ import annotations

import torch

from .jit import jit, power_of_two, tl
from .rope import PAIRS, rope_reference


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
    """q [N, H, D], turned, is the result; k [N, G, D], turned, and v go to the slots [N] of key_pages [blocks, G, D, B]
    and value_pages [blocks, G, B, D], fp32 or rounded to bf16, slot s of block b being b * B + s. Then the copies [C, 3],
    in their order: the first `tokens` slots of block `source` also go to block `target`."""
    block, slot = slots // key_pages.shape[3], slots % key_pages.shape[3]
    key_pages[block, :, :, slot] = rope_reference(k, cos, sin).to(key_pages.dtype)
    value_pages[block, :, slot] = v.to(value_pages.dtype)
    for source, target, tokens in copies.tolist():
        key_pages[target, :, :, :tokens] = key_pages[source, :, :, :tokens]
        value_pages[target, :, :tokens] = value_pages[source, :, :tokens]
    return rope_reference(q, cos, sin)


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
) -> torch.Tensor:
    """As `rope_write_reference`; computed in fp32 and rounded once. The heads of a row of q, k and v lie one after the
    other, their rows may be apart."""
    rows, heads, dim = q.shape
    kv_heads, page = key_pages.shape[1], key_pages.shape[3]
    q, k, v = (x if x.stride()[1:] == (dim, 1) else x.contiguous() for x in (q, k, v))
    out = torch.empty(rows, heads, dim, dtype=q.dtype, device=q.device)
    half_block = power_of_two(dim // 2)
    heads_block = min(power_of_two(heads + 2 * kv_heads), max(1, PAIRS // half_block))
    if rows:
        _rope_write[(rows, -(-(heads + 2 * kv_heads) // heads_block))](
            q, k, v, cos.contiguous(), sin.contiguous(), key_pages, value_pages, slots, out,
            q.stride(0), k.stride(0), v.stride(0), *key_pages.stride(), *value_pages.stride(),
            HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, HALF_BLOCK=half_block, HEADS_BLOCK=heads_block, PAGE=page,
            num_warps=4,
        )  # fmt: skip
    if len(copies):
        _copy_heads[(kv_heads, -(-dim // 32))](
            key_pages, value_pages, copies, len(copies), *key_pages.stride(), *value_pages.stride(),
            D=dim, PAGE=page, num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


@jit
def _rope_write(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, slots_ptr, out_ptr, q_row, k_row, v_row,
    k_block, k_head, k_dim, k_slot, v_block, v_head, v_slot, v_dim,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Heads are counted through q, then k, then v; a mask says to which of the three a head of the tile belongs."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)[:, None]
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    real = pair < HALF
    in_q = real & (head < HEADS)
    in_k = real & (head >= HEADS) & (head < HEADS + KV_HEADS)
    in_v = real & (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    kv = tl.where(head < HEADS + KV_HEADS, head - HEADS, head - HEADS - KV_HEADS)
    q_place, kv_place = head * (2 * HALF) + pair, kv * (2 * HALF) + pair
    dtype = out_ptr.dtype.element_ty

    cos = tl.load(cos_ptr + row * HALF + pair, mask=real, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * HALF + pair, mask=real, other=0.0).to(tl.float32)
    first = tl.load(q_ptr + row * q_row + q_place, mask=in_q, other=0.0).to(tl.float32)
    second = tl.load(q_ptr + row * q_row + q_place + HALF, mask=in_q, other=0.0).to(tl.float32)
    out = out_ptr + row * (HEADS * 2 * HALF) + q_place
    tl.store(out, (first * cos - second * sin).to(dtype), mask=in_q)
    tl.store(out + HALF, (second * cos + first * sin).to(dtype), mask=in_q)

    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        block, place = slot // PAGE, slot % PAGE
        first = tl.load(k_ptr + row * k_row + kv_place, mask=in_k, other=0.0).to(tl.float32)
        second = tl.load(k_ptr + row * k_row + kv_place + HALF, mask=in_k, other=0.0).to(tl.float32)
        key = keys_ptr + block * k_block + place * k_slot + kv * k_head + pair * k_dim
        tl.store(key, (first * cos - second * sin).to(keys_ptr.dtype.element_ty), mask=in_k)
        tl.store(key + HALF * k_dim, (second * cos + first * sin).to(keys_ptr.dtype.element_ty), mask=in_k)
        low = tl.load(v_ptr + row * v_row + kv_place, mask=in_v, other=0.0)
        high = tl.load(v_ptr + row * v_row + kv_place + HALF, mask=in_v, other=0.0)
        value = values_ptr + block * v_block + place * v_slot + kv * v_head + pair * v_dim
        tl.store(value, low.to(values_ptr.dtype.element_ty), mask=in_v)
        tl.store(value + HALF * v_dim, high.to(values_ptr.dtype.element_ty), mask=in_v)


@jit
def _copy_heads(  # type: ignore[no-untyped-def]
    keys_ptr, values_ptr, copies_ptr, copies, k_block, k_head, k_dim, k_slot, v_block, v_head, v_slot, v_dim,
    D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A program takes 32 columns of a head of all copies, one after the other: what one copy wrote the next may read. A
    copy moves no element to another slot or column, so a thread reads what it wrote itself; with more than one stage the
    loads of later copies would be made before the stores of earlier ones."""
    head = tl.program_id(0)
    column = tl.program_id(1) * 32 + tl.arange(0, 32)[None, :]
    slot = tl.arange(0, PAGE)[:, None]
    keys = keys_ptr + head * k_head + slot * k_slot + column * k_dim
    values = values_ptr + head * v_head + slot * v_slot + column * v_dim
    for number in range(0, copies):
        source = tl.load(copies_ptr + number * 3).to(tl.int64)
        target = tl.load(copies_ptr + number * 3 + 1).to(tl.int64)
        mine = (slot < tl.load(copies_ptr + number * 3 + 2)) & (column < D)
        tl.store(keys + target * k_block, tl.load(keys + source * k_block, mask=mine, other=0.0), mask=mine)
        tl.store(values + target * v_block, tl.load(values + source * v_block, mask=mine, other=0.0), mask=mine)
        tl.debug_barrier()


def bytes(rows: int, heads: int, kv_heads: int, dim: int, itemsize: int = 2) -> int:
    """q, k and v read and written once, one row of cos and sin."""
    return 2 * rows * (heads + 2 * kv_heads) * dim * itemsize + 4 * rows * dim
