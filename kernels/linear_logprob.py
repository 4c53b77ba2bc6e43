"""Log-probability per token from hidden states and the head, without ever holding all logits.

    logits[n, :] = weight @ hidden[n]            (fp32, or wider: they leave the product's accumulator unrounded)
    lse[n]  = log sum exp logits[n, :]
    logp[n] = logits[n, targets[n]] - lse[n]
    dlogits[n, v] = softmax[n, v] * (dlse[n] - dlogp[n]) + [v = targets[n]] * dlogp[n]

hidden [N, dim], weight [vocab, dim], targets [N] int64 -> logp [N], lse [N], fp32 (fp64 for fp64 input). The N rows are
those that count: a caller leaves ignored tokens out before it comes here.

Two schedules. *Recompute*, `linear_logprob`: the forward saves hidden, targets and lse; the backward makes each tile of
logits again. 8 N dim vocab FLOPs, any gradient of both results. *One pass*, `linear_logprob_losses`: the slope of the loss
is known while the logits are there, so that nothing is made again. That is so where all logits fit HELD_BYTES, and where
the loss is linear in logp. Size alone decides. Both take the same tiles of rows, so logp is the same bits. A gradient that
is not asked for (a LoRA's head is frozen) costs no product.

On a CPU, N = 2040 (4 pairs of 2 x 255), dim = 768, vocab = 32000, fp32, 2 threads of AMD EPYC (Zen 5). Floor of one pass:
6 N dim vocab = 301 GFLOP, 0.56 s at the 542 GFLOP/s of its multiply-adds; logits and their gradients written once and read
twice, 1.6 GB; for each of four groups the head packed twice and dW read and written, 2.4 GB. A group has to hold its
logits, a pair's 65 MB, until its slope is known; so groups of one pair or of GROUP_BYTES, one in the place of the other,
add to one dW. `python -m benchmarks logprob`, beside a load (time over eager's, MB besides dX and dW): one pass 0.40, 70;
recompute 0.40, 35; eager 1, 685; with what each keeps after its first call 88, 41 and 702. As one part, in another run,
0.48 and 275 against 0.42. torch's own products have a row's tile as large as it may be: pairs in tiles of 16 / 32 / 48 / 64
MB took 2.1 / 1.3 / 1.6 / 0.99 of eager, recompute 2.6 / 1.8 / 1.7 / 1.2; native SFT in 32 / 48 / 64 MB 0.39 / 0.44 / 0.38
with 42 / 59 / 80 MB.

Where the products run, on a GPU. At N = 8192, dim = 4096, vocab = 32000 in bf16 a product is 2.15 TFLOP: 2.7 ms at the
790 TFLOP/s that cuBLAS reaches, 3.6 to 4.3 ms at the 500 to 600 of Triton's own. fp32 logits that go through memory cost
8 bytes each, 0.5 ms of 4.3 TB/s: less than one product loses by being Triton's. So the products are cuBLAS's, in few large
tiles; Triton reads a tile once for lse and logp, and once for the gradient, which it writes in the product's dtype. On
paper (`flops`, `bytes`), in ms and without launches:

    eager      products 8.2; logits in bf16 and fp32, log-softmax, their gradients 2.5          10.7
    recompute  products 10.9; logits, gradients and dX while it is summed 1.6                   12.5   (1.17 of eager)
    one pass   products 8.8; the same 1.4; gradients scaled by upstream 0.15                    10.3   (0.97)

Memory decides the loops. lse and dX want all columns of some rows, dW wants all rows of some columns. dW summed over
tiles of rows has to be fp32: 524 MB here, an eighth of what eager takes for its logits (16 bytes each), read and written
for every tile. So the backward's tiles are columns: dW leaves one product over all N rows, rounded once, and what is
summed over tiles is dX, 4 bytes an element. In one pass the tiles are rows, because a slope is of no use before lse is
known: their gradients give dX at once, and wait for dW in the product's dtype, 2 bytes a logit. They do so for at most 4/5
of the vocabulary, which is at most a tenth of eager's 16 bytes; the rest's logits are made again, as in the recompute
schedule. `memory` is the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from .jit import acc, jit, power_of_two, tl

TILE_BYTES = 64 << 20  # logits that are made at once on a CPU
GROUP_BYTES = 64 << 20  # and that wait there for the slope of a loss, unless one pair has more: 524 rows of 32000
HELD_BYTES = 256 << 20  # logits that wait at all, rather than being made again: 2097 rows of 32000
Pair = tuple[torch.Tensor, torch.Tensor]
Wanted = tuple[bool, bool]  # whether the gradient of hidden is asked for, and that of weight
BOTH = (True, True)
Gradients = tuple[torch.Tensor | None, torch.Tensor | None]  # those that are wanted
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # targets, lse, and the gradients of logp and lse
Loss = Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
Part = tuple[
    torch.Tensor | None, torch.Tensor, Loss
]  # rows of hidden (None: all, of an only part), targets, their loss


def linear_logprob_reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Pair:
    """All logits at once, gradients by autograd: what the tiled versions must equal."""
    wide = _wide(hidden)
    logits = hidden.to(wide) @ weight.to(wide).T
    lse = torch.logsumexp(logits, dim=-1)
    return logits.gather(1, targets[:, None]).squeeze(1) - lse, lse


@dataclass(frozen=True)
class TorchTiles:
    """In torch, on any device: tiles of rows, of at most `tile_bytes` of logits, forward and backward."""

    tile_bytes: int = TILE_BYTES

    def logprobs(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor | None = None
    ) -> Pair:
        """logp and lse. logits [N, vocab], if given, is filled for `gradients`."""
        logp = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        lse = torch.empty_like(logp)
        head = weight.to(logp.dtype)
        for rows, tile in self._tiles(hidden, head, logits):
            torch.mm(hidden[rows].to(logp.dtype), head.T, out=tile)
            for piece in _pieces(rows):
                some = tile[piece.start - rows.start : piece.stop - rows.start]
                torch.logsumexp(some, dim=-1, out=lse[piece])
                logp[piece] = some.gather(1, targets[piece, None]).squeeze(1) - lse[piece]
        return logp, lse

    def gradients(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        lse: torch.Tensor,
        grad_logp: torch.Tensor,
        grad_lse: torch.Tensor,
        logits: torch.Tensor | None = None,
        wanted: Wanted = BOTH,
        total: torch.Tensor | None = None,
    ) -> Gradients:
        """Those of hidden, and of weight still in fp32; logits, where `logprobs` has kept them, are used up."""
        for_hidden, for_weight = wanted
        head = weight.to(lse.dtype)
        grad_hidden = torch.empty(hidden.shape, dtype=lse.dtype, device=hidden.device) if for_hidden else None
        if for_weight and total is None:
            total = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        scale = grad_lse - grad_logp
        for rows, tile in self._tiles(hidden, head, logits):
            x = hidden[rows].to(lse.dtype)
            if logits is None:
                torch.mm(x, head.T, out=tile)
            for piece in _pieces(rows):
                some = tile[piece.start - rows.start : piece.stop - rows.start]
                some.sub_(lse[piece, None]).exp_().mul_(scale[piece, None])
                some.scatter_add_(1, targets[piece, None], grad_logp[piece, None])
            if grad_hidden is not None:
                torch.mm(tile, head, out=grad_hidden[rows])
            if for_weight and total is not None:
                total.addmm_(tile.T, x)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), total

    def at_once(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        grad_logp: torch.Tensor,
        wanted: Wanted = BOTH,
        total: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """logp and the gradients, for a slope of the loss that is known beforehand."""
        return at_once_by_rows(self, hidden, weight, targets, grad_logp, wanted, total, self.tile_bytes)

    def _tiles(
        self, hidden: torch.Tensor, head: torch.Tensor, logits: torch.Tensor | None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows and the place of their logits: in `logits`, or each in the place of the one before."""
        size = max(1, min(len(hidden), _tile_rows(len(head), self.tile_bytes, head.dtype)))
        place = _matrix(size, len(head), head.dtype, head.device) if logits is None else logits
        for rows in _slices(0, len(hidden), size):
            yield rows, place[: rows.stop - rows.start] if logits is None else logits[rows]


