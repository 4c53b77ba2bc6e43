"""int8 for sampling, and what it costs.

`LLM(model, quantization="int8")` rounds matrices to 8 bits, one scale for each output, and the rows they are multiplied
with to 8 bits in groups of neighbours (kernels/linear.py). `quantization_error` tells how far the model's next-token
distributions move by that: a quarter of the weights' bytes is not free, and how much it costs depends on the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from engine.errors import InputError
from engine.model import Llama, tree_attend
from engine.packed import PackedWeights

HEAD_ROWS = 256  # rows of logits at a time


class QuantizationError(NamedTuple):
    """Over all tokens of some sequences, between the model as it is (p) and quantised (q)."""

    tokens: int
    kl: float  # mean of sum p log(p / q), nats
    worst_kl: float  # the largest of one token
    top1: float  # share of tokens behind which p and q have the same likeliest one
    logprob: float  # mean |log p - log q| of the token that follows, nats

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens: KL {self.kl:.2e} nats a token (worst {self.worst_kl:.2e}), the same likeliest token "
            f"behind {self.top1:.2%}, |log p - log q| of the next token {self.logprob:.2e}"
        )


def quantization_error(
    model: Llama, sequences: Iterable[Sequence[int]], quantization: str | None = "int8", threads: int = 1
) -> QuantizationError:
    """Both distributions behind every token of `sequences` (token ids, two or more each), by the CPU sampler's kernels.

    InputError if there are no such sequences.
    """
    own, rounded = PackedWeights(), PackedWeights(quantization)
    parts: list[torch.Tensor] = []  # [3, tokens]: KL, same likeliest, difference of log-probs
    for ids in sequences:
        if len(ids) < 2:
            continue
        tokens = torch.tensor(ids)
        hidden = [_hidden(model, tokens, packed, threads) for packed in (own, rounded)]
        for start in range(0, len(ids), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            p, q = (
                packed(h[rows], model.head, threads).double().log_softmax(-1)
                for h, packed in zip(hidden, (own, rounded), strict=True)
            )
            following = tokens[start + 1 : start + 1 + len(p)]
            moved = torch.zeros(len(p), dtype=torch.float64).fill_(torch.nan)
            each = torch.arange(len(following))
            moved[: len(following)] = (p[each, following] - q[each, following]).abs()
            parts.append(torch.stack([(p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).double(), moved]))
    if not parts:
        raise InputError("there is no sequence of two tokens or more to compare on")
    kl, same, moved = torch.cat(parts, dim=1)
    return QuantizationError(len(kl), kl.mean().item(), kl.max().item(), same.mean().item(), moved.nanmean().item())


@torch.no_grad()
def _hidden(model: Llama, tokens: torch.Tensor, packed: PackedWeights, threads: int) -> torch.Tensor:
    positions, end = torch.arange(len(tokens)), torch.full((len(tokens),), len(tokens))
    return model(tokens, positions, tree_attend(end), packed.kernels(threads))
