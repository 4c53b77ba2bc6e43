"""From token lists to token trees: what a training row is, and in which order rows are visited."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.tree import TokenTree

REPLAY = 1 << 32  # permutations from here on order the replay rows, those below the epochs


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


def row_key(row: int) -> int:
    """Dropout key of row `row`'s prompt; its answers follow with + 1 and + 2. `row` counts in the whole data, from 0;
    replay rows count from -1 downwards, so that they have keys of their own."""
    return 4 * row


def sft_tree(row: SFTRow, number: int, key: int = 0) -> TokenTree:
    completion = TokenTree(row.completion, weight=1.0, sequence=number, key=key + 1)
    return TokenTree(row.prompt, children=(completion,), key=key)


def dpo_tree(row: DPORow, number: int, key: int = 0) -> TokenTree:
    """The prompt once, then both answers; pair `number` has the sequences 2 * number (chosen) and 2 * number + 1."""
    chosen = TokenTree(row.chosen, weight=1.0, sequence=2 * number, key=key + 1)
    rejected = TokenTree(row.rejected, weight=1.0, sequence=2 * number + 1, key=key + 2)
    return TokenTree(row.prompt, children=(chosen, rejected), key=key)


def check_kinds(rows: Any, kind: type, expected: str, name: str = "row") -> None:
    """Raise InputError unless `rows` is a sequence of this kind; `expected` ends the message about another one."""
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise InputError(f"{name}s is a {type(rows).__name__}; expected a list of {kind.__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, kind):
            raise InputError(f"{name} {number} is a {type(row).__name__}; {expected}")


def check_rows(
    rows: Sequence[SFTRow | DPORow], vocab_size: int, max_seq_len: int, max_pack_tokens: int, kind: str = "row"
) -> None:
    """Raise InputError naming the first row that cannot be trained on; `kind` is what the message calls it."""
    if not rows:
        raise InputError("there are no rows to train on")
    for number, row in enumerate(rows):
        answers = _answers(row)
        for name, ids in {"prompt": row.prompt, **answers}.items():
            _check_integers(f"{kind} {number}: {name}", ids)
            if len(ids) == 0:
                raise InputError(f"{kind} {number}: {name} has no tokens; drop the row")
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise InputError(f"{kind} {number}: {name} has a token outside 0..{vocab_size - 1}; wrong tokenizer?")
        lengths = [len(ids) for ids in answers.values()]
        longest, size = len(row.prompt) + max(lengths), len(row.prompt) + sum(lengths)
        if longest > max_seq_len:
            raise InputError(
                f"{kind} {number} has {longest} tokens; the model's context is {max_seq_len}: cut or drop it"
            )
        if size > max_pack_tokens:
            raise InputError(
                f"{kind} {number} has {size} tokens in all; max_pack_tokens is {max_pack_tokens}: raise it, or cut the row"
            )


def _check_integers(what: str, ids: Any) -> None:
    if isinstance(ids, str):
        raise InputError(f"{what} is text; give token ids, as Tokenizer.encode returns them")
    try:
        for token in ids:
            operator.index(token)
        len(ids)
    except TypeError:
        found = "None" if ids is None else f"a {type(ids).__name__}"
        raise InputError(f"{what} is {found}; expected a sequence of token ids (integers)") from None


def _answers(row: SFTRow | DPORow) -> dict[str, Sequence[int]]:
    if isinstance(row, SFTRow):
        return {"completion": row.completion}
    return {"chosen": row.chosen, "rejected": row.rejected}


def batch_order(rows: int, batch_size: int, epochs: int, seed: int, max_steps: int | None) -> list[list[int]]:
    """Row numbers of every step: a fresh permutation per epoch from `seed`; the last batch of an epoch may be smaller."""
    batches = [batch for epoch in range(epochs) for batch in _epoch(rows, batch_size, seed, epoch)]
    return batches if max_steps is None else batches[:max_steps]


def _epoch(rows: int, batch_size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    order = _permutation(rows, seed, epoch)
    return (order[start : start + batch_size] for start in range(0, rows, batch_size))


def replay_batch(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Row numbers of step `step` (from 0): the next `batch_size` of an endless row of permutations, one after another."""
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {cycle: _permutation(rows, seed, REPLAY + cycle) for cycle in {place // rows for place in places}}
    return [orders[place // rows][place % rows] for place in places]


def _permutation(rows: int, seed: int, number: int) -> list[int]:
    return np.random.Generator(np.random.Philox(key=[seed, number])).permutation(rows).tolist()
