"""From a plan to tensors: the one place where the scheduler's integers become arrays.

R rows in the plan's order; a sequence's rows are neighbours, and so are sequences that share blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from engine.scheduler import UNKNOWN, Plan


class Layout(NamedTuple):
    """Which rows and which pages belong to each of the W sequences of a step, int64."""

    first_row: np.ndarray  # [W + 1]: sequence w has the rows first_row[w] .. first_row[w + 1]
    starts: np.ndarray  # [W]: position of its first row
    first_page: np.ndarray  # [W + 1]: and the pages first_page[w] .. first_page[w + 1], one for each chunk
    pages: np.ndarray  # [P]

    @property
    def rows(self) -> np.ndarray:
        return np.diff(self.first_row)

    def chunk_items(self, block_size: int) -> np.ndarray:
        """Every chunk of every sequence with the rows that see it: [P, 4] of (page, chunk, first row, last row)."""
        of_page = np.repeat(np.arange(len(self.starts)), np.diff(self.first_page))
        chunks = np.arange(len(self.pages)) - self.first_page[of_page]
        begin = self.first_row[of_page] + np.maximum(chunks * block_size - self.starts[of_page], 0)
        items = np.stack((self.pages, chunks, begin, self.first_row[of_page + 1]), axis=1)
        return items[begin < items[:, 3]]


class Batch(NamedTuple):
    tokens: torch.Tensor  # [R] int64
    from_draws: (
        torch.Tensor
    )  # [R] int64: which draw of the step before a token is that is not known yet, -1: it is known
    positions: torch.Tensor  # [R] int64
    slots: torch.Tensor  # [R] int64: block * block_size + slot, where a row's key and value go
    layout: Layout
    items: torch.Tensor  # [I, 4] int64: page, chunk, first row, last row (exclusive); ascending chunks
    copies: torch.Tensor  # [C, 3] int64: source block, target block, tokens
    grouped: bool  # whether rows of different sequences share items
    slots_read: int  # keys that the items read
    slots_ungrouped: int  # keys that would be read if every sequence read its own context

    @staticmethod
    def empty() -> Batch:
        """Of a step without rows."""
        none = torch.empty(0, dtype=torch.int64)
        zero = np.zeros(1, dtype=np.int64)
        layout = Layout(zero, zero[1:], zero, zero[1:])
        return Batch(none, none, none, none, layout, none.view(0, 4), none.view(0, 3), True, 0, 0)


Draw = tuple[int, int]  # group index, candidate


def make_batch(plan: Plan, block_size: int, grouped: bool = True, drawing: Mapping[Draw, int] | None = None) -> Batch:
    """grouped False: every sequence reads its own context, for measurement; the results are the same bits. drawing: the
    place of every draw of the step before, if its tokens are not known yet."""
    works = plan.work
    starts = np.array([work.start for work in works])
    counts = np.array([work.stop for work in works]) - starts
    tables = [work.sequence.blocks for work in works]
    layout = Layout(
        _offsets(counts), starts, _offsets([len(table) for table in tables]), np.fromiter(_flat(tables), np.int64)
    )
    tokens = np.fromiter(_flat(w.sequence.tokens[w.start : w.stop] for w in works), np.int64)
    from_draws = np.full(len(tokens), -1)
    for row in np.flatnonzero(tokens == UNKNOWN):
        assert drawing is not None, "a token is not known and no step is on its way"
        sequence = works[int(np.searchsorted(layout.first_row, row, side="right")) - 1].sequence
        from_draws[row] = drawing[sequence.group.index, sequence.candidate]
    work_of_row = np.repeat(np.arange(len(works)), counts)
    positions = np.arange(len(tokens)) - (layout.first_row[:-1] - starts)[work_of_row]
    block = layout.pages[layout.first_page[work_of_row] + positions // block_size]
    slots = block * block_size + positions % block_size

    items = layout.chunk_items(block_size)
    items = items[np.argsort(items[:, 1], kind="stable")]  # by chunk, then by row
    if grouped:
        items = merged(items)
    last = np.maximum.reduceat(np.append(positions, 0), items[:, 2:].ravel())[::2]  # the furthest row of each item
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(from_draws),
        torch.from_numpy(positions),
        torch.from_numpy(slots),
        layout,
        torch.from_numpy(items),
        torch.tensor([(c.source, c.target, c.tokens) for c in plan.copies], dtype=torch.int64).view(-1, 3),
        grouped,
        int(np.minimum(last - items[:, 1] * block_size + 1, block_size).sum()),
        int((starts + counts).sum()),
    )


def merged(items: np.ndarray) -> np.ndarray:
    """Items of neighbouring rows with the same page and chunk become one."""
    page, chunk, begin, end = items.T
    new = np.ones(len(items), dtype=bool)
    new[1:] = (page[1:] != page[:-1]) | (chunk[1:] != chunk[:-1]) | (begin[1:] != end[:-1])
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(items)) - 1
    return np.stack((page[starts], chunk[starts], begin[starts], end[ends]), axis=1)


def _offsets(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each of some lists begins when they lie one after the other, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def _flat(lists: Iterable[Sequence[int]]) -> Iterable[int]:
    return chain.from_iterable(lists)


def known_tokens(tokens: torch.Tensor, from_draws: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The tokens of a step's rows on their device; drawn: the ids of the step before, in the order of its queries."""
    return torch.where(from_draws >= 0, drawn[from_draws.clamp(min=0)], tokens)
