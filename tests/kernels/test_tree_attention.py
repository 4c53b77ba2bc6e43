"""The windowed tree attention against the rule written down, and against one causal attention per branch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.tree_attention import tree_attention_reference
from engine.kernels.tree_windows import tree_attention_windows, tree_windows
from engine.tree import TokenTree


def trees():
    segment = st.integers(1, 6).map(lambda n: list(range(n)))
    leaf = segment.map(TokenTree)
    grow = lambda child: st.tuples(segment, st.lists(child, max_size=3)).map(
        lambda pair: TokenTree(pair[0], children=tuple(pair[1]))
    )
    return st.recursive(leaf, grow, max_leaves=6)


def qkv(rows, heads=4, kv_heads=2, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    make = lambda h: torch.randn(rows, h, dim, generator=generator, dtype=dtype, requires_grad=True)
    return make(heads), make(kv_heads), make(kv_heads)


def branches(tree, before=()):
    """Every root-to-node chain of (row numbers), in pre-order; rows are counted by the caller through `branches.row`."""
    rows = list(range(branches.row, branches.row + len(tree.tokens)))
    branches.row += len(rows)
    yield [*before, *rows], rows
    for child in tree.children:
        yield from branches(child, [*before, *rows])


@settings(max_examples=60, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=6), st.sampled_from([1, 8, 128]))
def test_windows_equal_the_rule_forward_and_backward(forest, window):
    pack = TokenTree.pack(forest, budget=10_000)[0]
    q, k, v = qkv(len(pack))
    exact = tree_attention_reference(q, k, v, pack.end)
    ours = tree_attention_windows(q, k, v, tree_windows(pack.end, window))
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    up = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), up), torch.autograd.grad(exact, (q, k, v), up), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=4))
def test_a_node_sees_exactly_its_own_branch(forest):
    pack = TokenTree.pack(forest, budget=10_000)[0]
    q, k, v = qkv(len(pack), heads=2, kv_heads=2)
    out = tree_attention_reference(q, k, v, pack.end)
    branches.row = 0
    for tree in forest:
        for chain, rows in branches(tree):
            assert pack.position[rows].tolist() == list(range(len(chain) - len(rows), len(chain)))
            alone = torch.nn.functional.scaled_dot_product_attention(
                *(x[chain].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True
            )[0].transpose(0, 1)
            torch.testing.assert_close(out[rows], alone[-len(rows) :], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_eager_in_the_same_dtype(dtype):
    pack = TokenTree.pack([TokenTree(range(40), children=(TokenTree(range(30)), TokenTree(range(50))))] * 2, 1000)[0]
    q, k, v = (x.detach().to(dtype) for x in qkv(len(pack)))
    exact = tree_attention_reference(q.double(), k.double(), v.double(), pack.end)
    eager = tree_attention_reference(q, k, v, pack.end).double()
    ours = tree_attention_windows(q, k, v, tree_windows(pack.end)).double()
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-6
