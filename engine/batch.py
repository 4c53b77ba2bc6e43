"""From a plan to tensors: the one place where the scheduler's integers become arrays.

R rows in the plan's order; a sequence's rows are neighbours, and so are sequences that share blocks.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from engine.scheduler import Plan


class Batch(NamedTuple):
    tokens: torch.Tensor  # [R] int64
    positions: torch.Tensor  # [R] int64
    slots: torch.Tensor  # [R] int64: block * block_size + slot, where a row's key and value go
    items: torch.Tensor  # [I, 4] int64: page, chunk, first row, last row (exclusive); ascending chunks
    copies: torch.Tensor  # [C, 3] int64: source block, target block, tokens
    slots_read: int  # keys that the items read
    slots_ungrouped: int  # keys that would be read if every sequence read its own context


def make_batch(plan: Plan, block_size: int, grouped: bool = True) -> Batch:
    """grouped False: every sequence reads its own context, for measurement; the results are the same bits."""
    works = plan.work
    starts = np.array([work.start for work in works])
    counts = np.array([work.stop for work in works]) - starts
    first_row = np.cumsum(counts) - counts
    tokens = np.fromiter(chain.from_iterable(w.sequence.tokens[w.start : w.stop] for w in works), np.int64)
    work_of_row = np.repeat(np.arange(len(works)), counts)
    positions = np.arange(len(tokens)) - (first_row - starts)[work_of_row]

    tables = [work.sequence.blocks for work in works]
    lengths = np.array([len(table) for table in tables])
    pages = np.fromiter(chain.from_iterable(tables), np.int64)
    first_page = np.cumsum(lengths) - lengths
    slots = pages[first_page[work_of_row] + positions // block_size] * block_size + positions % block_size

    # A chunk of a sequence is needed by its rows from the chunk's first position on.
    work_of_page = np.repeat(np.arange(len(works)), lengths)
    chunks = np.arange(len(pages)) - first_page[work_of_page]
    begin = first_row[work_of_page] + np.maximum(chunks * block_size - starts[work_of_page], 0)
    end = (first_row + counts)[work_of_page]
    items = np.stack((pages, chunks, begin, end), axis=1)[begin < end]
    items = items[np.argsort(items[:, 1], kind="stable")]  # by chunk, then by row
    if grouped:
        items = _merged(items)
    last = np.maximum.reduceat(np.append(positions, 0), items[:, 2:].ravel())[::2]  # the furthest row of each item
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(slots),
        torch.from_numpy(items),
        torch.tensor([(c.source, c.target, c.tokens) for c in plan.copies], dtype=torch.int64).view(-1, 3),
        int(np.minimum(last - items[:, 1] * block_size + 1, block_size).sum()),
        int((starts + counts).sum()),
    )


def _merged(items: np.ndarray) -> np.ndarray:
    """Items of neighbouring rows with the same page and chunk become one."""
    page, chunk, begin, end = items.T
    new = np.ones(len(items), dtype=bool)
    new[1:] = (page[1:] != page[:-1]) | (chunk[1:] != chunk[:-1]) | (begin[1:] != end[:-1])
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(items)) - 1
    return np.stack((page[starts], chunk[starts], begin[starts], end[ends]), axis=1)
