"""The GPU's chunk attention and its page writes, over whole contexts in float64. In Triton's interpreter without a GPU."""

import numpy as np
import pytest
import torch

from engine.kernels.chunk_attention import chunk_attention_reference
from engine.kernels.rope import rope_reference
from engine.kernels.rope_write import rope_write, rope_write_reference
from engine.kernels.work_attention import work_attention, work_attention_reference
from engine.work import Capacity, make_work
from tests.engine.helpers import small_config
from tests.engine.test_work import BLOCK, layout_of, random_layout
from tests.kernels.yardstick import within

pytestmark = pytest.mark.gpu_too

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
SHAPES = [(4, 4, 16), (4, 2, 8), (8, 1, 40), (6, 2, 80), (2, 2, 128)]  # heads, kv heads, head dim: groups of 1, 2, 8, 3
SHARED = [1, 2, 3]
MIXED = [  # (position of the first row, rows, pages of 8 tokens): decoding behind shared pages, prompts, short tails
    (30, 1, [*SHARED, 4]),
    (31, 1, [*SHARED, 5]),
    (17, 1, [1, 2, 6]),
    (0, 19, [7, 8, 9]),
    (8, 3, [10, 11]),
    (0, 1, [15]),
    (44, 1, [*SHARED, 12, 13, 14]),
]


def tensors(layout, shape, dtype, size=BLOCK, seed=0):
    """q [R, H, D], and pages in which every slot that no row sees is NaN."""
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    blocks = int(layout.pages.max()) + 2
    keys, values = (torch.full((blocks, kv_heads, size, dim), float("nan"), dtype=dtype) for _ in range(2))
    for w, (start, rows) in enumerate(zip(layout.starts, layout.rows)):
        table = layout.pages[layout.first_page[w] : layout.first_page[w + 1]]
        for position in range(start + rows):
            page, slot = table[position // size], position % size
            if keys[page, 0, slot, 0].isnan():
                keys[page, :, slot], values[page, :, slot] = make(kv_heads, dim), make(kv_heads, dim)
    q = make(int(layout.first_row[-1]), heads, dim)
    return q.to(DEVICE), keys.to(DEVICE), values.to(DEVICE)


def whole_context(layout, q, keys, values, wide=torch.float64):
    """Softmax over everything that a row sees, from gathered keys and values."""
    out = torch.empty_like(q, dtype=wide)
    group = q.shape[1] // keys.shape[1]
    for w, start in enumerate(layout.starts):
        table = torch.from_numpy(layout.pages[layout.first_page[w] : layout.first_page[w + 1]]).to(q.device)
        k, v = (x[table].transpose(0, 1).flatten(1, 2).repeat_interleave(group, dim=0) for x in (keys, values))
        for number, row in enumerate(range(layout.first_row[w], layout.first_row[w + 1])):
            seen = int(start) + number + 1
            scores = torch.einsum("hd,htd->ht", q[row].to(wide), k[:, :seen].to(wide)) * q.shape[2] ** -0.5
            out[row] = torch.einsum("ht,htd->hd", scores.softmax(dim=-1).to(wide), v[:, :seen].to(wide))
    return out


def attend(layout, q, keys, values, size=BLOCK, capacity=None, grouped=True):
    config = small_config(n_heads=q.shape[1], n_kv_heads=keys.shape[1])
    work = make_work(layout, size, config, q.dtype, capacity, grouped)
    work = type(work)(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in work))
    if capacity is not None:  # rows that pad a graph
        q = torch.cat(
            (q, torch.full((capacity.rows - len(q), *q.shape[1:]), float("nan"), dtype=q.dtype, device=DEVICE))
        )
    return work_attention(q, keys.transpose(-1, -2), values, work), work


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_gets_the_attention_over_its_whole_context(shape, dtype):
    """Prompts, decoding behind shared pages and short tails in one step; what nobody sees is NaN."""
    layout = layout_of(MIXED)
    given = tensors(layout, shape, dtype)
    out, work = attend(layout, *given)
    assert len(work.wide) and len(work.narrow) and work.slots
    exact = whole_context(layout, *given)
    # torch's own way, in the dtype: products of that dtype, softmax rounded to it
    within(out, exact, whole_context(layout, *given, wide=dtype).to(dtype))


@pytest.mark.parametrize("size", [8, 16, 64])
def test_blocks_of_every_size(size):
    layout = layout_of([(3 * size + 2, 1, [1, 2, 3, 4]), (3 * size + 5, 1, [1, 2, 3, 5]), (0, 2 * size, [6, 7])])
    given = tensors(layout, (2, 2, 16), torch.float32, size)
    out, _ = attend(layout, *given, size)
    within(out, whole_context(layout, *given), whole_context(layout, *given, wide=torch.float32))


def test_random_trees_of_pages():
    for seed in range(2):
        layout = random_layout(seed, sequences=12)
        given = tensors(layout, (4, 2, 16), torch.float32, seed=seed)
        out, _ = attend(layout, *given)
        within(out, whole_context(layout, *given), whole_context(layout, *given, wide=torch.float32))


