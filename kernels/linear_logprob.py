"""Log-probability per token from hidden states and the head, without ever holding all logits.

    logits[n, :] = weight @ hidden[n]            (fp32, or wider)
    lse[n]  = log sum exp logits[n, :]
    logp[n] = logits[n, targets[n]] - lse[n]

hidden [N, dim], weight [vocab, dim], targets [N] int64 -> logp [N], lse [N], fp32 (fp64 for fp64 input).
The *recompute* schedule: the forward saves hidden, targets and lse; the backward makes each tile of logits again.
"""

import torch

TILE_BYTES = 64 << 20  # logits held at once


def linear_logprob_reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once, gradients by autograd: what the tiled version must equal."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    lse = torch.logsumexp(logits, dim=-1)
    return logits.gather(1, targets[:, None]).squeeze(1) - lse, lse


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tile_bytes: int = TILE_BYTES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles over rows of at most `tile_bytes` of logits, forward and backward; both outputs are differentiable."""
    logp, lse = _LinearLogprob.apply(hidden, weight, targets, tile_bytes)
    return logp, lse


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, tile_bytes):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(wide)
        logp = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        lse = torch.empty_like(logp)
        for rows in _tiles(len(hidden), len(weight), tile_bytes, wide):
            logits = hidden[rows].to(wide) @ head.T  # [tile, vocab]
            torch.logsumexp(logits, dim=-1, out=lse[rows])
            logp[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - lse[rows]
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.tile_bytes = tile_bytes
        return logp, lse

    @staticmethod
    def backward(ctx, grad_logp, grad_lse):  # type: ignore[no-untyped-def]
        hidden, weight, targets, lse = ctx.saved_tensors
        wide = lse.dtype
        head = weight.to(wide)
        grad_hidden = torch.empty(hidden.shape, dtype=wide, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        for rows in _tiles(len(hidden), len(weight), ctx.tile_bytes, wide):
            x = hidden[rows].to(wide)
            grad_logits = torch.exp((x @ head.T).sub_(lse[rows, None]))  # softmax [tile, vocab]
            grad_logits.mul_((grad_lse[rows] - grad_logp[rows])[:, None])
            grad_logits.scatter_add_(1, targets[rows, None], grad_logp[rows, None])
            grad_hidden[rows] = grad_logits @ head
            grad_weight.addmm_(grad_logits.T, x)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None


def _tiles(rows: int, vocab: int, tile_bytes: int, dtype: torch.dtype) -> list[slice]:
    size = max(16, tile_bytes // (vocab * dtype.itemsize))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