def at_once_by_rows(
    tiles: Tiles,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    grad_logp: torch.Tensor,
    wanted: Wanted,
    total: torch.Tensor | None,
    tile_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`at_once` where dW can be added to: the logits of a tile of rows are held, and made gradients at once."""
    logp, zero = torch.empty_like(grad_logp), torch.zeros_like(grad_logp)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    size = min(max(1, len(hidden)), _tile_rows(len(weight), tile_bytes, logp.dtype))
    place = _matrix(size, len(weight), logp.dtype, hidden.device)
    for rows in _slices(0, max(1, len(hidden)), size):  # one that is empty, where there are none
        x, ids, logits = hidden[rows], targets[rows], place[: len(targets[rows])]
        logp[rows], lse = tiles.logprobs(x, weight, ids, logits)
        part, total = tiles.gradients(x, weight, ids, lse, grad_logp[rows], zero[rows], logits, wanted, total)
        if grad_hidden is not None and part is not None:
            grad_hidden[rows] = part
    return logp, grad_hidden, total


@jit
def _logprob(  # type: ignore[no-untyped-def]
    logits_ptr, logits_stride, target_ptr, logp_ptr, lse_ptr, vocab, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """A row of logits, read once. An infinite maximum is not subtracted, so that infinities come out as torch's do."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    lane = tl.arange(0, BLOCK)
    infinite = float("inf")
    top = tl.full((), -infinite, ACC)
    shift = tl.full((), 0.0, ACC)
    total = tl.full((), 0.0, ACC)
    for start in range(0, vocab, BLOCK):
        column = start + lane
        x = tl.load(logits_ptr + column, mask=column < vocab, other=-infinite).to(ACC)
        before = top
        top = tl.maximum(top, tl.max(x, axis=0))
        shift = tl.where(tl.abs(top) < infinite, top, 0.0)
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(x - shift), axis=0)
    lse = shift + tl.log(total)
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < vocab)  # a target that is no token has no log-prob
    hit = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(ACC)
    tl.store(logp_ptr + row, hit - lse)
    tl.store(lse_ptr + row, lse)


