"""Attention over packed token trees: one rule, forward and backward.

    query i sees key j  <=>  j <= i < end[j]

    out[i] = sum over j of softmax_j(q[i] . k[j] / sqrt(D)) v[j]

Shapes: N tokens of one pack in pre-order, H query heads, G key/value heads (H a multiple of G), D head dim.
q [N, H, D], k and v [N, G, D], end [N] int64 (where the subtree of token j stops in the pack) -> [N, H, D] in q's dtype.
Every token sees itself, so no row is empty.

The schedule is FlashAttention 2's over *lists* of tiles. A key tile is seen by a query tile if it begins before that ends
and one of its keys reaches beyond that one's first token; it is seen whole, and needs no mask, if it ends before that
begins and all of its keys reach its end. `tree_tiles` sorts this into a list for every tile, whole ones first, so tiles
that do not meet cost nothing, and the order of every sum is fixed. A program owns one tile of one head, and keeps it in
shared memory; programs with the longest lists start first. There are no atomics: dQ is summed by the owners of query
tiles, dK and dV by the owners of key tiles, over all query heads of their group. The price is S and dP computed twice,
7 products instead of 5. delta = rowsum(dO * O) is a by-product of the first of the two kernels.

Written for stock Triton on Hopper by reading its machine code; nothing here was timed yet. What was learned:

- One loop, with the mask behind a branch: two loops (whole tiles, then the others) would drain the pipeline of loads in
  between. No tile is loaded after the branch: it would be waited for there, behind a barrier that keeps one warpgroup's
  softmax from running under the other's product.
- The list is read one entry ahead of its use. Read where it is used, an entry becomes an asynchronous copy and takes one
  of the three stages; K and V are then asked for right before they are waited for.
- Strides are compile-time constants: the addresses of a tile's rows then differ by immediates, not by registers.
- Backward over keys has keys down and queries across, so that P and dS are left operands in the registers in which they
  were computed. S and dP come first, then what is elementwise, then both sums. lse is loaded between S and dP, so that
  the exponentials run under the product dP; delta after both. Both before S: they live through two products, 16
  registers each, and the loop spills.

Compiled for bf16, D = 128, H = G = 32 (registers a thread / KB shared, by Triton 3.8; no launch of `benchmarks/launches.py`
spills, under 3.6 neither):

    kernel               sm_90: tile, warps, stages        sm_80
    _tree_forward            128 x 128, 8, 3: 244 / 224        128 x 64, 8, 2: 255 / 81
    _tree_backward_queries   128 x  64, 8, 3: 228 / 160        128 x 32, 8, 2: 232 / 88
    _tree_backward_keys      128 x  64, 8, 3: 255 / 161         64 x 32, 4, 2: 245 / 52

256 threads with 255 registers fill a multiprocessor, so one program runs on each. Its own tile of 128 keeps the traffic
from L2 low: 64 KB for 8.4 MFLOP forward, 32 KB for 8.4 MFLOP over keys and for 6.3 MFLOP over queries. Steps of 64 keys
forward would rescale the sums twice as often: 748 instead of 581 instructions for 128 keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .jit import acc, interpreted, jit, power_of_two, tl, triton

TILE = 128  # tokens of the tiles that lists name; what a program keeps and steps over are these or parts of them
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), which is one instruction


def tree_attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The rule written down: all N x N scores. Accumulates in fp32 (fp64 for fp64 input)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    index = torch.arange(len(q), device=q.device)
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])  # [query, key]
    scores = torch.einsum("ihd,jhd->hij", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, v.to(wide)).to(q.dtype)


class TreeTiles(NamedTuple):
    """Which tiles of a pack meet. Made once for all layers, on the device of `end` and without waiting for it.

    end [N] int32. by_query int32 has a row for every tile of queries, the longest list first: the tile; how many key
    tiles it sees whole; how many it sees at all; these key tiles, those seen whole first, both parts ascending; then
    what nobody reads. by_key is the same with the sides changed.
    """

    end: torch.Tensor
    by_query: torch.Tensor
    by_key: torch.Tensor
    tile: int


def tree_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: TreeTiles) -> torch.Tensor:
    """q [N, H, D], k and v [N, G, D] -> [N, H, D] in q's dtype. Differentiable. Rows may lie apart, as those of three
    views of one tensor do; the heads of a row lie one after the other."""
    return _TreeAttention.apply(q, k, v, tiles)


def tree_attention_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: TreeTiles
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [N, H, D] and the logsumexp of each row's scaled scores [N, H] in fp32 (fp64 for fp64). No gradients."""
    out, lse = _run_forward(_rows(q), _rows(k), _rows(v), tiles)
    return out, lse.T / LOG2_E


