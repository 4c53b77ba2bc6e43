"""Tree attention in Triton: values and gradients against float64 on random forests, with tiles small enough that a few
tokens cross many of them. On a GPU as compiled, elsewhere in Triton's interpreter, which knows no bf16.
"""

import random

import pytest
import torch

from engine.kernels.tree_attention import (
    pairs,
    tree_attention,
    tree_attention_lse,
    tree_attention_reference,
    tree_tiles,
)
from engine.tree import TokenTree
from tests.kernels.yardstick import POISON, check, within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]

pytestmark = pytest.mark.gpu_too


def segment(tokens, *children):
    return TokenTree(range(tokens), children=children)


def deep(rng, tokens):
    """A tree of `tokens` tokens: segments of 1 to 9, one to three children each."""
    size = rng.randint(1, min(9, tokens))
    left, children = tokens - size, []
    for more in range(rng.randint(0, 2), -1, -1):
        share = left if more == 0 else rng.randint(0, left)
        if share:
            children.append(deep(rng, share))
        left -= share
    return segment(size, *children)


def forest(kind, tokens=75):
    rng = random.Random(f"{kind} {tokens}")
    if kind == "causal" or tokens == 1:
        return [segment(tokens)]
    if kind == "one token each":  # and a longer one, so that not all gradients of q and k are zero
        return [*(segment(1) for _ in range(tokens - 9)), segment(9)]
    if kind == "answers":
        answer = (tokens - tokens // 3) // 4
        return [segment(tokens - 4 * answer, *(segment(answer) for _ in range(4)))]
    trees, left = [], tokens
    while left:
        size = min(left, rng.randint(1, 11 if kind == "short" else 60))
        trees.append(segment(size) if kind == "short" else deep(rng, size))
        left -= size
    return trees


KINDS = ["causal", "short", "one token each", "answers", "deep"]


def ends(kind, tokens=75):
    return TokenTree.pack(forest(kind, tokens), budget=100_000)[0].end.to(DEVICE)


def qkv(tokens, heads, kv_heads, dim, dtype, seed=0):
    """Scores and the products of v with upstream gradients are around one, where `within` allows 1e-6."""
    generator = torch.Generator().manual_seed(seed + tokens + dim)
    q, k, v = (
        torch.randn(tokens, h, dim, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)
    )
    return [x.to(dtype).to(DEVICE) for x in (q, k, v * dim**-0.5)]


def visible(end):
    index = torch.arange(len(end), device=end.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])  # [query, key]


