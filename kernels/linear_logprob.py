"""Log-probability per token from hidden states and the head, without ever holding all logits.

    logits[n, :] = weight @ hidden[n]            (fp32, or wider: they leave the product's accumulator unrounded)
    lse[n]  = log sum exp logits[n, :]
    logp[n] = logits[n, targets[n]] - lse[n]
    dlogits[n, v] = softmax[n, v] * (dlse[n] - dlogp[n]) + [v = targets[n]] * dlogp[n]

hidden [N, dim], weight [vocab, dim], targets [N] int64 -> logp [N], lse [N], fp32 (fp64 for fp64 input). The N rows are
those that count: a caller leaves ignored tokens out before it comes here.

Two schedules. *Recompute*, `linear_logprob`: the forward saves hidden, targets and lse; the backward makes each tile of
logits again. 8 N dim vocab FLOPs, any gradient of both results. *One pass*, `linear_logprob_loss`: the slope of the loss
is known while the logits are there, so that nothing is made again. That is so where all logits fit HELD_BYTES, and where
the loss is linear in logp. Size alone decides. Both take the same tiles of rows, so logp is the same bits.

Where the products run, on a GPU. At N = 8192, dim = 4096, vocab = 32000 in bf16 a product is 2.15 TFLOP: 2.7 ms at 790
TFLOP/s, which cuBLAS reaches. A tile of fp32 logits that goes through memory costs 8 bytes a logit, 0.5 ms of 4.3 TB/s,
which is less than what a product of Triton's own loses by running at 500 to 600 TFLOP/s (1 to 1.6 ms for each of the
three or four). So the products are cuBLAS's, in few large tiles, and Triton reads a tile once for lse and logp, and once
for the gradient, which it writes in the product's dtype. On paper, in ms, without launches:

    eager      products 8.2; logits in bf16, fp32, log-softmax and their gradients 2.6           10.7
    recompute  products 10.9; logits written and read twice, gradients 1.3; dX summed 0.5        12.7   (1.2 of eager)
    one pass   products 8.8; logits, gradients, dX summed 1.4; gradients scaled 0.2              10.3   (0.96)

Memory decides the loops. lse and dX want all columns of some rows, dW wants all rows of some columns. dW summed over
tiles of rows has to be fp32: 524 MB of its own here, an eighth of what eager takes for all its logits, read and written
once a tile. So the backward's tiles are columns: dW leaves one product over all N rows, rounded once, and what is summed
over tiles is dX, 4 bytes an element. In one pass the tiles are rows, because a slope is of no use before lse is known:
their gradients give dX at once, and are kept in bf16 for dW, 2 bytes a logit. Kept for at most 4/5 of the vocabulary,
that is at most a tenth of eager's 16 bytes a logit; the rest's logits are made again, as in the other schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .jit import acc, jit, power_of_two, tl

TILE_BYTES = 64 << 20  # logits held at once on a CPU
HELD_BYTES = 256 << 20  # all logits of a call are held for its backward if they fit: 2097 rows of 32000
Pair = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.Tensor], tuple[torch.Tensor, Any]]


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
        for rows in _tiles(len(hidden), len(weight), self.tile_bytes, logp.dtype):
            tile = self._logprob_tile(hidden[rows].to(logp.dtype), head, targets[rows], logp[rows], lse[rows])
            if logits is not None:
                logits[rows] = tile
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
    ) -> Pair:
        """Gradients of hidden and weight; logits, where `logprobs` has kept them, are used up."""
        head = weight.to(lse.dtype)
        grad_hidden = torch.empty(hidden.shape, dtype=lse.dtype, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        for rows in _tiles(len(hidden), len(weight), self.tile_bytes, lse.dtype):
            x = hidden[rows].to(lse.dtype)
            tile = x @ head.T if logits is None else logits[rows]
            grad_logits = self._gradient_tile(tile, targets[rows], lse[rows], grad_logp[rows], grad_lse[rows])
            grad_hidden[rows] = grad_logits @ head
            grad_weight.addmm_(grad_logits.T, x)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)

    def at_once(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, grad_logp: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """logp and the gradients of hidden and weight, for a slope of the loss that is known beforehand."""
        logp, lse = torch.empty_like(grad_logp), torch.empty_like(grad_logp)
        head = weight.to(logp.dtype)
        grad_hidden = torch.empty(hidden.shape, dtype=logp.dtype, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, dtype=logp.dtype, device=weight.device)
        for rows in _tiles(len(hidden), len(weight), self.tile_bytes, logp.dtype):
            x, slope = hidden[rows].to(logp.dtype), grad_logp[rows]
            tile = self._logprob_tile(x, head, targets[rows], logp[rows], lse[rows])
            grad_logits = self._gradient_tile(tile, targets[rows], lse[rows], slope, torch.zeros_like(slope))
            grad_hidden[rows] = grad_logits @ head
            grad_weight.addmm_(grad_logits.T, x)
        return logp, grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)

    @staticmethod
    def _logprob_tile(
        x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, logp: torch.Tensor, lse: torch.Tensor
    ) -> torch.Tensor:
        logits = x @ head.T  # [tile, vocab]
        torch.logsumexp(logits, dim=-1, out=lse)
        logp.copy_(logits.gather(1, targets[:, None]).squeeze(1) - lse)
        return logits

    @staticmethod
    def _gradient_tile(
        logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, grad_logp: torch.Tensor, grad_lse: torch.Tensor
    ) -> torch.Tensor:
        grad_logits = torch.exp(logits.sub_(lse[:, None]))  # softmax [tile, vocab]
        grad_logits.mul_((grad_lse - grad_logp)[:, None])
        return grad_logits.scatter_add_(1, targets[:, None], grad_logp[:, None])


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

    128 MB are 1024 rows of 32000 logits: 128 output tiles of 128 x 256 for dX, a wave of the 132 multiprocessors of an
    H100, and 1000 for the logits. 4096 columns give dW 512 of them.
    """

    tile_bytes: int = 128 << 20  # logits of one tile of rows
    columns: int = 4096  # of one tile of columns: with its gradient 24 KB a row, where eager has 512

    def logprobs(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor | None = None
    ) -> Pair:
        logp = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        lse = torch.empty_like(logp)
        for rows, tile in self._rows(hidden, weight, logits):
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
    ) -> Pair:
        if not len(hidden):
            return torch.zeros_like(hidden), torch.zeros_like(weight)
        grad_weight = torch.empty_like(weight)
        grad_hidden = torch.empty(hidden.shape, dtype=lse.dtype, device=hidden.device)
        grad_logp, grad_lse = grad_logp.contiguous(), grad_lse.contiguous()
        buffer = torch.empty(len(hidden), min(self.columns, len(weight)), dtype=hidden.dtype, device=hidden.device)
        for block, tile in self._columns(hidden, weight, 0, logits):
            grad_logits = buffer[:, : tile.shape[1]]
            _run_gradient(tile, targets, lse, grad_logp, grad_lse, grad_logits, block.start)
            _product(grad_logits.T, hidden, grad_weight[block])
            _product(grad_logits, weight[block], grad_hidden, add=block.start > 0)
        return grad_hidden.to(hidden.dtype), grad_weight

    def at_once(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, grad_logp: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not len(hidden):
            return torch.empty_like(grad_logp), torch.zeros_like(hidden), torch.zeros_like(weight)
        zero = torch.zeros_like(grad_logp)
        logp, lse, grad_hidden, kept = self._rows_at_once(hidden, weight, targets, grad_logp, zero)
        first = kept.shape[1]
        grad_weight = torch.empty_like(weight)  # only now: the tile of rows is gone
        _product(kept.T, hidden, grad_weight[:first])
        del kept
        buffer = torch.empty(len(hidden), min(self.columns, len(weight)), dtype=hidden.dtype, device=hidden.device)
        for block, tile in self._columns(hidden, weight, first):
            grad_logits = buffer[:, : tile.shape[1]]
            _run_gradient(tile, targets, lse, grad_logp, zero, grad_logits, block.start)
            _product(grad_logits.T, hidden, grad_weight[block])
        return logp, grad_hidden, grad_weight

    def _rows_at_once(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        grad_logp: torch.Tensor,
        grad_lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """logp, lse, the gradient of hidden, and that of the first logits of every row, [N, kept]."""
        logp, lse = torch.empty_like(grad_logp), torch.empty_like(grad_logp)
        grad_hidden = torch.empty_like(hidden)
        first = self.kept(len(weight))
        kept = torch.empty(len(hidden), first, dtype=hidden.dtype, device=hidden.device)
        rest, total = None, None
        for rows, tile in self._rows(hidden, weight):
            _run_logprob(tile, targets[rows], logp[rows], lse[rows])
            if rest is None or total is None:  # the first tile is the largest
                rest = _matrix(len(tile), len(weight) - first, hidden.dtype, hidden.device)
                total = torch.empty(len(tile), hidden.shape[1], dtype=lse.dtype, device=hidden.device)
            sums = total[: len(tile)]
            given = targets[rows], lse[rows], grad_logp[rows], grad_lse[rows]
            if first:
                _run_gradient(tile[:, :first], *given, kept[rows], 0)
                _product(kept[rows], weight[:first], sums)
            _run_gradient(tile[:, first:], *given, rest[: len(tile)], first)
            _product(rest[: len(tile)], weight[first:], sums, add=first > 0)
            grad_hidden[rows] = sums
        return logp, lse, grad_hidden, kept

    def kept(self, vocab: int) -> int:
        """Columns whose gradients wait for dW in one pass: whole tiles of at most 4/5 of the vocabulary."""
        return vocab * 4 // 5 // self.columns * self.columns

    def row_tile(self, rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> int:
        """Rows of the first tile, from sizes alone, so that both schedules have the same."""
        return max(1, min(rows, _tile_rows(vocab, self.tile_bytes, dtype, multiple=128)))

    def _rows(
        self, hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of some rows [rows, vocab], in their place in `logits` or each in the place of the one before."""
        wide, vocab = _wide(hidden), len(weight)
        size = self.row_tile(len(hidden), vocab, wide)
        place = _matrix(size, vocab, wide, hidden.device) if logits is None else logits
        for start in range(0, len(hidden), size):
            rows = slice(start, min(start + size, len(hidden)))
            tile = place[rows] if logits is not None else place[: rows.stop - start]
            _product(hidden[rows], weight.T, tile)
            yield rows, tile

    def _columns(
        self, hidden: torch.Tensor, weight: torch.Tensor, first: int, logits: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of some columns [N, columns], from column `first` on: those in `logits`, or made again."""
        wide, vocab = _wide(hidden), len(weight)
        place = None
        for start in range(first, vocab, self.columns):
            block = slice(start, min(start + self.columns, vocab))
            if logits is not None:
                yield block, logits[:, block]
                continue
            if place is None:
                place = torch.empty(len(hidden), block.stop - start, dtype=wide, device=hidden.device)
            tile = place[:, : block.stop - start]
            _product(hidden, weight[block].T, tile)
            yield block, tile


Tiles = TorchTiles | TritonTiles
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
    """`loss` of the log-probs -> its value (differentiable in hidden and weight), its metrics, logp [N] (detached).

    loss maps logp [N] to (scalar, anything) and depends on the weights through logp alone. linear: its slope is the same
    at every logp, as SFT's is; it is then asked for at logp = 0, before there are logits, and once more at the end: if the
    answers differ the value is NaN, not a wrong gradient. One pass where the logits fit HELD_BYTES or the loss is linear,
    recompute otherwise. In one pass the gradients are there before the backward, which scales and gives them away: once.
    """
    wide = _wide(hidden)
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    fits = len(hidden) * len(weight) * wide.itemsize <= HELD_BYTES
    if not differentiable or not (fits or linear):
        logp = linear_logprob(hidden, weight, targets, tiles)[0]
        return *loss(logp), logp.detach()
    with torch.no_grad():
        if fits:
            logits = _matrix(len(hidden), len(weight), wide, hidden.device)
            logp, lse = tiles.logprobs(hidden, weight, targets, logits)
            value, metrics, slope = _slope(loss, logp)
            given = tiles.gradients(hidden, weight, targets, lse, slope, torch.zeros_like(slope), logits)
        else:
            promised = _slope(loss, torch.zeros(len(hidden), dtype=wide, device=hidden.device))[2]
            logp, *given = tiles.at_once(hidden, weight, targets, promised)
            value, metrics, slope = _slope(loss, logp)
            value = torch.where((slope == promised).all(), value, float("nan"))
    return _Given.apply(hidden, weight, value, *given), metrics, logp


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
        return *ctx.tiles.gradients(*ctx.saved_tensors, grad_logp, grad_lse), None, None


class _Given(torch.autograd.Function):
    """A value whose gradients are there already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        value: torch.Tensor,
        grad_hidden: torch.Tensor,
        grad_weight: torch.Tensor,
    ) -> torch.Tensor:
        ctx.gradients = grad_hidden, grad_weight
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were given away by its first backward: compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        wanted = [x.mul_(upstream) if needs else None for x, needs in zip(gradients, ctx.needs_input_grad)]
        return *wanted, None, None, None


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tile_rows(vocab: int, tile_bytes: int, dtype: torch.dtype, multiple: int = 1) -> int:
    return max(16, tile_bytes // (vocab * dtype.itemsize) // multiple * multiple)


def _tiles(rows: int, vocab: int, tile_bytes: int, dtype: torch.dtype) -> list[slice]:
    size = _tile_rows(vocab, tile_bytes, dtype)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


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
    with _sums_in_fp32():
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)


@contextmanager
def _sums_in_fp32() -> Iterator[None]:
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
