"""From a step's layout to the work list of a GPU's attention: which program reads which pages for which rows.

Sequences with many rows (prompts) are cut into wide tiles, each one run over its whole context. The rows of all others
are grouped: neighbours that have the same page as the same chunk share an item, and consecutive items of the same rows
are one run. Runs are cut where too few programs would keep the GPU busy. The arrays are int32 and may have a capacity, to
which they are padded with items of no rows: then a step fits a CUDA graph's places. `kernels/work_attention.py` has the
meaning of the columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from engine import ops
from engine.batch import Layout, merged
from engine.config import LlamaConfig

PROGRAMS = 528  # to aim for: four for each of the 132 multiprocessors of an H100 or H200


class Capacity(NamedTuple):
    """The lengths of a work list's arrays, for decoding steps; rows beyond the step's are padding."""

    rows: int
    items: int
    pages: int
    slots: int

    @staticmethod
    def of(rows: int, chunks: int, kv_heads: int) -> Capacity:
        """For `rows` sequences of at most `chunks` chunks. Pages and slots always suffice; items do but for odd trees: a
        tree with that many leaves has less than twice as many runs, tiles and busy programs cut them further."""
        return Capacity(rows, Capacity.items_of(rows, 4, kv_heads), rows * chunks, rows * chunks)

    @staticmethod
    def items_of(rows: int, per_row: int, kv_heads: int) -> int:
        """What busy programs may cut runs into comes on top. Without shared pages a row has one item: an item that is not
        needed is a program for every key/value head that only ends."""
        return per_row * rows + -(-PROGRAMS // kv_heads)


class WorkDoesNotFit(Exception):
    """The list is longer than its capacity: the step has to run without one."""


def make_work(
    layout: Layout,
    block_size: int,
    config: LlamaConfig,
    dtype: torch.dtype,
    capacity: Capacity | None = None,
    grouped: bool = True,
) -> ops.Work:
    """dtype: of queries and pages; grouped False: every sequence reads its own context, for measurement."""
    wide_rows, narrow_rows = (tile.rows for tile in ops.tiles(config.n_heads // config.n_kv_heads, block_size, dtype))
    rows = int(layout.first_row[-1])
    many = layout.rows > narrow_rows
    work_of_row = np.repeat(np.arange(len(many)), layout.rows)
    positions = np.arange(rows) - (layout.first_row[:-1] - layout.starts)[work_of_row]

    wide = _wide_items(layout, np.flatnonzero(many), wide_rows, positions, block_size)
    runs, pages = _runs(layout, many, narrow_rows, block_size, grouped)
    runs[:, 0] += len(layout.pages) if len(wide) else 0
    narrow = _cut(runs, config.n_kv_heads)
    fold, slots = _slots(narrow, positions, block_size)
    if len(wide):
        pages = np.concatenate((layout.pages, pages))
    if capacity is not None:
        if len(wide) or len(narrow) > capacity.items or len(pages) > capacity.pages:
            raise WorkDoesNotFit(
                f"{len(wide)} wide and {len(narrow)} narrow items, {len(pages)} pages; there is {capacity}"
            )
        narrow, pages = _padded(narrow, capacity.items), _padded(pages, capacity.pages)
        positions, fold = _padded(positions, capacity.rows), _padded(fold, capacity.rows)
        slots = capacity.slots
    return ops.Work(_int32(pages), _int32(wide), _int32(narrow), _int32(positions), _int32(fold), slots)


def _wide_items(layout: Layout, sequences: np.ndarray, tile: int, positions: np.ndarray, block_size: int) -> np.ndarray:
    """Tiles of rows of one sequence, the last ones first: they have the longest contexts."""
    tiles = -(-layout.rows[sequences] // tile)
    of_tile = np.repeat(sequences, tiles)
    number = np.arange(len(of_tile)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = layout.first_row[of_tile] + number * tile
    count = np.minimum(tile, layout.first_row[of_tile + 1] - first)
    chunks = positions[first + count - 1] // block_size + 1
    zero, one = np.zeros_like(first), np.ones_like(first)
    items = np.stack((layout.first_page[of_tile], chunks, zero, first, count, one), axis=1)
    return items[np.argsort(-chunks, kind="stable")]


def _runs(layout: Layout, many: np.ndarray, tile: int, block_size: int, grouped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Items [I, 6] of consecutive chunks of the same rows, and the pages that they name."""
    items = layout.chunk_items(block_size)
    if many.any():
        items = items[~np.repeat(many, layout.rows)[items[:, 2]]]
    if not len(items):
        return np.zeros((0, 6), dtype=np.int64), np.zeros(0, dtype=np.int64)
    items = items[np.lexsort((items[:, 2], items[:, 1]))]  # by chunk, then by row
    items = _split_rows(merged(items) if grouped else items, tile)
    page, chunk, begin, end = items[np.lexsort((items[:, 1], items[:, 3], items[:, 2]))].T  # by rows, then by chunk
    new = np.ones(len(page), dtype=bool)
    new[1:] = (begin[1:] != begin[:-1]) | (end[1:] != end[:-1]) | (chunk[1:] != chunk[:-1] + 1)
    start = np.flatnonzero(new)
    length = np.diff(np.append(start, len(page)))
    first = chunk[start]
    return np.stack((start, length, first, begin[start], (end - begin)[start], np.zeros_like(start)), axis=1), page


