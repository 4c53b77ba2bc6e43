"""From token lists to token trees: what a training row is, and in which order rows are visited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import InputError
from engine.tree import TokenTree


@dataclass(frozen=True)
class SFTRow:
    """Loss on the completion only. The prompt begins with BOS; the completion ends with EOS if it ended by itself."""

    prompt: Sequence[int]
    completion: Sequence[int]


@dataclass(frozen=True)
class DPORow:
    """One preference. `reference` holds the reference model's log-prob sums (chosen, rejected): `reference_logprobs`."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    reference: tuple[float, float] | None = None


def sft_tree(row: SFTRow, number: int) -> TokenTree:
    return TokenTree(row.prompt, children=(TokenTree(row.completion, weight=1.0, sequence=number),))


def dpo_tree(row: DPORow, number: int) -> TokenTree:
    """The prompt once, then both answers; pair `number` has the sequences 2 * number (chosen) and 2 * number + 1."""
    chosen = TokenTree(row.chosen, weight=1.0, sequence=2 * number)
    rejected = TokenTree(row.rejected, weight=1.0, sequence=2 * number + 1)
    return TokenTree(row.prompt, children=(chosen, rejected))


def check_rows(rows: Sequence[SFTRow | DPORow], vocab_size: int, max_seq_len: int) -> None:
    """Raise InputError naming the first row that cannot be trained on."""
    if not rows:
        raise InputError("there are no rows to train on")
    for number, row in enumerate(rows):
        parts = {"prompt": row.prompt, **_answers(row)}
        for name, ids in parts.items():
            if len(ids) == 0:
                raise InputError(f"row {number}: {name} has no tokens; drop the row")
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise InputError(f"row {number}: {name} has a token outside 0..{vocab_size - 1}; wrong tokenizer?")
        longest = len(row.prompt) + max(len(ids) for ids in _answers(row).values())
        if longest > max_seq_len:
            raise InputError(f"row {number} has {longest} tokens; the model's context is {max_seq_len}: cut or drop it")


def _answers(row: SFTRow | DPORow) -> dict[str, Sequence[int]]:
    if isinstance(row, SFTRow):
        return {"completion": row.completion}
    return {"chosen": row.chosen, "rejected": row.rejected}


def batch_order(rows: int, batch_size: int, epochs: int, seed: int, max_steps: int | None) -> list[list[int]]:
    """Row numbers of every step: a fresh permutation per epoch from `seed`; the last batch of an epoch may be smaller."""
    batches = [batch for epoch in range(epochs) for batch in _epoch(rows, batch_size, seed, epoch)]
    return batches if max_steps is None else batches[:max_steps]


def _epoch(rows: int, batch_size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows).tolist()
    return (order[start : start + batch_size] for start in range(0, rows, batch_size))