def decoding():
    """Rows that share pages at two depths."""
    layout = layout_of([(43 + n, 1, [1, 2, 3 + n // 2, 10 + n, 20 + n, 30 + n]) for n in range(5)])
    return layout, tensors(layout, (4, 2, 16), torch.float32)


def test_how_rows_are_grouped_is_no_part_of_the_result():
    """Every row in items of its own, and shared items: the same bits, because partials come from a chunk alone and are
    folded in its order, in registers or through slots. In the interpreter numpy's product rounds by place in the tile."""
    layout, given = decoding()
    together, work = attend(layout, *given)
    alone, single = attend(layout, *given, grouped=False)
    assert work.narrow[:, 4].max() > 1 and single.narrow[:, 4].max() == 1
    torch.testing.assert_close(together, alone, rtol=0, atol=0 if DEVICE == "cuda" else 1e-6)


def test_how_runs_are_cut_is_no_part_of_the_result(monkeypatch):
    layout, given = decoding()
    cut, pieces = attend(layout, *given)
    monkeypatch.setattr("engine.work.PROGRAMS", 1)
    whole, runs = attend(layout, *given)
    assert pieces.narrow[:, 1].max() == 1 < runs.narrow[:, 1].max()
    assert torch.equal(cut, whole)


def test_which_physical_pages_hold_a_context_is_no_part_of_the_result():
    layout, (q, keys, values) = decoding()
    other = torch.randperm(len(keys), generator=torch.Generator().manual_seed(1))
    moved = layout._replace(pages=torch.argsort(other)[torch.from_numpy(layout.pages)].numpy())
    order = other.to(DEVICE)
    assert torch.equal(attend(moved, q, keys[order], values[order])[0], attend(layout, q, keys, values)[0])


def test_padding_to_a_graphs_capacity_is_no_part_of_the_result():
    layout, given = decoding()
    room = Capacity.of(8, 16, 2)
    padded, work = attend(layout, *given, capacity=room)
    assert len(padded) == 8 and len(work.narrow) == room.items
    assert torch.equal(padded[:5], attend(layout, *given)[0])


def test_a_step_of_padding_alone_reads_and_writes_nothing():
    empty = layout_of([])
    q, pages = torch.empty(0, 4, 16, device=DEVICE), torch.full((2, 2, BLOCK, 16), float("nan"), device=DEVICE)
    out, _ = attend(empty, q, pages, pages, capacity=Capacity.of(4, 16, 2))
    assert out.shape == (4, 4, 16)


def test_no_rows_at_all():
    q, pages = torch.empty(0, 4, 16, device=DEVICE), torch.empty(2, 2, BLOCK, 16, device=DEVICE)
    assert attend(layout_of([]), q, pages, pages)[0].shape == (0, 4, 16)


def test_the_reference_says_the_same():
    layout = layout_of(MIXED)
    q, keys, values = tensors(layout, (4, 2, 8), torch.float32)
    out, work = attend(layout, q, keys, values)
    torch.testing.assert_close(work_attention_reference(q, keys.transpose(-1, -2), values, work), out)
    items = torch.from_numpy(np.array(sorted(layout.chunk_items(BLOCK).tolist(), key=lambda item: item[1])))
    folded = chunk_attention_reference(q, keys.transpose(-1, -2), values, items, work.positions.long())
    torch.testing.assert_close(folded, out)


# ---- writing pages ---------------------------------------------------------------------------------------------------


def writing(dtype, shape=(5, 2, 12), rows=7, size=8, transposed=True):
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim, generator=generator).to(dtype).to(DEVICE)
    angle = torch.randn(rows, dim // 2, generator=generator).to(DEVICE)
    keys, values = (torch.full((6, kv_heads, size, dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    keys = (
        keys.transpose(-1, -2) if transposed else torch.full((6, kv_heads, dim, size), 7.0, dtype=dtype, device=DEVICE)
    )
    return qkv.split([heads, kv_heads, kv_heads], dim=1), angle.cos(), angle.sin(), keys, values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [True, False], ids=["keys by token", "keys by unit"])
@pytest.mark.parametrize("shape", [(5, 2, 12), (2, 1, 128), (32, 32, 8)], ids=str)
def test_rope_write_turns_writes_and_touches_nothing_else(shape, transposed, dtype):
    (q, k, v), cos, sin, keys, values = writing(dtype, shape, transposed=transposed)
    slots = torch.tensor([9, 8, 40, -1, 3, 17, -1], device=DEVICE)
    out = rope_write(q, k, v, cos, sin, keys, values, slots, torch.empty(0, 3, dtype=torch.int64, device=DEVICE))
    exact = rope_reference(q.double(), cos.double(), sin.double())
    within(out, exact, rope_reference(q, cos, sin))
    turned, theirs = rope_reference(k.double(), cos.double(), sin.double()), rope_reference(k, cos, sin)
    untouched = torch.ones(6 * 8, dtype=torch.bool)
    by_token, values = keys.permute(0, 3, 1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            within(by_token[slot], turned[row], theirs[row])
            assert torch.equal(values[slot], v[row])
            untouched[slot] = False
    assert (by_token[untouched] == 7).all() and (values[untouched] == 7).all()


def test_copies_are_made_in_their_order_behind_the_writes():
    """The second copy reads what the first one wrote, and what a row of this step wrote."""
    (q, k, v), cos, sin, keys, values = writing(torch.float32)
    slots = torch.tensor([8, 9, 10, 11, 19, 20, -1], device=DEVICE)
    copies = torch.tensor([[1, 2, 3], [2, 4, 5], [4, 5, 1]], device=DEVICE)
    theirs = keys.clone(), values.clone()
    rope_write(q, k, v, cos, sin, keys, values, slots, copies)
    kept = slots >= 0
    rope_write_reference(q[kept], k[kept], v[kept], cos[kept], sin[kept], *theirs, slots[kept], copies)
    torch.testing.assert_close(keys, theirs[0])
    assert torch.equal(values, theirs[1])
