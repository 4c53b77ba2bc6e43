"""The sampler's attention against float64 over the same pages, and the properties that its callers build on."""

import pytest
import torch

from engine.kernels.chunk_attention import chunk_attention_reference

ROWS = 64


def case(heads, groups, dim, size, chunks, seed=0):
    """Random pages and rows whose contexts end anywhere, the first and last slot of every chunk among them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = ROWS * chunks + 1
    keys = torch.randn(blocks, groups, dim, size, generator=generator)
    values = torch.randn(blocks, groups, size, dim, generator=generator)
    queries = torch.randn(ROWS, heads, dim, generator=generator) * 2
    positions = torch.randint(0, size * chunks, (ROWS,), generator=generator)
    edges = torch.tensor([place for c in range(chunks) for place in (c * size, (c + 1) * size - 1)])
    positions[: len(edges)] = edges
    tables = torch.randperm(blocks - 1, generator=generator).view(ROWS, chunks) + 1
    tables = torch.where(torch.arange(chunks) <= (positions // size)[:, None], tables, 0)
    return queries, keys, values, tables, positions


def exact(queries, keys, values, tables, positions, dtype=torch.float64):
    """Row by row over the written-out context."""
    heads, groups, dim = queries.shape[1], keys.shape[1], keys.shape[2]
    out = torch.empty_like(queries, dtype=dtype)
    for row, position in enumerate(positions.tolist()):
        k = keys[tables[row]].movedim(-1, 1).flatten(0, 1)[: position + 1].to(dtype)  # [context, G, D]
        v = values[tables[row]].movedim(1, 2).flatten(0, 1)[: position + 1].to(dtype)
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
        weights = (torch.einsum("hd,jhd->hj", queries[row].to(dtype), k) * dim**-0.5).softmax(-1)
        out[row] = torch.einsum("hj,jhd->hd", weights, v)
    return out


SHAPES = [(4, 4, 32, 64, 1), (4, 2, 16, 16, 2), (4, 2, 16, 8, 5), (6, 1, 24, 16, 3), (2, 2, 128, 64, 2)]


@pytest.mark.parametrize(("heads", "groups", "dim", "size", "chunks"), SHAPES)
def test_equals_float64_within_twice_the_error_of_plain_fp32(heads, groups, dim, size, chunks):
    given = case(heads, groups, dim, size, chunks)
    truth = exact(*given)
    error = (chunk_attention_reference(*given) - truth).abs().max()
    assert error <= 2 * (exact(*given, dtype=torch.float32) - truth).abs().max() + 1e-7


@pytest.mark.parametrize(("heads", "groups", "dim", "size", "chunks"), SHAPES)
def test_a_rows_bits_depend_neither_on_its_place_nor_on_its_neighbours(heads, groups, dim, size, chunks):
    queries, keys, values, tables, positions = case(heads, groups, dim, size, chunks)
    out = chunk_attention_reference(queries, keys, values, tables, positions)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    shuffled = chunk_attention_reference(queries[order], keys, values, tables[order], positions[order])
    assert torch.equal(shuffled, out[order])
    # alone: 63 rows of padding, and fewer chunks in the tile
    row = int(positions.argmin())
    own = int(positions[row]) // size + 1
    lone_queries, lone_positions, lone_tables = (
        torch.zeros_like(queries),
        torch.zeros_like(positions),
        tables[:, :own] * 0,
    )
    lone_queries[7], lone_positions[7], lone_tables[7] = queries[row], positions[row], tables[row, :own]
    alone = chunk_attention_reference(lone_queries, keys, values, lone_tables, lone_positions)
    assert torch.equal(alone[7], out[row])


def test_where_the_pages_lie_does_not_matter():
    queries, keys, values, tables, positions = case(4, 2, 16, 8, 4)
    out = chunk_attention_reference(queries, keys, values, tables, positions)
    moved = torch.randperm(len(keys), generator=torch.Generator().manual_seed(2))
    place = torch.empty_like(moved)
    place[moved] = torch.arange(len(moved))
    assert torch.equal(chunk_attention_reference(queries, keys[moved], values[moved], place[tables], positions), out)


def test_nan_in_unseen_keys_and_in_foreign_pages_changes_nothing():
    queries, keys, values, tables, positions = case(4, 2, 16, 8, 4)
    out = chunk_attention_reference(queries, keys, values, tables, positions)
    used = torch.zeros(len(keys), 8, dtype=torch.bool)
    for row, position in enumerate(positions.tolist()):
        for at in range(position + 1):
            used[tables[row, at // 8], at % 8] = True
    keys.masked_fill_(~used[:, None, None, :], float("nan"))
    values[1:].masked_fill_(~used[1:].any(dim=1)[:, None, None, None], float("nan"))  # block 0 pads: it is finite
    assert torch.equal(chunk_attention_reference(queries, keys, values, tables, positions), out)


def test_a_row_that_has_no_further_chunk_keeps_its_state_though_huge_keys_follow():
    queries, keys, values, tables, positions = case(4, 4, 16, 8, 3)
    positions[0], tables[0, 1:] = 3, 0
    out = chunk_attention_reference(queries, keys, values, tables, positions)
    keys[0], values[0] = 1e18, 1e18
    assert torch.equal(chunk_attention_reference(queries, keys, values, tables, positions)[0], out[0])
