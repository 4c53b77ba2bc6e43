"""The native CPU kernels as differentiable functions of fp32 tensors: what the trainer computes with on a CPU.

Every one gives the same bits with and without gradients and for any number of threads (torch's number is taken), and
keeps for its backward what it was given, not what it made on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable

import engine._C as _C
from engine.kernels.linear_logprob import BOTH, Gradients, Pair, Wanted, at_once_by_rows


def array(x: torch.Tensor) -> Any:
    """As numpy has it, bf16 as its bits; copied if it is not contiguous."""
    return view(x.contiguous())


def view(x: torch.Tensor) -> Any:
    """As `array`, but never a copy: for what is written, and rows that lie apart."""
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _empty(*shape: Any) -> torch.Tensor:
    """Whatever torch's default dtype and device are."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None, add: bool = False) -> torch.Tensor:
    """a [rows, depth] @ b [depth, columns], in `out` if there is one, or added to it. Rows of the three may lie apart, of
    a and b instead the columns. Not differentiable."""
    if out is None:
        out = _empty(len(a), b.shape[1])
    if not a.shape[1]:
        return out if add else out.zero_()
    _C.product(_matrix(a), _matrix(b), view(out), add, torch.get_num_threads())
    return out


def dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [N, in], weight [out, in] -> x @ weight.T [N, out]. Differentiable."""
    return _Dense.apply(x, weight)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        return product(dy, weight) if for_x else None, product(dy.T, x) if for_weight else None


def _matrix(x: torch.Tensor) -> Any:
    rows, columns = x.stride()
    by_rows = columns == 1 and rows >= x.shape[1]
    by_columns = rows == 1 and columns >= x.shape[0]
    return view(x if by_rows or by_columns else x.contiguous())


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [N, dim], weight [dim] -> [N, dim]. Differentiable."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out = _empty(x.shape)
        _C.rms_norm(array(x), array(weight), eps, out.numpy(), torch.get_num_threads())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        return *_rms_norm_gradient(x, weight, ctx.eps, dy, None), None


def add_rms_norm(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and branch [N, dim] -> their sum, and its norm. Differentiable."""
    return _AddRMSNorm.apply(x, branch, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, out = _empty(x.shape), _empty(x.shape)
        threads = torch.get_num_threads()
        _C.add_rms_norm(array(x), array(branch), array(weight), eps, total.numpy(), out.numpy(), threads)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: torch.Tensor | None, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return dtotal, dtotal, None, None
        total, weight = ctx.saved_tensors
        dx, dweight = _rms_norm_gradient(total, weight, ctx.eps, dy, dtotal)
        return dx, dx, dweight, None


def _rms_norm_gradient(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dy: torch.Tensor, dtotal: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dweight = _empty(x.shape), _empty(weight.shape)
    added = None if dtotal is None else array(dtotal)
    threads = torch.get_num_threads()
    _C.rms_norm_gradient(array(x), array(weight), eps, array(dy), added, dx.numpy(), dweight.numpy(), threads)
    return dx, dweight


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [N, 2 * ffn], gate first -> [N, ffn]. Differentiable."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        out = _empty(len(gate_up), gate_up.shape[1] // 2)
        _C.swiglu(array(gate_up), out.numpy(), torch.get_num_threads())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        out = _empty(gate_up.shape)
        _C.swiglu_gradient(array(gate_up), array(dout), out.numpy(), torch.get_num_threads())
        return out


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [N, heads, D] whose rows may lie apart, cos and sin [N, D/2] -> [N, heads, D]. Differentiable in x."""
    return _Rope.apply(x, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(dout, cos, sin, back=True), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    out = _empty(x.shape)
    _C.rope(_rows(x), array(cos), array(sin), out.numpy(), back, torch.get_num_threads())
    return out


def windows(end: torch.Tensor) -> NDArray[np.int64]:
    """end [N] int64, as `Pack.end` -> where its trees begin, and their end [trees + 1]: nobody sees across a bound."""
    if not len(end):
        return np.zeros(1, np.int64)
    reach = np.maximum.accumulate(end.numpy())
    return np.concatenate(([0], 1 + np.flatnonzero(reach[:-1] <= np.arange(1, len(reach))), [len(reach)]))


def tree_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: torch.Tensor, bounds: NDArray[np.int64]
) -> torch.Tensor:
    """q [N, H, D], k and v [N, G, D] -> [N, H, D]; query i sees key j iff j <= i < end[j]. bounds: `windows(end)`.
    Rows may lie apart. Differentiable."""
    return _TreeAttention.apply(q, k, v, end, bounds)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: torch.Tensor, bounds: NDArray[np.int64]
    ) -> torch.Tensor:
        v = v.contiguous()  # a view would keep the whole projection until the backward, three times as much
        out, lse = _empty(q.shape), _empty(q.shape[1], len(q))
        given = _rows(q), _rows(k), _rows(v), array(end), bounds
        _C.tree_attention(*given, out.numpy(), lse.numpy(), torch.get_num_threads())
        ctx.save_for_backward(q, k, v, end, out, lse)
        ctx.bounds = bounds
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, end, out, lse = ctx.saved_tensors
        dq, dk, dv = (_empty(x.shape) for x in (q, k, v))
        given = _rows(q), _rows(k), _rows(v), array(end), ctx.bounds, view(out), view(lse), array(dout)
        _C.tree_attention_gradient(*given, dq.numpy(), dk.numpy(), dv.numpy(), torch.get_num_threads())
        return dq, dk, dv, None, None


def _rows(x: torch.Tensor) -> Any:
    """[N, heads, D] whose heads lie one behind the other; copied if they do not."""
    return view(x if x.stride()[1:] == (x.shape[2], 1) and x.stride(0) >= x.shape[1] * x.shape[2] else x.contiguous())


class LogprobTiles:
    """`kernels/linear_logprob.py` on native products, in tiles of columns.

    A tile is all rows x COLUMNS logits, 17 MB for 2,048 rows, forward and backward: the head is packed once for each of
    the four products (in tiles of rows of this size 17 times), a tile's dW is one product, and dX is added to. The width
    is fixed, so that a row's log-prob has the same bits in every schedule and beside any other rows.
    """

    COLUMNS = 2048
    ROW_BYTES = 48 << 20  # logits of a tile of rows, where the slope of the loss is known beforehand

    def logprobs(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor | None = None
    ) -> Pair:
        """logp and lse. logits [N, vocab], if given, is filled for `gradients`. A target that is no token has NaN."""
        rows, ids = len(hidden), array(targets)
        best, hit = _empty(rows).fill_(-torch.inf), _empty(rows).fill_(torch.nan)
        total = torch.zeros(rows, dtype=torch.float64)
        for columns, tile in self._tiles(rows, len(weight), logits):
            product(hidden, weight[columns].T, tile)
            state = best.numpy(), total.numpy(), hit.numpy()
            _C.logprob(view(tile), ids, columns.start, *state, torch.get_num_threads())
        lse = (torch.where(best.isinf(), 0.0, best).double() + total.log()).float()
        return hit - lse, lse

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
        """Those of hidden and weight; logits, where `logprobs` has kept them, are used up."""
        add = total is not None
        grad_hidden = _empty(hidden.shape).zero_() if wanted[0] else None
        grad_weight = (total if add else _empty(weight.shape)) if wanted[1] else None
        if not len(hidden):
            return grad_hidden, grad_weight if grad_weight is None or add else grad_weight.zero_()
        given = array(targets), array(lse), array(grad_logp), array(grad_lse)
        for columns, tile in self._tiles(len(hidden), len(weight), logits):
            if logits is None:
                product(hidden, weight[columns].T, tile)
            _C.logprob_gradient(view(tile), given[0], columns.start, *given[1:], torch.get_num_threads())
            if grad_hidden is not None:
                product(tile, weight[columns], grad_hidden, add=True)
            if grad_weight is not None:
                product(tile.T, hidden, grad_weight[columns], add)
        return grad_hidden, grad_weight

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
        return at_once_by_rows(self, hidden, weight, targets, grad_logp, wanted, total, self.ROW_BYTES)

    def _tiles(self, rows: int, vocab: int, logits: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Columns and the place of their logits: in `logits`, or each in the place of the one before. Its rows are an odd
        number of cache lines apart: at a distance of 8 KB they would get into each other's way in the caches."""
        width = min(self.COLUMNS, vocab)
        place = _empty(rows, (-(-width // 16) | 1) * 16) if logits is None else logits
        for start in range(0, vocab, self.COLUMNS):
            columns = slice(start, min(start + self.COLUMNS, vocab))
            yield columns, place[:, : columns.stop - start] if logits is None else logits[:, columns]
