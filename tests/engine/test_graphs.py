"""Staged steps: what is filled in arrives where a captured computation reads it."""

from typing import NamedTuple

import pytest
import torch

from engine.graphs import Graph, Staged, map_tensors, shape_of

CPU = torch.device("cpu")


class Inner(NamedTuple):
    flags: torch.Tensor
    limit: int


class Outer(NamedTuple):
    numbers: torch.Tensor
    inner: Inner
    wide: torch.Tensor


def tree(seed, rows=3, limit=5):
    generator = torch.Generator().manual_seed(seed)
    flags = torch.rand(rows + 2, generator=generator) > 0.5
    numbers = torch.randint(-9, 9, (rows, 2), generator=generator)
    return Outer(numbers, Inner(flags, limit), torch.randn(rows, generator=generator, dtype=torch.float64))


def replayed(run):
    """A capture that has no GPU: the result keeps its address and is computed again into it."""
    result = run()

    def replay():
        fresh = iter(leaves(run()))
        map_tensors(result, lambda x: x.copy_(next(fresh)))

    return replay, result


def leaves(of):
    found = []
    map_tensors(of, lambda x: (found.append(x), x)[1])
    return found


def test_filled_values_arrive_and_keep_their_addresses():
    staged = Staged(tree(0), CPU)
    before = [x.data_ptr() for x in leaves(staged.tree)]
    for seed in (1, 2, 3):
        staged.fill(tree(seed))
        for mine, given in zip(leaves(staged.tree), leaves(tree(seed)), strict=True):
            assert mine.dtype == given.dtype and torch.equal(mine, given)
    assert [x.data_ptr() for x in leaves(staged.tree)] == before
    assert all(address % 8 == 0 for address in before)
    assert staged.tree.inner.limit == 5


def test_a_buffer_on_the_host_is_written_again_only_two_fills_later():
    staged = Staged(tree(0), CPU)
    staged.fill(tree(1))
    held = staged._hosts[0].clone()
    staged.fill(tree(2))
    assert torch.equal(staged._hosts[1], held)


@pytest.mark.parametrize("other", [tree(0, rows=4), tree(0, limit=6)], ids=["another shape", "another plain value"])
def test_a_tree_of_another_shape_is_refused(other):
    staged = Staged(tree(0), CPU)
    assert shape_of(other) != staged.shape
    with pytest.raises(ValueError, match="the places are"):
        staged.fill(other)


def test_a_graph_computes_from_what_was_filled_in_last_into_the_same_result():
    def compute(x):
        return Inner((x.numbers * 2).sum(dim=1) + x.inner.flags[:3], 0)

    graph = Graph(compute, tree(0), CPU, replayed)
    address = graph.result.flags.data_ptr()
    for seed in (1, 2):
        result = graph.launch(tree(seed))
        assert torch.equal(result.flags, compute(tree(seed)).flags)
        assert result.flags.data_ptr() == address