@jit
def _gradient(  # type: ignore[no-untyped-def]
    logits_ptr, logits_stride, target_ptr, lse_ptr, grad_logp_ptr, grad_lse_ptr, out_ptr, out_stride, first, columns,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of columns first .. first + columns of a row of logits, of which the pointers show the first."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    lse = tl.load(lse_ptr + row).to(ACC)
    grad_logp = tl.load(grad_logp_ptr + row).to(ACC)
    scale = tl.load(grad_lse_ptr + row).to(ACC) - grad_logp
    target = tl.load(target_ptr + row) - first
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = column < columns
        x = tl.load(logits_ptr + row * logits_stride + column, mask=inside, other=0.0).to(ACC)
        grad = tl.exp(x - lse) * scale + tl.where(column == target, grad_logp, 0.0)
        tl.store(out_ptr + row * out_stride + column, grad.to(out_ptr.dtype.element_ty), mask=inside)


def _run_logprob(logits: torch.Tensor, targets: torch.Tensor, logp: torch.Tensor, lse: torch.Tensor) -> None:
    rows, vocab = logits.shape
    block = min(8192, power_of_two(vocab))  # 32 logits for a thread of 8 warps, and one sum over them for every 8192
    _logprob[(rows,)](
        logits, logits.stride(0), targets, logp, lse, vocab,
        BLOCK=block, ACC=acc(logits.dtype), num_warps=max(1, block // 1024),
    )  # fmt: skip


def _run_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad_logp: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    first: int,
) -> None:
    rows, columns = logits.shape
    block = min(4096, power_of_two(columns))  # 16 logits for a thread: loads of 16 bytes, stores of 8 or 16
    _gradient[(rows,)](
        logits, logits.stride(0), targets, lse, grad_logp, grad_lse, out, out.stride(0), first, columns,
        BLOCK=block, ACC=acc(logits.dtype), num_warps=max(1, block // 512),
    )  # fmt: skip


@dataclass(frozen=True)
class TritonTiles:
    """On a GPU; hidden and weight of one dtype. Tiles of rows forward, of columns backward.

    For the products of Llama 2 7B in output tiles of 128 x 256, on the 132 multiprocessors of an H100: 128 MB are 1024
    rows of 32000 logits, and dX then has 128 output tiles, one for each; a tile of columns gives the logits 512, dX 256
    and dW 1024.
    """

    tile_bytes: int = 128 << 20  # logits of a tile of rows
    rows: int = 2048  # of a tile of columns, in fp32; its gradients wait in the product's dtype for all rows and dW
    columns: int = 8192

    def logprobs(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor | None = None
    ) -> Pair:
        logp = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        lse = torch.empty_like(logp)
        for rows, tile in self._row_tiles(hidden, weight, logits):
            _run_logprob(tile, targets[rows], logp[rows], lse[rows])
        return logp, lse

    def gradients(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        lse: torch.Tensor,
        grad_logp: torch.Tensor,
        grad_lse: torch.Tensor,
        logits: torch.Tensor | None = None,
        wanted: Wanted = BOTH,
        total: torch.Tensor | None = None,
    ) -> Gradients:
        if not len(hidden):
            return _zeros(hidden, weight, wanted, total)
        grad_hidden = torch.empty(hidden.shape, dtype=lse.dtype, device=hidden.device) if wanted[0] else None
        grad_weight = (torch.empty_like(weight) if total is None else total) if wanted[1] else None
        given = targets, lse, grad_logp.contiguous(), grad_lse.contiguous()
        self._columns(hidden, weight, given, grad_weight, total is not None, grad_hidden=grad_hidden, logits=logits)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight

    def at_once(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        grad_logp: torch.Tensor,
        wanted: Wanted = BOTH,
        total: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        logp, lse, zero = torch.empty_like(grad_logp), torch.empty_like(grad_logp), torch.zeros_like(grad_logp)
        if not len(hidden):
            return logp, *_zeros(hidden, weight, wanted, total)
        given = targets, lse, grad_logp.contiguous(), zero
        grad_hidden, kept = self._rows(hidden, weight, given, logp, wanted)
        if not wanted[1]:
            return logp, grad_hidden, None
        grad_weight = torch.empty_like(weight) if total is None else total  # not before the tile of rows is gone
        first, add = kept.shape[1], total is not None
        _product(kept.T, hidden, grad_weight[:first], add)
        del kept
        self._columns(hidden, weight, given, grad_weight, add, first=first)
        return logp, grad_hidden, grad_weight

    def kept(self, vocab: int) -> int:
        """Columns whose gradients wait for dW in one pass: whole tiles of at most 4/5 of the vocabulary."""
        return vocab * 4 // 5 // self.columns * self.columns

    def row_tile(self, rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> int:
        """Rows of the first tile, from sizes alone, so that both schedules have the same."""
        return max(1, min(rows, _tile_rows(vocab, self.tile_bytes, dtype, multiple=128)))

    def _row_tiles(
        self, hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits [rows, vocab] of some rows, in their place in `logits` or each in the place of the one before."""
        wide, vocab = _wide(hidden), len(weight)
        size = self.row_tile(len(hidden), vocab, wide)
        place = _matrix(size, vocab, wide, hidden.device) if logits is None else logits
        for rows in _slices(0, len(hidden), size):
            tile = place[: rows.stop - rows.start] if logits is None else logits[rows]
            _product(hidden[rows], weight.T, tile)
            yield rows, tile

    def _rows(
        self, hidden: torch.Tensor, weight: torch.Tensor, given: Given, logp: torch.Tensor, wanted: Wanted
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Tile by tile logp, lse (in `given`) and gradients -> dX, and those of the logits that are kept for dW."""
        dim, first, device = hidden.shape[1], self.kept(len(weight)) if wanted[1] else 0, hidden.device
        size = self.row_tile(len(hidden), len(weight), logp.dtype)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        kept = torch.empty(len(hidden), first, dtype=hidden.dtype, device=device)
        rest = len(weight) - first if wanted[0] else 0  # of no use but for dX
        others = _matrix(size, rest, hidden.dtype, device)
        sums = torch.empty(size if wanted[0] else 0, dim, dtype=logp.dtype, device=device)
        for rows, tile in self._row_tiles(hidden, weight):
            targets, lse, grad_logp, grad_lse = (x[rows] for x in given)
            _run_logprob(tile, targets, logp[rows], lse)
            if first:
                _run_gradient(tile[:, :first], targets, lse, grad_logp, grad_lse, kept[rows], 0)
            if grad_hidden is None:
                continue
            summed, other = sums[: len(tile)], others[: len(tile)]
            if first:
                _product(kept[rows], weight[:first], summed)
            _run_gradient(tile[:, first:], targets, lse, grad_logp, grad_lse, other, first)
            _product(other, weight[first:], summed, add=first > 0)
            grad_hidden[rows] = summed
        return grad_hidden, kept

    def _columns(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        given: Given,
        grad_weight: torch.Tensor | None,
        add: bool = False,
        first: int = 0,
        grad_hidden: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
    ) -> None:
        """dW of the columns from `first` on (added, if so asked) and dX, their sum, where there is a place for them; from
        logits that are held or made again."""
        wide, device, width = _wide(hidden), hidden.device, min(self.columns, len(weight))
        again = 0 if logits is not None else min(self.rows, len(hidden))
        place = torch.empty(again, width, dtype=wide, device=device)
        grads = torch.empty(len(hidden), width, dtype=hidden.dtype, device=device)
        for block in _slices(first, len(weight), self.columns):
            grad = grads[:, : block.stop - block.start]
            for rows in _slices(0, len(hidden), self.rows):
                if logits is None:
                    tile = place[: rows.stop - rows.start, : block.stop - block.start]
                    _product(hidden[rows], weight[block].T, tile)
                else:
                    tile = logits[rows, block]
                targets, lse, grad_logp, grad_lse = (x[rows] for x in given)
                _run_gradient(tile, targets, lse, grad_logp, grad_lse, grad[rows], block.start)
                if grad_hidden is not None:
                    _product(grad[rows], weight[block], grad_hidden[rows], add=block.start > first)
            if grad_weight is not None:
                _product(grad.T, hidden, grad_weight[block], add)


class Tiles(Protocol):
    """Where the products run and in which pieces: the tiles above, and those of `engine/native.py`.

    Of the gradients only those that are wanted come back, and no product is made for another. total: dW of what came
    before, as it came back from there; this one's is added to it in place. Its dtype is the tiles' own: a caller rounds.
    """

    def logprobs(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor | None = None
    ) -> Pair: ...

    def gradients(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        lse: torch.Tensor,
        grad_logp: torch.Tensor,
        grad_lse: torch.Tensor,
        logits: torch.Tensor | None = None,
        wanted: Wanted = BOTH,
        total: torch.Tensor | None = None,
    ) -> Gradients: ...

    def at_once(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        grad_logp: torch.Tensor,
        wanted: Wanted = BOTH,
        total: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]: ...


TORCH, TRITON = TorchTiles(), TritonTiles()


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tiles: Tiles = TORCH
) -> tuple[torch.Tensor, torch.Tensor]:
    """logp and lse, both differentiable in hidden and weight; the schedule is *recompute*."""
    logp, lse = _LinearLogprob.apply(hidden, weight, targets, tiles)
    return logp, lse


def linear_logprob_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss: Loss,
    linear: bool = False,
    tiles: Tiles = TORCH,
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """`linear_logprob_losses` of one loss, of all rows of hidden: its value, its metrics, logp [N]."""
    value, (metrics,), logp = linear_logprob_losses(hidden, weight, [(None, targets, loss)], linear, tiles)
    return value, metrics, logp


def linear_logprob_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    parts: Sequence[Part],
    linear: bool = False,
    tiles: Tiles = TORCH,
) -> tuple[torch.Tensor, list[Any], torch.Tensor]:
    """Losses of log-probs -> their sum (differentiable in hidden and weight), the metrics of each, all logp (detached).

    A loss maps logp [n] of its part to (scalar, anything) and depends on the weights through logp alone. linear: its slope
    is the same at every logp, as SFT's is; it is then asked for at logp = 0, before there are logits, and once more at the
    end: if the answers differ the value is NaN, not a wrong gradient. One pass for a part whose logits fit HELD_BYTES or
    whose loss is linear, recompute for others. Parts come one after the other, each in the place of the one before, and
    add to the same gradients, which are there before the backward: it scales and gives them away, once. ValueError: there
    are no parts, or one of several that takes all rows.
    """
    if not parts:
        raise ValueError("parts is empty; expected at least one, and where nothing counts one of no rows")
    if len(parts) > 1 and any(rows is None for rows, _, _ in parts):
        raise ValueError(f"one of {len(parts)} parts has rows None, all of them; expected that of an only part")
    wanted = hidden.requires_grad, weight.requires_grad
    if not (torch.is_grad_enabled() and any(wanted)):
        with torch.no_grad():
            logps = [tiles.logprobs(_take(hidden, rows), weight, targets)[0] for rows, targets, _ in parts]
        values, metrics = zip(*(loss(logp) for (_, _, loss), logp in zip(parts, logps, strict=True)), strict=True)
        return sum(values[1:], values[0]), list(metrics), torch.cat(logps)
    run = _OnePass(hidden, weight, linear, tiles, wanted)
    with torch.no_grad():
        place = _held(hidden, len(weight), linear, [len(targets) for _, targets, _ in parts])
        found = [run.add(part, place) for part in parts]
        del place
        values, metrics, found_logps = zip(*found, strict=True)
        grad_weight = None if run.grad_weight is None else run.grad_weight.to(weight.dtype)
        value = sum(values[1:], values[0])
    return _Given.apply(hidden, weight, value, run.grad_hidden, grad_weight), list(metrics), torch.cat(found_logps)


@dataclass
class _OnePass:
    """The gradients of the parts so far."""

    hidden: torch.Tensor
    weight: torch.Tensor
    linear: bool
    tiles: Tiles
    wanted: Wanted
    grad_hidden: torch.Tensor | None = None
    grad_weight: torch.Tensor | None = None

    def add(self, part: Part, place: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """A part's value, metrics and logp. Its logits wait in `place` if they fit, and else are made again."""
        rows, targets, loss = part
        x = _take(self.hidden, rows)
        if self.linear and len(x) > len(place):
            return self._at_once(x, part)
        logits = place[: len(x)] if len(x) <= len(place) else None
        logp, lse = self.tiles.logprobs(x, self.weight, targets, logits)
        value, metrics, slope = _slope(loss, logp)
        given = x, self.weight, targets, lse, slope, torch.zeros_like(slope), logits
        grad_x, self.grad_weight = self.tiles.gradients(*given, self.wanted, self.grad_weight)
        self._add_hidden(rows, grad_x)
        return value, metrics, logp

    def _at_once(self, x: torch.Tensor, part: Part) -> tuple[torch.Tensor, Any, torch.Tensor]:
        rows, targets, loss = part
        promised = _slope(loss, torch.zeros(len(x), dtype=_wide(x), device=x.device))[2]
        given = x, self.weight, targets, promised
        logp, grad_x, self.grad_weight = self.tiles.at_once(*given, self.wanted, self.grad_weight)
        self._add_hidden(rows, grad_x)
        value, metrics, slope = _slope(loss, logp)
        return torch.where((slope == promised).all(), value, float("nan")), metrics, logp

    def _add_hidden(self, rows: torch.Tensor | None, grad_x: torch.Tensor | None) -> None:
        if grad_x is None or rows is None:
            self.grad_hidden = grad_x
            return
        if self.grad_hidden is None:
            self.grad_hidden = torch.zeros_like(self.hidden)
        _add_rows(self.grad_hidden, rows, grad_x)


def _add_rows(x: torch.Tensor, rows: torch.Tensor, added: torch.Tensor) -> None:
    """x[rows] += added, where a row may count more than once. In one order: with several threads torch's `index_put_` on a CPU
    adds as they come, and `index_add_` on a GPU."""
    if x.device.type == "cpu":
        x.index_add_(0, rows, added)
    else:
        x.index_put_((rows,), added, accumulate=True)


def _slope(loss: Loss, logp: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """The loss at logp, its metrics, d loss / d logp."""
    with torch.enable_grad():
        leaf = logp.detach().requires_grad_()
        value, metrics = loss(leaf)
        (slope,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
    return value.detach(), metrics, slope


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tiles: Tiles
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logp, lse = tiles.logprobs(hidden, weight, targets)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.tiles = tiles
        return logp, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight = ctx.saved_tensors[1]
        wanted = ctx.needs_input_grad[:2]
        grad_hidden, grad_weight = ctx.tiles.gradients(*ctx.saved_tensors, grad_logp, grad_lse, wanted=wanted)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


class _Given(torch.autograd.Function):
    """A value whose gradients are there already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        value: torch.Tensor,
        grad_hidden: torch.Tensor | None,
        grad_weight: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.gradients = grad_hidden, grad_weight
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were given away by its first backward: compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if x is None else x.mul_(upstream) for x in gradients), None, None, None


def group_rows(weight: torch.Tensor) -> int:
    """How many rows a part may have for the least memory at full speed: a caller makes parts of several losses of them."""
    return _group_bytes(weight.device) // (len(weight) * _wide(weight).itemsize)


def _group_bytes(device: torch.device) -> int:
    return min(GROUP_BYTES, HELD_BYTES) if device.type == "cpu" else HELD_BYTES


def _held(hidden: torch.Tensor, vocab: int, linear: bool, sizes: Sequence[int]) -> torch.Tensor:
    """Where logits wait for the slope of their loss, one part's after the other's: [rows of the longest that fits, vocab]."""
    limit = _group_bytes(hidden.device) if linear else HELD_BYTES
    fitting = [rows for rows in sizes if rows * vocab * _wide(hidden).itemsize <= limit]
    return _matrix(max(fitting, default=0), vocab, _wide(hidden), hidden.device)


def _take(hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return hidden if rows is None else hidden[rows]


def _zeros(hidden: torch.Tensor, weight: torch.Tensor, wanted: Wanted, total: torch.Tensor | None) -> Gradients:
    """Of no rows."""
    grad_weight = torch.zeros_like(weight) if total is None else total
    return torch.zeros_like(hidden) if wanted[0] else None, grad_weight if wanted[1] else None


def _pieces(rows: slice) -> list[slice]:
    """Of a tile of torch's, so that what goes over its logits again and again finds them in a cache."""
    return _slices(rows.start, rows.stop, 16)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tile_rows(vocab: int, tile_bytes: int, dtype: torch.dtype, multiple: int = 1) -> int:
    return max(16, tile_bytes // (vocab * dtype.itemsize) // multiple * multiple)


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def _matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Empty, and its rows begin at multiples of 64 elements: an odd vocabulary shall not cost the products their speed."""
    return torch.empty(rows, -(-columns // 64) * 64, dtype=dtype, device=device)[:, :columns]


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
    """a @ b into (or onto) out, which may be wider than they; summed in fp32 or wider and rounded once.

    torch has products of 16-bit matrices with an fp32 result for CUDA alone.
    """
    if a.device.type == "cpu":
        exact = a.to(_wide(a)) @ b.to(_wide(b))
        out.add_(exact) if add else out.copy_(exact)
        return
    with sums_in_fp32():
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)


@contextmanager
def sums_in_fp32() -> Iterator[None]:
    """cuBLAS may split a sum and, unless told not to, add the parts in the dtype of the result."""
    settings = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    allowed = [name for name in names if getattr(settings, name)]
    try:
        for name in allowed:
            setattr(settings, name, False)
        yield
    finally:
        for name in allowed:
            setattr(settings, name, True)


# What a GPU does in each schedule: "forward", "recompute" (forward and backward), and one pass, "held" with all logits kept
# and "at once" without.


def flops(rows: int, dim: int, vocab: int, schedule: str, tiles: TritonTiles = TRITON) -> int:
    again = vocab - tiles.kept(vocab)
    columns = {"forward": vocab, "recompute": 4 * vocab, "held": 3 * vocab, "at once": 3 * vocab + again}[schedule]
    return 2 * rows * dim * columns


def bytes(rows: int, dim: int, vocab: int, schedule: str, itemsize: int = 2, tiles: TritonTiles = TRITON) -> int:
    """Logits, their gradients, and dX while it is summed: what goes through memory between the products.

    The products' operands (hidden, weight) come on top, but are read under the products.
    """
    wide = max(itemsize, 4)
    logits, x = rows * vocab, rows * dim
    forward = 2 * wide * logits  # written, and read for lse
    if schedule == "forward":
        return forward
    if schedule == "at once":
        again = rows * (vocab - tiles.kept(vocab))
        in_rows = (wide + 2 * itemsize) * logits + itemsize * (logits - again)
        return forward + in_rows + (2 * wide + 2 * itemsize) * again + (4 * wide + itemsize) * x
    backward = (wide + 3 * itemsize) * logits + (wide * 2 * -(-vocab // tiles.columns) + itemsize) * x
    return forward + backward + (wide * logits if schedule == "recompute" else 0)


def memory(rows: int, dim: int, vocab: int, schedule: str, itemsize: int = 2, tiles: TritonTiles = TRITON) -> int:
    """What a call takes at its peak besides the gradients of hidden and weight, and a few numbers a row."""
    wide = max(itemsize, 4)
    width, padded, kept = min(tiles.columns, vocab), -(-vocab // 64) * 64, tiles.kept(vocab)
    grad_hidden, grad_weight = rows * dim * itemsize, vocab * dim * itemsize
    tile = tiles.row_tile(rows, vocab)
    row_tile, gradients = tile * padded * wide, rows * width * itemsize
    column_tile = min(tiles.rows, rows) * width * wide + gradients
    sums = rows * dim * wide if itemsize < wide else 0  # of dX, which comes itself when they are done
    waiting = grad_hidden if sums else 0
    if schedule == "forward":
        return row_tile
    if schedule == "recompute":
        return max(row_tile - grad_hidden - grad_weight, column_tile + sums - waiting, sums)
    if schedule == "held":
        return rows * padded * wide + max(gradients + sums - waiting, sums)
    others = tile * (-(-(vocab - kept) // 64) * 64 * itemsize + dim * wide)
    return max(rows * kept * itemsize + max(row_tile + others - grad_weight, 0), column_tile)
