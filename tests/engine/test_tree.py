"""Packing: positions, ends and edges of token trees."""

import pytest

from engine.errors import InputError
from engine.tree import TokenTree


def pair():
    return TokenTree([1, 2], children=(TokenTree([3, 4], 1.0, 0), TokenTree([5], 0.5, 1)))


def test_a_shared_prompt_stands_once_and_its_last_token_predicts_both_answers():
    (pack,) = TokenTree.pack([pair()], budget=5)
    assert pack.tokens.tolist() == [1, 2, 3, 4, 5]
    assert pack.position.tolist() == [0, 1, 2, 3, 2]
    assert pack.end.tolist() == [5, 5, 4, 4, 5]
    assert pack.edges.row.tolist() == [1, 2, 1]
    assert pack.edges.target.tolist() == [3, 4, 5]
    assert pack.edges.weight.tolist() == [1.0, 1.0, 0.5]
    assert pack.edges.sequence.tolist() == [0, 0, 1]


def test_trees_stay_whole_and_in_order():
    packs = TokenTree.pack([TokenTree([i] * size) for i, size in enumerate([3, 3, 2, 5])], budget=6)
    assert [pack.tokens.tolist() for pack in packs] == [[0, 0, 0, 1, 1, 1], [2, 2], [3] * 5]
    assert packs[0].end.tolist() == [3, 3, 3, 6, 6, 6]


def test_the_first_token_of_a_tree_is_never_a_target():
    (pack,) = TokenTree.pack([TokenTree([7, 8, 9], weight=1.0)], budget=3)
    assert pack.edges.target.tolist() == [8, 9]


def test_weights_per_token_select_the_edges():
    (pack,) = TokenTree.pack([TokenTree([7, 8, 9], weight=[1.0, 0.0, 2.0])], budget=3)
    assert (pack.edges.target.tolist(), pack.edges.weight.tolist()) == ([9], [2.0])


def test_mistakes_are_named():
    with pytest.raises(InputError, match="tree 1 has 5 tokens; a pack holds 4"):
        TokenTree.pack([TokenTree([1]), pair()], budget=4)
    with pytest.raises(InputError, match="no tokens"):
        TokenTree([])
    with pytest.raises(InputError, match="2 tokens has 1 loss weights"):
        TokenTree([1, 2], weight=[1.0])


def test_chains_are_the_lengths_of_trees_that_do_not_branch():
    line = TokenTree([1, 2], children=(TokenTree([3]),))
    fork = TokenTree([1], children=(TokenTree([2]), TokenTree([3])))
    assert TokenTree.pack([line, TokenTree([4, 5, 6, 7])], 99)[0].chains == (3, 4)
    first, second = TokenTree.pack([line, fork, line], 6)
    assert first.chains is None and second.chains == (3,)