def _split_rows(items: np.ndarray, tile: int) -> np.ndarray:
    """Items of at most `tile` rows."""
    page, chunk, begin, end = items.T
    parts = -(-(end - begin) // tile)
    if (parts <= 1).all():
        return items
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    begin = np.repeat(begin, parts) + number * tile
    end = np.minimum(begin + tile, np.repeat(end, parts))
    return np.stack((np.repeat(page, parts), np.repeat(chunk, parts), begin, end), axis=1)


def _cut(runs: np.ndarray, kv_heads: int) -> np.ndarray:
    """No run is longer than an even share of all chunks for PROGRAMS programs."""
    place, length, first, row, rows, whole = runs.T
    most = max(1, -(-int(length.sum()) * kv_heads // PROGRAMS))
    parts = -(-length // most)
    if (parts <= 1).all():
        return runs
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    done = number * most
    length = np.minimum(most, np.repeat(length, parts) - done)
    place, first = np.repeat(place, parts) + done, np.repeat(first, parts) + done
    return np.stack((place, length, first, *(np.repeat(x, parts) for x in (row, rows, whole))), axis=1)


def _slots(narrow: np.ndarray, positions: np.ndarray, block_size: int) -> tuple[np.ndarray, int]:
    """The fold of every row [R, 3], and how many slots there are. Marks the items that are their rows' whole context."""
    fold = np.zeros((len(positions), 3), dtype=np.int64)
    begins = narrow[:, 2] == 0  # a row is in one item that begins at chunk 0
    if not begins.any():
        return fold, 0
    length, row, rows = narrow[begins, 1], narrow[begins, 3], narrow[begins, 4]
    before = np.cumsum(rows) - rows
    of_row = np.arange(rows.sum()) + np.repeat(row - before, rows)
    chunks, in_registers = positions[of_row] // block_size + 1, np.repeat(length, rows)
    whole = np.maximum.reduceat(chunks, before) == length
    narrow[begins, 5] = whole
    counts = np.where(np.repeat(whole, rows), 0, chunks - in_registers + 1)
    offsets = np.cumsum(counts) - counts
    fold[of_row] = np.stack((offsets - (in_registers - 1), offsets, counts), axis=1)
    return fold, int(counts.sum())


def _int32(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.int32))


def _padded(x: np.ndarray, length: int) -> np.ndarray:
    return np.pad(x, [(0, length - len(x)), *[(0, 0)] * (x.ndim - 1)])
