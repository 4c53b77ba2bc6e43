"""The reference of the sampler's attention against float64 over the same pages; the native kernel's tests build on it."""

import math

import pytest
import torch

from engine.kernels.chunk_attention import chunk_attention_reference

ROWS = 24


def items_of(tables, positions, size, together=lambda row: True):
    """The work list of tables [R, chunks]: neighbouring rows that have the same page as a chunk are one item, unless
    `together(row)` says of a row that it begins another."""
    items = []
    for chunk in range(tables.shape[1]):
        for row in range(len(tables)):
            if positions[row] < chunk * size:
                continue
            page = int(tables[row, chunk])
            if items and items[-1][:2] == [page, chunk] and items[-1][3] == row and together(row):
                items[-1][3] = row + 1
            else:
                items.append([page, chunk, row, row + 1])
    return torch.tensor(items, dtype=torch.int64).view(-1, 4)


def seen_slots(blocks, size, tables, positions):
    """[blocks, size] bool: which slots any row sees."""
    used = torch.zeros(blocks, size, dtype=torch.bool)
    for row, position in enumerate(positions.tolist()):
        for at in range(position + 1):
            used[tables[row, at // size], at % size] = True
    return used


def poison(keys, values, tables, positions):
    """NaN wherever no row looks."""
    used = seen_slots(len(keys), keys.shape[3], tables, positions)
    keys.masked_fill_(~used[:, None, None, :], math.nan)
    values.masked_fill_(~used[:, None, :, None], math.nan)


def case(heads, groups, dim, size, chunks, rows=ROWS, seed=0):
    """Rows of three kinds: with pages of their own, with a common beginning, and runs of one sequence. Contexts end
    anywhere, the first and last slot of every chunk among the ends; what no row may read is NaN."""
    generator = torch.Generator().manual_seed(seed)
    blocks = rows * chunks + 1
    keys = torch.randn(blocks, groups, dim, size, generator=generator)
    values = torch.randn(blocks, groups, size, dim, generator=generator)
    queries = torch.randn(rows, heads, dim, generator=generator) * 2
    positions = torch.randint(0, size * chunks, (rows,), generator=generator)
    edges = torch.tensor([place for c in range(chunks) for place in (c * size, (c + 1) * size - 1)])[:rows]
    positions[: len(edges)] = edges
    tables = torch.randperm(blocks - 1, generator=generator).view(rows, chunks) + 1
    half = rows // 2
    tables[rows // 4 : half, : chunks // 2] = tables[rows // 4 : rows // 4 + 1, : chunks // 2]
    if half < rows:
        tables[half:] = tables[half : half + 1]
        positions[half:] = (torch.arange(rows - half) + int(positions[half])) % (size * chunks)
    tables = torch.where(torch.arange(chunks) <= (positions // size)[:, None], tables, -(10**9))  # not there
    poison(keys, values, tables, positions)
    return queries, keys, values, tables, positions


def exact(queries, keys, values, tables, positions, dtype=torch.float64):
    """Row by row over the written-out context."""
    repeat, size = queries.shape[1] // keys.shape[1], keys.shape[3]
    out = torch.empty_like(queries, dtype=dtype)
    for row, position in enumerate(positions.tolist()):
        pages = tables[row, : position // size + 1]
        k = keys[pages].movedim(-1, 1).flatten(0, 1)[: position + 1].to(dtype).repeat_interleave(repeat, dim=1)
        v = values[pages].movedim(1, 2).flatten(0, 1)[: position + 1].to(dtype).repeat_interleave(repeat, dim=1)
        weights = (torch.einsum("hd,jhd->hj", queries[row].to(dtype), k) * keys.shape[2] ** -0.5).softmax(-1)
        out[row] = torch.einsum("hj,jhd->hd", weights, v)
    return out


def reference(queries, keys, values, tables, positions, **grouping):
    items = items_of(tables, positions, keys.shape[3], **grouping)
    return chunk_attention_reference(queries, keys, values, items, positions)


def rms(x):
    return x.square().mean().sqrt()


# Head dim 128 is the native kernel's: one chain of 128 products, as torch's bmm has it, is no better than the yardstick.
SHAPES = [(4, 4, 32, 64, 1), (4, 2, 16, 16, 2), (4, 2, 16, 8, 5), (6, 1, 24, 16, 3), (2, 2, 64, 64, 2)]


@pytest.mark.parametrize(("heads", "groups", "dim", "size", "chunks"), SHAPES)
def test_equals_float64_within_twice_the_error_of_plain_fp32_however_rows_are_grouped(heads, groups, dim, size, chunks):
    given = case(heads, groups, dim, size, chunks)
    truth = exact(*given)
    bound = 2 * rms(exact(*given, dtype=torch.float32) - truth)  # the largest error is a matter of luck
    for together in (lambda row: True, lambda row: False, lambda row: row % 3):
        assert rms(reference(*given, together=together) - truth) <= bound


def test_where_the_pages_lie_does_not_matter():
    queries, keys, values, tables, positions = case(4, 2, 16, 8, 4)
    place = torch.randperm(len(keys), generator=torch.Generator().manual_seed(2))
    moved_keys, moved_values = torch.empty_like(keys), torch.empty_like(values)
    moved_keys[place], moved_values[place] = keys, values
    moved = reference(queries, moved_keys, moved_values, place[tables.clamp(min=0)], positions)
    assert torch.equal(moved, reference(queries, keys, values, tables, positions))


def test_the_order_of_the_items_is_the_order_of_the_fold():
    """Nothing checks it here: a test that wants a wrong order gets one, and it differs in last bits only."""
    queries, keys, values, tables, positions = case(4, 2, 16, 8, 5)
    items = items_of(tables, positions, 8)
    forward = chunk_attention_reference(queries, keys, values, items, positions)
    backward = chunk_attention_reference(queries, keys, values, items.flip(0), positions)
    assert not torch.equal(forward, backward) and torch.allclose(forward, backward, atol=1e-5)