def eager(q, k, v, end):
    """The rule with every step rounded to the inputs' dtype, as eager code in that dtype does."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q * q.shape[-1] ** -0.5, k)
    weights = scores.masked_fill(~visible(end), float("-inf")).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def against_eager(kind, tokens, heads, kv_heads, dim, dtype, tile):
    end = ends(kind, tokens)
    tiles = tree_tiles(end, tile)
    check(
        lambda q, k, v: tree_attention(q, k, v, tiles),
        lambda q, k, v: eager(q, k, v, end),
        qkv(tokens, heads, kv_heads, dim, dtype),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_yardstick_is_the_reference(kind):
    end, inputs = ends(kind), qkv(75, 4, 2, 8, torch.float64)
    torch.testing.assert_close(eager(*inputs, end), tree_attention_reference(*inputs, end), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [16, 64])
def test_values_and_gradients(kind, tile, dtype):
    against_eager(kind, 75, 2, 1, 16, dtype, tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 2), (8, 1)])
def test_heads_of_a_group_share_keys_and_sum_their_gradients(heads, kv_heads, dtype):
    against_eager("deep", 40, heads, kv_heads, 8, dtype, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 16, 40, 64, 128])
def test_head_dims(dim, dtype):
    against_eager("deep", 50, 2, 1, dim, dtype, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 200])
def test_numbers_of_tokens_that_fit_no_tile_and_tiles_as_shipped(tokens, dtype):
    against_eager("deep", tokens, 1, 1, 8, dtype, 128 if tokens == 200 else 16)


def test_no_tokens():
    q, k, v = (x.requires_grad_() for x in qkv(0, 4, 2, 8, torch.float32))
    out = tree_attention(q, k, v, tree_tiles(torch.empty(0, dtype=torch.int64, device=DEVICE)))
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 4, 8) and k.grad.shape == v.grad.shape == (0, 2, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_from_zero(dtype):
    end = ends("deep")
    q, k, v = qkv(75, 2, 2, 16, dtype)
    tiles, q = tree_tiles(end, 16), 40 * q
    exact = tree_attention_reference(q.double(), k.double(), v.double(), end)
    within(tree_attention(q, k, v, tiles), exact, eager(q, k, v, end))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logsumexp(kind, dtype):
    end = ends(kind)
    q, k, v = qkv(75, 4, 2, 8, dtype)
    out, lse = tree_attention_lse(q, k, v, tree_tiles(end, 16))

    def theirs(q, k):
        scores = torch.einsum("ihd,jhd->ihj", q, k.repeat_interleave(2, dim=1)) * 8**-0.5
        return scores.masked_fill(~visible(end)[:, None, :], float("-inf")).logsumexp(dim=-1)

    assert lse.dtype == torch.float32 and torch.equal(out, tree_attention(q, k, v, tree_tiles(end, 16)))
    within(lse, theirs(q.double(), k.double()), theirs(q.float(), k.float()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens,tile", [(1, 16), (64, 16), (75, 8), (200, 16), (200, 128)])
def test_lists_name_the_tiles_that_meet_and_no_others(kind, tokens, tile):
    end = ends(kind, tokens).tolist()
    sees = [[key <= query < end[key] for key in range(tokens)] for query in range(tokens)]
    count = -(-tokens // tile)
    tiles = tree_tiles(torch.tensor(end, device=DEVICE), tile)
    assert tiles.end.tolist() == end and tiles.tile == tile
    for table, by_query in ((tiles.by_query.tolist(), True), (tiles.by_key.tolist(), False)):
        assert sorted(row[0] for row in table) == list(range(count))
        assert [row[2] for row in table] == sorted((row[2] for row in table), reverse=True)
        for own, whole, seen, *others in table:
            expected = {"whole": [], "part": []}
            for other in range(count):
                query, key = (own, other) if by_query else (other, own)
                cells = [
                    i < tokens and j < tokens and sees[i][j]
                    for i in range(query * tile, query * tile + tile)
                    for j in range(key * tile, key * tile + tile)
                ]
                if any(cells):
                    expected["whole" if all(cells) else "part"].append(other)
            assert others[:whole] == expected["whole"]
            assert others[whole:seen] == expected["part"]


def test_tiles_that_do_not_meet_are_not_read():
    """Three sequences, the first and the last of two tiles each and full of NaN: nothing of the second may change."""
    tokens = 80
    end = TokenTree.pack([segment(32), segment(16), segment(32)], tokens)[0].end.to(DEVICE)
    tiles, middle = tree_tiles(end, 16), slice(32, 48)
    results = []
    for poison in (False, True):
        q, k, v = qkv(tokens, 2, 2, 8, torch.float32)
        upstream = qkv(tokens, 2, 2, 8, torch.float32, seed=5)[0]
        for x in (q, k, v, upstream) if poison else ():
            x[:32] = x[48:] = POISON
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = tree_attention(q, k, v, tiles)
        results.append([x[middle] for x in (out, *torch.autograd.grad(out, (q, k, v), upstream))])
    for clean, poisoned in zip(*results):
        assert clean.isfinite().all() and torch.equal(clean, poisoned)


@pytest.mark.parametrize("dim", [8, 40])
@pytest.mark.parametrize("tokens,canary", [(37, 77.0), (37, POISON), (48, 77.0)])
def test_padding_is_not_read_and_nothing_is_written_outside(tokens, canary, dim, monkeypatch):
    """q, k and v as views of one tensor with NaN after the last row and behind the last column; canaries around all
    that the kernels write, and NaN around what they read again."""
    heads, kv_heads, around, guards = 4, 2, 16 * 4 * dim, []

    def guarded(*shape, dtype, device):
        shape = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        memory = torch.full((shape.numel() + 2 * around,), canary, dtype=dtype, device=device)
        inside = memory[around:-around]
        inside.fill_(POISON)
        guards.append(memory)
        return inside.view(shape)

    end, width = ends("deep", tokens), (heads + 2 * kv_heads) * dim
    plain = qkv(tokens, heads, kv_heads, dim, torch.float32)
    upstream = qkv(tokens, heads, kv_heads, dim, torch.float32, seed=3)[0]
    tiles = tree_tiles(end, 16)
    memory = torch.full((tokens + 32, width + 8), POISON, device=DEVICE)
    memory[:tokens, :width] = torch.cat([x.flatten(1) for x in plain], dim=1)
    parts = memory[:tokens, :width].split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    views = [x.unflatten(1, (-1, dim)).requires_grad_() for x in parts]
    assert [x.stride() for x in views] == [(width + 8, dim, 1)] * 3
    poisoned = torch.full((tokens + 32, heads, dim), POISON, device=DEVICE)
    poisoned[:tokens] = upstream
    ends_and_more = torch.full((tokens + 32,), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    ends_and_more[:tokens] = tiles.end
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        patch.setattr(torch, "empty_like", lambda x: guarded(x.shape, dtype=x.dtype, device=x.device))
        out = tree_attention(*views, tiles._replace(end=ends_and_more[:tokens]))
        out.backward(poisoned[:tokens])
    assert len(guards) == 6  # out, lse; dq, dk, dv, delta
    for memory in guards:
        outside = torch.cat((memory[:around], memory[-around:]))
        assert (outside == canary).all() or (canary != canary and outside.isnan().all())
        assert memory[around:-around].isfinite().all()

    plain = [x.requires_grad_() for x in plain]
    expected = tree_attention(*plain, tiles)
    expected.backward(upstream)
    for mine, theirs in zip([out, *(x.grad for x in views)], [expected, *(x.grad for x in plain)]):
        assert torch.equal(mine, theirs)


def test_gradients_are_the_same_bits_every_time():
    end = ends("deep", 120)
    q, k, v = (x.requires_grad_() for x in qkv(120, 4, 2, 8, torch.float32))
    runs = []
    for _ in range(2):
        out = tree_attention(q, k, v, tree_tiles(end, 16))
        runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_gradcheck_in_float64():
    end = TokenTree.pack([segment(3, segment(2), segment(9, segment(1), segment(2))), segment(3)], 100)[0].end.to(
        DEVICE
    )
    inputs = [x.requires_grad_() for x in qkv(20, 2, 1, 3, torch.float64)]
    tiles = tree_tiles(end, 16)
    assert torch.autograd.gradcheck(lambda q, k, v: tree_attention(q, k, v, tiles), inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_counted(kind):
    end = ends(kind)
    assert pairs(end) == int(visible(end).sum())