def tree_tiles(end: torch.Tensor, tile: int = TILE) -> TreeTiles:
    """end [N] int64: where the subtree of each token stops in the pack. Another tile (a power of two) is for tests."""
    end, tokens = end.to(torch.int32), len(end)
    count = -(-tokens // tile)
    reach = F.pad(end, (0, count * tile - tokens)).view(count, tile)  # a key that does not exist reaches nobody
    start = torch.arange(0, tokens, tile, dtype=torch.int32, device=end.device)
    query, key = start[:, None], start[None, :]
    seen = (key < query + tile) & (reach.amax(dim=1) > query)  # [query tiles, key tiles]
    whole = (key + tile <= query + 1) & (reach.amin(dim=1) >= query + tile)
    rank = 2 - seen.to(torch.int8) - whole.to(torch.int8)  # 0: whole, 1: in part, 2: not at all
    return TreeTiles(end, _lists(rank), _lists(rank.T), tile)


def _lists(rank: torch.Tensor) -> torch.Tensor:
    lists = torch.argsort(rank, dim=1, stable=True)
    counts = torch.stack(((rank == 0).sum(dim=1), (rank < 2).sum(dim=1)), dim=1)
    order = torch.argsort(counts[:, 1], descending=True, stable=True)
    table = torch.cat((order[:, None], counts[order], lists[order]), dim=1)
    # kernels read one entry ahead; and Triton compiles anew for a number that 16 does not divide
    return F.pad(table, (0, 16 - table.shape[1] % 16)).to(torch.int32)


class Config(NamedTuple):
    """own: tokens of the tile that a program keeps; step: of those that it walks over. loops, of the keys' kernel alone: 2 gives
    the tiles that are seen whole one of their own, without the mask."""

    own: int
    step: int
    warps: int
    stages: int
    loops: int = 1


def config(kernel: str, dim: int, itemsize: int, capability: int) -> Config:
    """The largest tiles that spill no register, up to head dim 256; on Hopper the fastest, on an H200 for four sequences of
    4,096 tokens, 32 heads of 128: forward 1.20 ms (128 x 128 in 8 warps 1.30, 128 x 64 1.25), dq 1.48 (64 x 64 1.58,
    128 x 32 1.82), dk and dv 1.86 (128 x 64 2.01, 128 x 32 2.27; in one loop 2.11, for the others two loops give up to 2%)."""
    if itemsize > 2 or dim > 128:
        return Config(32, 16, 8, 2) if itemsize > 2 and dim > 128 else Config(64, 32, 8, 2)
    if 90 <= capability < 120:
        return {"forward": Config(64, 64, 4, 3), "queries": Config(128, 64, 8, 3), "keys": Config(64, 64, 4, 2, 2)}[
            kernel
        ]
    if kernel == "keys":
        return Config(64, 32, 4, 2)
    return Config(128, 64 if kernel == "forward" else 32, 8, 2)


@jit
def _load(  # type: ignore[no-untyped-def]
    ptr, first, tokens, STRIDE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows first .. first + BLOCK of one head. Offsets inside a tile fit int32, the place of a tile may not."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    tile = ptr + first.to(tl.int64) * STRIDE + (row * STRIDE + column)
    return tl.load(tile, mask=(first + row < tokens) & (column < D), other=0.0)


@jit
def _store(  # type: ignore[no-untyped-def]
    ptr, x, first, tokens, STRIDE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    tile = ptr + first.to(tl.int64) * STRIDE + (row * STRIDE + column)
    tl.store(tile, x.to(ptr.dtype.element_ty), mask=(first + row < tokens) & (column < D))


@jit
def _own_tile(lists_ptr, width, HEADS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """-> this program's head, its first token, its list, how many tiles of that are seen whole, how many there are."""
    slots = tl.num_programs(0) // HEADS
    head = tl.program_id(0) // slots
    slot = tl.program_id(0) % slots
    list_ptr = lists_ptr + (slot // (TILE // BLOCK)).to(tl.int64) * width
    first = tl.load(list_ptr) * TILE + slot % (TILE // BLOCK) * BLOCK
    return head, first, list_ptr + 3, tl.load(list_ptr + 1), tl.load(list_ptr + 2)


@jit
def _tree_forward(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, end_ptr, lists_ptr, out_ptr, lse_ptr, width, tokens, scale2,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    head, q0, list_ptr, whole, seen = _own_tile(lists_ptr, width, HEADS, OWN, TILE)
    scale2 = tl.full((), scale2, ACC)
    k_ptr += head // GROUP * D
    v_ptr += head // GROUP * D
    query = q0 + tl.arange(0, OWN)
    q = _load(q_ptr + head * D, q0, tokens, Q_STRIDE, OWN, D, BLOCK_D)
    acc = tl.zeros((OWN, BLOCK_D), ACC)
    total = tl.zeros((OWN,), ACC)
    top = tl.full((OWN,), -1e30, ACC)  # finite: a row may see nothing of its first tiles, and -inf - -inf is NaN
    PARTS: tl.constexpr = TILE // STEP
    tile = tl.load(list_ptr)
    for t in range(0, seen * PARTS):
        k0 = tile * TILE + t % PARTS * STEP
        tile = tl.load(list_ptr + (t + 1) // PARTS)
        k = _load(k_ptr, k0, tokens, K_STRIDE, STEP, D, BLOCK_D)
        v = _load(v_ptr, k0, tokens, V_STRIDE, STEP, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
        if t >= whole * PARTS:
            key = k0 + tl.arange(0, STEP)
            reach = tl.load(end_ptr + key, mask=key < tokens, other=0)
            s = tl.where((key[None, :] <= query[:, None]) & (query[:, None] < reach[None, :]), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1) * scale2)
        p = tl.exp2(s * scale2 - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC)
        top = higher
    total = tl.where(query < tokens, total, 1.0)  # rows after the last token saw nothing
    _store(out_ptr + head * D, acc / total[:, None], q0, tokens, HEADS * D, OWN, D, BLOCK_D)
    tl.store(lse_ptr + head.to(tl.int64) * tokens + query, top + tl.log2(total), mask=query < tokens)


@jit
def _tree_backward_queries(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, end_ptr, lists_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, width, tokens, scale, scale2,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    head, q0, list_ptr, whole, seen = _own_tile(lists_ptr, width, HEADS, OWN, TILE)
    scale2 = tl.full((), scale2, ACC)
    k_ptr += head // GROUP * D
    v_ptr += head // GROUP * D
    query = q0 + tl.arange(0, OWN)
    row = head.to(tl.int64) * tokens + query
    do = _load(do_ptr + head * D, q0, tokens, HEADS * D, OWN, D, BLOCK_D)
    out = _load(out_ptr + head * D, q0, tokens, HEADS * D, OWN, D, BLOCK_D)
    delta = tl.sum(out.to(ACC) * do.to(ACC), axis=1)
    tl.store(delta_ptr + row, delta, mask=query < tokens)
    q = _load(q_ptr + head * D, q0, tokens, Q_STRIDE, OWN, D, BLOCK_D)
    lse = tl.load(lse_ptr + row, mask=query < tokens, other=0.0)
    dq = tl.zeros((OWN, BLOCK_D), ACC)
    PARTS: tl.constexpr = TILE // STEP
    tile = tl.load(list_ptr)
    for t in range(0, seen * PARTS):
        k0 = tile * TILE + t % PARTS * STEP
        tile = tl.load(list_ptr + (t + 1) // PARTS)
        k = _load(k_ptr, k0, tokens, K_STRIDE, STEP, D, BLOCK_D)
        v = _load(v_ptr, k0, tokens, V_STRIDE, STEP, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee", out_dtype=ACC)
        p = tl.exp2(s * scale2 - lse[:, None])
        if t >= whole * PARTS:
            key = k0 + tl.arange(0, STEP)
            reach = tl.load(end_ptr + key, mask=key < tokens, other=0)
            p = tl.where((key[None, :] <= query[:, None]) & (query[:, None] < reach[None, :]), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee", out_dtype=ACC)
    _store(dq_ptr + head * D, dq * tl.full((), scale, ACC), q0, tokens, HEADS * D, OWN, D, BLOCK_D)


@jit
def _tree_backward_keys(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, end_ptr, lists_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, width, tokens, scale, scale2,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    KV_HEADS: tl.constexpr = HEADS // GROUP
    head, k0, list_ptr, whole, seen = _own_tile(lists_ptr, width, KV_HEADS, OWN, TILE)
    scale2 = tl.full((), scale2, ACC)
    tokens = tl.full((), tokens, tl.int32)
    key = k0 + tl.arange(0, OWN)
    reach = tl.load(end_ptr + key, mask=key < tokens, other=0)
    k = _load(k_ptr + head * D, k0, tokens, K_STRIDE, OWN, D, BLOCK_D)
    v = _load(v_ptr + head * D, k0, tokens, V_STRIDE, OWN, D, BLOCK_D)
    dk = tl.zeros((OWN, BLOCK_D), ACC)
    dv = tl.zeros((OWN, BLOCK_D), ACC)
    PARTS: tl.constexpr = TILE // STEP * GROUP
    tile = tl.load(list_ptr)
    # the heads of a group inside the tiles: one order of the sums
    for loop in tl.static_range(LOOPS):
        for t in range(whole * PARTS * loop, (seen if loop + 1 == LOOPS else whole) * PARTS):
            q0 = tile * TILE + t % PARTS // GROUP * STEP
            tile = tl.load(list_ptr + (t + 1) // PARTS)
            query_head = head * GROUP + t % GROUP
            q = _load(q_ptr + query_head * D, q0, tokens, Q_STRIDE, STEP, D, BLOCK_D)
            do = _load(do_ptr + query_head * D, q0, tokens, HEADS * D, STEP, D, BLOCK_D)
            # keys down, queries across: P and dS are then left operands as they stand in registers
            s = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=ACC)
            query = q0 + tl.arange(0, STEP)
            row = query_head.to(tl.int64) * tokens + query
            lse = tl.load(lse_ptr + row, mask=query < tokens, other=0.0)
            dp = tl.dot(v, tl.trans(do), input_precision="ieee", out_dtype=ACC)
            delta = tl.load(delta_ptr + row, mask=query < tokens, other=0.0)
            p = tl.exp2(s * scale2 - lse[None, :])
            if loop == 1:
                p = tl.where((key[:, None] <= query[None, :]) & (query[None, :] < reach[:, None]), p, 0.0)
            elif LOOPS == 1:  # noqa: SIM102, decided when it is compiled
                if t >= whole * PARTS:
                    p = tl.where((key[:, None] <= query[None, :]) & (query[None, :] < reach[:, None]), p, 0.0)
            ds = p * (dp - delta[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee", out_dtype=ACC)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee", out_dtype=ACC)
    _store(dk_ptr + head * D, dk * tl.full((), scale, ACC), k0, tokens, KV_HEADS * D, OWN, D, BLOCK_D)
    _store(dv_ptr + head * D, dv, k0, tokens, KV_HEADS * D, OWN, D, BLOCK_D)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Rows may lie apart, what is in them may not."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _launch(
    kernel: Any, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, tiles: TreeTiles, *given: Any
) -> None:
    """A program for every head and tile of its own side: of q's, or of k's and v's."""
    dim = q.shape[2]
    own, step, warps, stages, loops = config(name, dim, q.element_size(), _capability())
    own, step = min(own, tiles.tile), min(step, tiles.tile)
    programs = heads * len(tiles.by_query) * (tiles.tile // own)
    if programs:
        kernel[(programs,)](
            q, k, v, tiles.end, *given, Q_STRIDE=q.stride(0), K_STRIDE=k.stride(0), V_STRIDE=v.stride(0),
            HEADS=q.shape[1], GROUP=q.shape[1] // k.shape[1], D=dim, BLOCK_D=max(16, power_of_two(dim)),
            OWN=own, STEP=step, TILE=tiles.tile, ACC=acc(q.dtype), num_warps=warps, num_stages=stages,
            **({"LOOPS": loops} if name == "keys" else {}),
        )  # fmt: skip


def _capability() -> int:
    """Of the GPU that is compiled for: 90 is Hopper."""
    return 0 if interpreted() else int(triton.runtime.driver.active.get_current_target().arch)


def _run_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: TreeTiles
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [N, H, D], logsumexp to base 2 [H, N]: the kernels read it along N."""
    tokens, heads, dim = q.shape
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    lists = tiles.by_query
    _launch(
        _tree_forward, "forward", q, k, v, heads, tiles,
        lists, out, lse, lists.shape[1], tokens, dim**-0.5 * LOG2_E,
    )  # fmt: skip
    return out, lse


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: TreeTiles) -> torch.Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        out, lse = _run_forward(q, k, v, tiles)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        tiles, do = ctx.tiles, do.contiguous()
        tokens, heads, dim = q.shape
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = torch.empty_like(lse)  # the first kernel writes it, the second reads it
        scales = dim**-0.5, dim**-0.5 * LOG2_E
        _launch(
            _tree_backward_queries, "queries", q, k, v, heads, tiles,
            tiles.by_query, out, do, lse, delta, dq, tiles.by_query.shape[1], tokens, *scales,
        )  # fmt: skip
        _launch(
            _tree_backward_keys, "keys", q, k, v, k.shape[1], tiles,
            tiles.by_key, do, lse, delta, dk, dv, tiles.by_key.shape[1], tokens, *scales,
        )  # fmt: skip
        return dq, dk, dv, None


def pairs(end: torch.Tensor) -> int:
    """How many (query, key) pairs see each other: key j is seen by the queries j .. end[j] - 1. Waits for the device."""
    return int((end - torch.arange(len(end), device=end.device)).sum())


def flops(tokens: int, pairs: int, heads: int, dim: int, backward: bool = False) -> int:
    """Two products of the visible pairs forward, five backward (as everybody counts; two of them are computed twice)."""
    return 10 * pairs * heads * dim + 2 * tokens * heads * dim if backward else 4 * pairs * heads * dim


def bytes(tokens: int, heads: int, kv_heads: int, dim: int, itemsize: int = 2, backward: bool = False) -> int:
    """Everything once: q, out, k, v and lse; backward also the gradients, and delta written and read."""
    once = 2 * tokens * (heads + kv_heads) * dim * itemsize
    return 2 * once + 3 * 4 * tokens * heads if backward else once + 4 * tokens * heads
