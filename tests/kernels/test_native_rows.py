"""The sampler's native row kernels: RMSNorm, SwiGLU and attention over chunks.

Against float64 by the yardstick of torch's own fp32, and for every one: a row's bits are the same at every instruction
level, alone and in any batch, place and thread count. Slots that nobody sees hold NaN throughout.
"""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import _C, ops
from engine.errors import InputError
from engine.kernels.chunk_attention import chunk_attention_reference
from engine.kernels.rms_norm import rms_norm_reference
from engine.kernels.rope_write import rope_write_reference
from engine.kernels.swiglu import swiglu_reference

from .test_chunk_attention import case as chunk_case
from .test_chunk_attention import exact, items_of, reference

LEVELS = _C.instruction_levels()
CANARY = 12345.0
LEVEL = pytest.mark.parametrize("level", LEVELS)
WIDTHS = [1, 7, 16, 17, 127, 768, 4095]


@pytest.fixture(autouse=True)
def threads_share_little():
    """Else so little work stays on one thread whatever is asked for."""
    _C.share_little(True)
    yield
    _C.share_little(False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def guarded(shape):
    """A place for a result between two canaries, and a function that asserts that they live."""
    size = math.prod(shape)
    memory = np.full(size + 64, CANARY, np.float32)
    out = memory[32 : 32 + size].reshape(shape)
    out[...] = np.nan

    def check():
        assert (memory[:32] == CANARY).all() and (memory[32 + size :] == CANARY).all()

    return out, check


def array(x):
    """numpy has no bf16: its bits."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def call(kernel, shape, *given, threads=1, level=""):
    out, check = guarded(shape)
    kernel(*(array(x) if isinstance(x, torch.Tensor) else x for x in given), out, threads, level)
    check()
    return torch.from_numpy(out.copy())


def rms_norm(x, weight, eps=1e-5, **how):
    return call(_C.rms_norm, tuple(x.shape), x, weight, eps, **how)


def swiglu(gate_up, **how):
    return call(_C.swiglu, (len(gate_up), gate_up.shape[1] // 2), gate_up, **how)


def attend(q, keys, values, tables, positions, together=lambda row: True, **how):
    items = items_of(tables, positions, keys.shape[3], together)
    return call(_C.chunk_attention, tuple(q.shape), q, keys, values, items, positions, **how)


def same(a, b):
    """The same bits, -0 apart from 0; two NaN are the same."""
    return torch.equal(torch.where(a.isnan(), 0, a.view(torch.int32)), torch.where(b.isnan(), 0, b.view(torch.int32)))


def within_twice(result, truth, eager, small):
    error, yardstick = (result.double() - truth).abs().max(), (eager.double() - truth).abs().max()
    assert error <= 2 * yardstick + small, f"error {error:.3g}, torch's {yardstick:.3g}"


# ---- RMSNorm and SwiGLU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("rows", [1, 2, 129])
def test_rms_norm_is_as_near_to_float64_as_torch(rows, dim):
    x, weight = normal(rows, dim) * 3, normal(dim, seed=1)
    truth = rms_norm_reference(x.double(), weight.double(), 1e-5)
    within_twice(rms_norm(x, weight), truth, rms_norm_reference(x, weight, 1e-5), 3e-7)


@LEVEL
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dim", [1, 7, 16, 127, 129, 768])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 129])
def test_add_rms_norm_is_one_rounded_sum_and_the_bits_of_its_norm(rows, dim, threads, level):
    x, branch, weight = normal(rows, dim), normal(rows, dim, seed=1) * 3, normal(dim, seed=2)
    total, check = guarded((rows, dim))
    normed = call(_C.add_rms_norm, (rows, dim), x, branch, weight, 1e-5, total, threads=threads, level=level)
    check()
    assert same(torch.from_numpy(total), x + branch)
    assert same(normed, rms_norm(x + branch, weight))


@pytest.mark.parametrize("ffn", WIDTHS)
@pytest.mark.parametrize("rows", [1, 2, 129])
def test_swiglu_is_as_near_to_float64_as_torch(rows, ffn):
    gate_up = normal(rows, 2 * ffn) * 4
    within_twice(swiglu(gate_up), swiglu_reference(gate_up.double()), swiglu_reference(gate_up), 3e-7)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_and_swiglu_have_the_same_bits_at_every_level(width):
    x, weight, gate_up = normal(5, width), normal(width, seed=1), normal(5, 2 * width, seed=2) * 9
    for level in LEVELS[1:]:
        assert same(rms_norm(x, weight, level=level), rms_norm(x, weight))
        assert same(swiglu(gate_up, level=level), swiglu(gate_up))


@LEVEL
@pytest.mark.parametrize("width", [17, 4095])
def test_a_row_of_rms_norm_and_swiglu_is_the_same_alone_and_anywhere_in_a_batch(width, level):
    weight = normal(width, seed=1)
    for kernel, x in (
        (lambda x, **how: rms_norm(x, weight, **how), normal(129, width)),
        (swiglu, normal(129, 2 * width)),
    ):
        batch = kernel(x, level=level)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
        for threads in (2, 3, 8):
            assert same(kernel(x[order], threads=threads, level=level), batch[order])
        for row in (0, 64, 128):
            assert same(kernel(x[row : row + 1], threads=2, level=level), batch[row : row + 1])


@LEVEL
def test_exp_keeps_two_units_in_the_last_place_through_swiglu(level):
    """silu(-x) / -x = 1 / (1 + e^x): for large x the quotient is e^-x itself, to the rounding of 1 + e^x and a division."""
    x = torch.linspace(20.0, 85.0, 200_001)
    gate_up = torch.cat([-x, torch.ones_like(x)]).view(1, -1)
    truth = (-x.double()) / (1 + x.double().exp())
    result = swiglu(gate_up, level=level)[0].double()
    assert ((result / truth - 1).abs().max()) <= (
        2 + 1.5
    ) * 2**-23  # and half a unit each for the sum, quotient, product


@LEVEL
def test_swiglu_at_the_ends_of_the_range(level):
    gates = torch.tensor([0.0, -0.0, 90.0, -90.0, 88.7, -88.7, 1e30, -1e30, 3.4e38, -3.4e38, math.inf, math.nan, 1e-40])
    result = swiglu(torch.cat([gates, torch.ones_like(gates)]).view(1, -1), level=level)[0]
    expected = F.silu(gates.double()).float()
    assert torch.allclose(result, expected, rtol=1e-6, atol=2e-36, equal_nan=True)
    assert result[1].view(torch.int32) == -(2**31), "silu(-0) is -0"


# ---- attention -------------------------------------------------------------------------------------------------------


def case(rows, heads, groups, dim, size, chunks):
    return chunk_case(heads, groups, dim, size, chunks, rows=rows)


SHAPES = [  # rows, heads, groups, dim, size, chunks
    (9, 2, 2, 2, 8, 4), (5, 4, 2, 6, 65, 3), (7, 3, 1, 32, 64, 3), (6, 8, 1, 80, 8, 5), (4, 12, 12, 64, 64, 2),
    (5, 16, 2, 128, 65, 2), (3, 7, 1, 128, 128, 2), (9, 5, 1, 18, 1, 9), (3, 4, 2, 16, 33, 2), (129, 2, 1, 6, 8, 2),
    (64, 4, 2, 64, 64, 4), (48, 4, 4, 64, 32, 5),  # enough work for several threads
    (80, 1, 1, 20, 128, 2), (41, 40, 1, 16, 8, 3),  # several blocks of 32 queries, of one row even
    (67, 2, 1, 7, 7, 3), (66, 3, 3, 127, 129, 2), (70, 2, 2, 1, 8, 3),  # and odd: more than 32 rows share pages
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_as_near_to_float64_as_torch_and_reads_nothing_unseen(shape):
    given = case(*shape)
    within_twice(attend(*given), exact(*given), exact(*given, dtype=torch.float32), 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_has_the_same_bits_at_every_level(shape):
    given = case(*shape)
    for level in LEVELS[1:]:
        assert same(attend(*given, level=level), attend(*given))


@LEVEL
@pytest.mark.parametrize("shape", SHAPES)
def test_how_rows_are_grouped_into_items_changes_no_bit(shape, level):
    """One item a row is the plain case; neighbours together at random, all that can be, and on several threads."""
    given = case(*shape)
    alone = attend(*given, together=lambda row: False, level=level)
    for threads in (1, 2, 3):
        assert same(attend(*given, threads=threads, level=level), alone)
    for seed in range(3):
        coins = random.Random(seed)
        assert same(
            attend(*given, together=lambda row, c=coins: c.random() < 0.8, threads=seed + 1, level=level), alone
        )


@LEVEL
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_over_bf16_pages_has_the_bits_of_the_same_pages_in_fp32(shape, level):
    queries, keys, values, tables, positions = case(*shape)
    keys, values = keys.bfloat16(), values.bfloat16()
    wide = attend(queries, keys.float(), values.float(), tables, positions)
    for threads in (1, 3):
        assert same(attend(queries, keys, values, tables, positions, threads=threads, level=level), wide)
    assert torch.allclose(reference(queries, keys, values, tables, positions), wide, atol=1e-5)


@LEVEL
@pytest.mark.parametrize("threads", [1, 3])
def test_an_item_of_many_rows_may_follow_items_of_few(threads, level):
    """Work of the two kinds is done apart, but a row folds in the order of its items."""
    rows, size = 40, 8  # from 32 on they are many
    queries, keys, values = normal(rows, 4, 20), normal(60, 2, 20, size, seed=1), normal(60, 2, size, 20, seed=2)
    own, shared = torch.arange(rows), torch.tensor([50, 51])
    positions = torch.full((rows,), 4 * size - 1)
    tables = torch.stack([shared[0].expand(rows), own, shared[1].expand(rows), own.flip(0)], dim=1)
    alone = attend(queries, keys, values, tables, positions, together=lambda row: False, level=level)
    assert same(attend(queries, keys, values, tables, positions, threads=threads, level=level), alone)


@LEVEL
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_attention_is_the_same_alone_and_anywhere_in_a_batch(shape, level):
    queries, keys, values, tables, positions = case(*shape)
    batch = attend(queries, keys, values, tables, positions, level=level)
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(1))
    mixed = attend(queries[order], keys, values, tables[order], positions[order], threads=2, level=level)
    assert same(mixed, batch[order])
    for row in [*range(min(len(queries), 4)), len(queries) - 1]:
        one = slice(row, row + 1)
        assert same(attend(queries[one], keys, values, tables[one], positions[one], threads=2, level=level), batch[one])


@LEVEL
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_of_a_shared_page_does_not_see_its_later_slots(bad, level):
    """The diagonal of a prefill: rows of one item see 1, 2, ... slots, and whatever the later ones hold is not theirs."""
    rows, size = 24, 16
    queries, keys, values = normal(rows, 4, 20), normal(3, 2, 20, size, seed=1), normal(3, 2, size, 20, seed=2)
    tables, positions = torch.tensor([[1, 2]]).repeat(rows, 1), torch.arange(rows)
    clean = attend(queries, keys, values, tables, positions, level=level)
    for at in (5, 15, 16, 22):
        for pages, place in ((keys, (at // size + 1, slice(None), slice(None), at % size)),
                             (values, (at // size + 1, slice(None), at % size))):  # fmt: skip
            kept = pages[place].clone()
            pages[place] = bad
            out = attend(queries, keys, values, tables, positions, threads=2, level=level)
            assert same(out[:at], clean[:at]) and not out[at:].isfinite().all(-1).any()
            pages[place] = kept


def test_a_head_of_attention_is_the_same_whoever_shares_its_group():
    queries, keys, values, tables, positions = case(6, 8, 1, 32, 16, 3)
    together = attend(queries, keys, values, tables, positions)
    for count in (1, 2, 3, 5):
        assert same(attend(queries[:, :count].contiguous(), keys, values, tables, positions), together[:, :count])


def test_where_the_pages_lie_and_who_shares_them_does_not_matter():
    queries, keys, values, tables, positions = case(6, 4, 2, 16, 8, 4)
    positions[:], tables = 31, torch.arange(1, 5).repeat(6, 1)
    keys, values = normal(*keys.shape), normal(*values.shape, seed=1)
    out = attend(queries, keys, values, tables, positions)
    place = torch.randperm(len(keys), generator=torch.Generator().manual_seed(2))
    moved_keys, moved_values = torch.empty_like(keys), torch.empty_like(values)
    moved_keys[place], moved_values[place] = keys, values
    assert same(attend(queries, moved_keys, moved_values, place[tables], positions), out)


@LEVEL
@pytest.mark.parametrize("scale", [1e4, 1e15])
def test_attention_of_huge_scores_takes_the_largest(scale, level):
    given = case(9, 4, 2, 16, 8, 4)
    queries = given[0] * scale
    out = attend(queries, *given[1:], level=level)
    truth = exact(queries, *given[1:])
    assert (out - truth).abs().max() <= 2 * (exact(queries, *given[1:], dtype=torch.float32) - truth).abs().max() + 1e-6


@LEVEL
def test_a_key_whose_score_overflows_downwards_weighs_nothing(level):
    """Also where a whole chunk is such, before or after one that is not."""
    queries, keys, values, positions = torch.ones(3, 1, 2), torch.ones(4, 1, 2, 8), normal(4, 1, 8, 2), [15, 15, 7]
    keys[1], keys[3, :, :, 3] = -3e38, -3e38
    tables = torch.tensor([[1, 2], [2, 1], [3, 0]])
    out = attend(queries, keys, values, tables, torch.tensor(positions), level=level)
    assert torch.allclose(out[0], values[2].mean(1)) and torch.allclose(out[1], values[2].mean(1))
    assert torch.allclose(out[2], values[3, :, [0, 1, 2, 4, 5, 6, 7]].mean(1))


@LEVEL
@pytest.mark.parametrize("place", [0, 7, 8, 15])
def test_a_nan_in_a_visible_key_or_value_is_not_hidden(place, level):
    """Every visible slot counts: what the poison of the other tests checks, the other way round."""
    for poisoned in (1, 2):
        given = list(case(1, 2, 1, 6, 8, 2))
        given[4][:], given[3][:] = 15, torch.tensor([[1, 2]])
        given[1], given[2] = normal(3, 1, 6, 8), normal(3, 1, 8, 6)
        page, slot = place // 8 + 1, place % 8
        given[poisoned][(page, 0, 2, slot) if poisoned == 1 else (page, 0, slot, 2)] = math.nan
        out = attend(*given, level=level)
        assert out.isnan().all() if poisoned == 1 else out[..., 2].isnan().all() and not out[..., 3].isnan().any()


@LEVEL
def test_a_context_of_one_token_returns_its_value(level):
    queries, keys, values, tables, positions = case(9, 2, 2, 6, 8, 4)
    positions[:] = 0
    tables = torch.where(tables > 0, tables, 1)
    values = normal(*values.shape)
    keys = torch.where(keys.isnan(), 1.0, keys)
    assert torch.equal(attend(queries, keys, values, tables, positions, level=level), values[tables[:, 0], :, 0])


def test_no_rows_are_no_error():
    empty = torch.zeros(0, 2, 6), torch.zeros(3, 1, 6, 8), torch.zeros(3, 1, 8, 6)
    assert attend(*empty, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)).shape == (0, 2, 6)
    assert rope_write(*(x[:0] for x in rope_case(3, 4, 2, 6)), *pages(3, 2, 6, 8), ints(), ints((1, 2, 3))).numel() == 0
    assert rms_norm(torch.zeros(0, 5), torch.zeros(5)).shape == (0, 5) and swiglu(torch.zeros(0, 6)).shape == (0, 3)


# ---- RoPE and the write to the pages ---------------------------------------------------------------------------------


def rope_case(rows, heads, groups, dim):
    """q, k, v as views of one product's rows, and the angles."""
    mixed = normal(rows, heads + 2 * groups, dim)
    angles = normal(rows, dim // 2, seed=1) * 9
    return *mixed.split([heads, groups, groups], dim=1), angles.cos(), angles.sin()


def pages(blocks, groups, dim, size, dtype=torch.float32):
    return tuple(torch.full((blocks, groups, *page), math.nan, dtype=dtype) for page in ((dim, size), (size, dim)))


def rope_write(q, k, v, cos, sin, key_pages, value_pages, slots, copies, **how):
    slots, copies = slots.reshape(-1), copies.reshape(-1, 3)
    return call(_C.rope_write, tuple(q.shape), q, k, v, cos, sin, key_pages, value_pages, slots, copies, **how)


ROPE_SHAPES = [(1, 2, 2, 2, 8), (5, 4, 2, 6, 8), (40, 12, 12, 64, 64), (70, 8, 1, 128, 32), (33, 6, 3, 34, 16),
               (7, 1, 1, 126, 127), (129, 1, 1, 258, 1)]  # fmt: skip


@LEVEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("rows", "heads", "groups", "dim", "size"), ROPE_SHAPES)
def test_rope_write_has_the_bits_of_the_reference_and_touches_no_other_slot(
    rows, heads, groups, dim, size, threads, dtype, level
):
    given, blocks = rope_case(rows, heads, groups, dim), rows // size + 9
    generator = torch.Generator().manual_seed(2)
    slots = torch.randperm((blocks - 5) * size, generator=generator)[:rows]  # the last five blocks: copies alone
    slots[: rows // 2] = slots[: rows // 2].sort().values
    source = int(slots[0]) // size
    copies = torch.tensor([[source, blocks - 1, size], [blocks - 1, blocks - 2, size - 1],
                           [0, blocks - 3, 1], [source, blocks - 4, 0]])  # fmt: skip
    ours, theirs = pages(blocks, groups, dim, size, dtype), pages(blocks, groups, dim, size, dtype)
    out = rope_write(*given, *ours, slots, copies, threads=threads, level=level)
    assert same(out, rope_write_reference(*given, *theirs, slots, copies))
    assert same(ours[0].float(), theirs[0].float()) and same(ours[1].float(), theirs[1].float())
    assert ours[0][-5].isnan().all() and ours[1][-5].isnan().all()
    turned = out.double().square().sum(-1)  # a rotation: the pairs keep their length
    assert torch.allclose(turned, given[0].double().square().sum(-1), rtol=1e-5)


@LEVEL
def test_values_are_rounded_to_the_nearest_bf16_ties_to_even(level):
    """Every kind of number: halves, just beside them, the ends of the range, denormal, infinite and no number."""
    whole = torch.arange(0, 2**31, 2**22 + 2**16).int()  # upper halves of all exponents, even and odd
    v = torch.cat(
        [(whole // 2**16 * 2**16 + low).view(torch.float32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    )
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # not to become inf or -0
    v = torch.cat([v, nans, torch.tensor([math.inf, 3.4e38])])
    v = torch.cat([v, -v])
    v = v[: len(v) // 4 * 4].view(-1, 1, 4)
    none, written = torch.zeros(len(v), 1, 4), pages(-(-len(v) // 8), 1, 4, 8, torch.bfloat16)
    flat = torch.zeros(len(v), 2)
    rope_write(none, none, v.contiguous(), flat + 1, flat, *written, torch.arange(len(v)), ints(), level=level)
    assert same(written[1].flatten(0, 2)[: len(v)].float(), v[:, 0].bfloat16().float())


def test_the_op_writes_the_same_with_both_backends():
    given = rope_case(9, 4, 2, 6)
    slots, copies = torch.arange(11, 20), torch.tensor([[1, 3, 5]])
    results = []
    for backend in ops.OPS["rope_write"]:
        written = pages(4, 2, 6, 8)
        results.append((backend.fn(*given, *written, slots, copies, 1), *written))
    written = pages(4, 2, 6, 8)
    results.append((ops.rope_write(*given, *written, slots, copies), *written))
    assert all(same(a, b) for result in results[1:] for a, b in zip(results[0], result))


# ---- wrong arguments -------------------------------------------------------------------------------------------------


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def refused(kernel, good, name, value, message):
    kernel(**good)
    with pytest.raises(ValueError, match=message):
        kernel(**(good | {name: value}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", zeros(2, 7, dtype=np.float64), "x has dtype float64; expected float32"),
        ("x", zeros(7, 2).T, r"x has strides \[4, 8\] bytes; expected a C-contiguous array"),
        ("x", zeros(7), r"x has shape \[7\]; expected \[-1, -1\]"),
        ("weight", zeros(8), r"weight has shape \[8\]; expected \[7\]"),
        ("out", zeros(2, 8), r"out has shape \[2, 8\]; expected \[2, 7\]"),
        ("threads", 0, "threads is 0; expected at least 1"),
        ("level", "sse9", "level is 'sse9'; this CPU runs .*portable"),
    ],
)
def test_rms_norm_refuses_a_wrong_argument_by_name(name, value, message):
    good = {"x": zeros(2, 7), "weight": zeros(7), "eps": 1e-5, "out": zeros(2, 7), "threads": 1, "level": ""}
    refused(_C.rms_norm, good, name, value, message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("branch", zeros(3, 7), r"branch has shape \[3, 7\]; expected \[2, 7\]"),
        ("weight", zeros(8), r"weight has shape \[8\]; expected \[7\]"),
        ("out_sum", zeros(2, 8), r"out_sum has shape \[2, 8\]; expected \[2, 7\]"),
        ("out_norm", zeros(2, 7, dtype=np.float64), "out_norm has dtype float64; expected float32"),
        ("threads", 0, "threads is 0; expected at least 1"),
    ],
)
def test_add_rms_norm_refuses_a_wrong_argument_by_name(name, value, message):
    good = {"x": zeros(2, 7), "branch": zeros(2, 7), "weight": zeros(7), "eps": 1e-5}
    good |= {"out_sum": zeros(2, 7), "out_norm": zeros(2, 7), "threads": 1}
    refused(_C.add_rms_norm, good, name, value, message)
    for first, second in (("out_norm", "out_sum"), ("out_sum", "branch"), ("out_norm", "x")):
        with pytest.raises(ValueError, match="shares memory with"):
            _C.add_rms_norm(**(good | {first: good[second]}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gate_up", zeros(2, 14, dtype=np.float16), "gate_up has dtype float16; expected float32"),
        ("gate_up", zeros(2, 13), r"gate_up has shape \[2, 13\]; expected \[2, 14\]"),
        ("out", zeros(14), r"out has shape \[14\]; expected \[-1, -1\]"),
        ("threads", -1, "threads is -1; expected at least 1"),
    ],
)
def test_swiglu_refuses_a_wrong_argument_by_name(name, value, message):
    refused(_C.swiglu, {"gate_up": zeros(2, 14), "out": zeros(2, 7), "threads": 1}, name, value, message)


def ints(*values):
    return np.array(values, np.int64)


def items(at=None, item=None):
    """Two rows of 2 and 3 chunks of which they share the second, item `at` being another."""
    given = ints([1, 0, 0, 1], [2, 0, 1, 2], [3, 1, 0, 2], [4, 2, 1, 2])
    if at is not None:
        given[at] = item
    return given


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", zeros(2, 4, 6, dtype=np.float64), "q has dtype float64; expected float32"),
        ("q", zeros(2, 3, 6), r"out has shape \[2, 4, 6\]; expected \[2, 3, 6\]"),
        ("key_pages", zeros(5, 2, 7, 8), r"key_pages has shape \[5, 2, 7, 8\]; expected \[-1, -1, 6, -1\]"),
        ("key_pages", zeros(5, 2, 8, 6).swapaxes(2, 3), "key_pages has strides"),
        ("key_pages", zeros(5, 2, 6, 8, dtype=np.float16), "key_pages has dtype float16; expected float32, or uint16"),
        ("value_pages", zeros(5, 2, 8, 6, dtype=np.uint16), "value_pages has dtype uint16; expected float32"),
        ("value_pages", zeros(4, 2, 8, 6), r"value_pages has shape \[4, 2, 8, 6\]; expected \[5, 2, 8, 6\]"),
        ("items", zeros(3, 4, dtype=np.int32), "items has dtype int32; expected int64"),
        ("items", ints([1, 0, 0]), r"items has shape \[1, 3\]; expected \[-1, 4\]"),
        ("items", items(1, [5, 0, 1, 2]), r"items\[1\] has page 5; expected 0 or more and below 5"),
        ("items", items(0, [-1, 0, 0, 1]), r"items\[0\] has page -1; expected 0 or more and below 5"),
        ("items", items(2, [3, 1, 0, 3]), r"items\[2\] has rows 0 to 3; expected at least one of the 2 rows of q"),
        ("items", items(2, [3, 1, -1, 2]), r"items\[2\] has rows -1 to 2"),
        ("items", items(3, [3, 2, 1, 1]), r"items\[3\] has rows 1 to 1"),
        ("items", items(2, [3, 2, 0, 2]), r"items\[2\] has chunk 2; expected 1, the next one of row 0"),
        ("items", items(3, [4, 1, 1, 2]), r"items\[3\] has chunk 1; expected 2, the next one of row 1"),
        ("items", items(0, [1, -1, 0, 1]), r"items\[0\] has chunk -1; expected 0, the next one of row 0"),
        ("items", items()[[1, 0, 3, 2]], r"items\[2\] has chunk 2; expected 1, the next one of row 1"),
        ("items", items()[:3], r"items have 2 chunks of row 1; expected 3 of 8 slots for its position 23"),
        ("items", items(3, [4, 2, 0, 2]), r"items have 3 chunks of row 0; expected 2 of 8 slots for its position 9"),
        ("positions", ints(9, 24), r"items have 3 chunks of row 1; expected 4 of 8 slots for its position 24"),
        ("positions", ints(-1, 23), r"positions\[0\] is -1; expected 0 or more"),
        ("positions", ints(1, 2, 3), r"positions has shape \[3\]; expected \[2\]"),
        ("threads", 0, "threads is 0; expected at least 1"),
        ("level", "sse9", "level is 'sse9'; this CPU runs .*portable"),
    ],
)
def test_attention_refuses_a_wrong_argument_by_name(name, value, message):
    refused(_C.chunk_attention, attention_arguments(), name, value, message)


def attention_arguments():
    return {
        "q": zeros(2, 4, 6), "key_pages": zeros(5, 2, 6, 8), "value_pages": zeros(5, 2, 8, 6),
        "items": items(), "positions": ints(9, 23), "out": zeros(2, 4, 6), "threads": 1, "level": "",
    }  # fmt: skip


def rope_arguments():
    mixed = zeros(3, 8, 6)
    return {
        "q": mixed[:, :4], "k": mixed[:, 4:6], "v": mixed[:, 6:], "cos": zeros(3, 3), "sin": zeros(3, 3),
        "key_pages": zeros(5, 2, 6, 8), "value_pages": zeros(5, 2, 8, 6), "slots": ints(8, 9, 39),
        "copies": ints([1, 2, 8]), "out": zeros(3, 4, 6), "threads": 1, "level": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", zeros(3, 4, 6, dtype=np.float64), "q has dtype float64; expected float32"),
        ("q", zeros(3, 4, 12)[:, :, ::2], "q has strides .* bytes; expected contiguous rows"),
        ("k", zeros(3, 6, 2).swapaxes(1, 2), "k has strides .* bytes; expected contiguous rows"),
        ("v", zeros(3, 2, 6)[::-1], "v has strides .* bytes; expected contiguous rows"),
        ("k", zeros(3, 4, 6), r"k has shape \[3, 4, 6\]; expected \[3, 2, 6\]"),
        ("cos", zeros(3, 6), r"cos has shape \[3, 6\]; expected \[3, 3\]"),
        ("sin", zeros(2, 3), r"sin has shape \[2, 3\]; expected \[3, 3\]"),
        ("value_pages", zeros(4, 2, 8, 6), r"value_pages has shape \[4, 2, 8, 6\]; expected \[5, 2, 8, 6\]"),
        ("slots", ints(8, 9, 40), r"slots\[2\] is 40; expected 0 or more and below 40, the 5 blocks of 8 slots"),
        ("slots", ints(8, -1, 39), r"slots\[1\] is -1; expected 0 or more"),
        ("copies", ints([1, 2]), r"copies has shape \[1, 2\]; expected \[-1, 3\]"),
        ("copies", ints([1, 2, 8], [5, 2, 8]), r"copies\[1\] has block 5; expected 0 or more and below 5"),
        ("copies", ints([1, -2, 8]), r"copies\[0\] has block -2; expected 0 or more and below 5"),
        ("copies", ints([2, 2, 8]), r"copies\[0\] has source 2 and target 2; expected two blocks"),
        ("copies", ints([1, 2, 9]), r"copies\[0\] has 9 tokens; expected 0 to 8"),
        ("copies", ints([1, 2, -1]), r"copies\[0\] has -1 tokens; expected 0 to 8"),
        ("threads", 0, "threads is 0; expected at least 1"),
        ("level", "sse9", "level is 'sse9'; this CPU runs .*portable"),
    ],
)
def test_rope_write_refuses_a_wrong_argument_by_name(name, value, message):
    refused(_C.rope_write, rope_arguments(), name, value, message)


def test_rope_write_refuses_what_no_single_argument_shows():
    odd = {"q": zeros(3, 4, 7), "k": zeros(3, 2, 7), "v": zeros(3, 2, 7), "out": zeros(3, 4, 7),
           "key_pages": zeros(5, 2, 7, 8), "value_pages": zeros(5, 2, 8, 7)}  # fmt: skip
    with pytest.raises(ValueError, match=r"key_pages has shape \[5, 2, 7, 8\]; expected an even number of features"):
        _C.rope_write(**(rope_arguments() | odd))
    with pytest.raises(ValueError, match="q has 3 heads; expected a multiple of key_pages' 2 groups"):
        _C.rope_write(**(rope_arguments() | {"q": zeros(3, 3, 6), "out": zeros(3, 3, 6)}))
    good = rope_arguments() | {"q": zeros(3, 4, 6), "k": zeros(3, 2, 6)}
    with pytest.raises(ValueError, match="out shares memory with v"):  # within the span of a view, behind its nbytes
        _C.rope_write(**(good | {"out": good["v"].base.reshape(-1)[72:].reshape(3, 4, 6)}))
    with pytest.raises(ValueError, match="value_pages shares memory with key_pages"):
        _C.rope_write(**(good | {"value_pages": good["key_pages"].reshape(5, 2, 8, 6)}))
    good["key_pages"].flags.writeable = False
    with pytest.raises(ValueError, match="key_pages is read-only"):
        _C.rope_write(**good)


def test_attention_refuses_heads_that_the_groups_do_not_divide():
    good = attention_arguments()
    with pytest.raises(ValueError, match="q has 3 heads; expected a multiple of key_pages' 2 groups"):
        _C.chunk_attention(**(good | {"q": zeros(2, 3, 6), "out": zeros(2, 3, 6)}))


def test_an_output_that_is_also_an_input_or_read_only_is_refused():
    x = zeros(2, 8)
    with pytest.raises(ValueError, match="out shares memory with x"):
        _C.rms_norm(x, zeros(8), 1e-5, x, 1)
    with pytest.raises(ValueError, match="out shares memory with weight"):
        _C.rms_norm(zeros(2, 8), x[1], 1e-5, x, 1)
    with pytest.raises(ValueError, match="out shares memory with gate_up"):
        _C.swiglu(x, x.reshape(-1)[:8].reshape(2, 4), 1)
    good = attention_arguments()
    with pytest.raises(ValueError, match="out shares memory with q"):
        _C.chunk_attention(**(good | {"q": good["out"]}))
    with pytest.raises(ValueError, match="out shares memory with value_pages"):
        _C.chunk_attention(**(good | {"out": good["value_pages"].reshape(-1)[48:96].reshape(2, 4, 6)}))
    x.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        _C.rms_norm(zeros(2, 8), zeros(8), 1e-5, x, 1)


# ---- the op table ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_choice(monkeypatch):
    monkeypatch.delenv("SELFREWARD_BACKEND", raising=False)
    ops.choose.cache_clear()
    yield
    ops.choose.cache_clear()


ROW_OPS = ["rms_norm_rows", "swiglu_rows", "chunk_attention", "rope_write"]


@pytest.mark.parametrize("op", ROW_OPS)
def test_the_table_gives_the_native_kernel_for_fp32_on_the_cpu_and_says_why_not_otherwise(
    op, fresh_choice, monkeypatch
):
    assert ops.choose(op, "cpu").name == "native"
    (native,) = (backend for backend in ops.OPS[op] if backend.name == "native")
    for device, dtype, gradients, why in (
        ("cpu", torch.float32, True, "needs gradients"),
        ("cpu", torch.bfloat16, False, "torch.bfloat16"),
        ("cuda", torch.float32, False, "on cuda"),
    ):
        assert ops.choose(op, device, dtype, gradients).name != "native"
        assert why in native.why_not(ops.Case(device, dtype, gradients))
    ops.choose.cache_clear()
    monkeypatch.setenv("SELFREWARD_BACKEND", "native")
    with pytest.raises(InputError, match=r"native: needs gradients.*torch: SELFREWARD_BACKEND=native"):
        ops.choose(op, "cpu", gradients=True)


def test_the_ops_run_the_kernels_and_the_torch_backend_agrees(fresh_choice):
    x, weight, gate_up = normal(3, 17), normal(17, seed=1).requires_grad_(), normal(3, 34)
    given = case(9, 4, 2, 16, 8, 3)
    with torch.no_grad():
        assert same(ops.rms_norm_rows(x, weight, 1e-5, threads=2), rms_norm(x, weight.detach()))
        assert torch.allclose(ops.rms_norm_rows(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), atol=1e-6)
    assert same(ops.swiglu_rows(gate_up), swiglu(gate_up))
    assert torch.allclose(ops.swiglu_rows(gate_up), swiglu_reference(gate_up), atol=1e-6)
    queries, keys, values, tables, positions = given
    work = queries, keys, values, items_of(tables, positions, 8), positions
    assert same(ops.chunk_attention(*work, threads=3), attend(*given))
    assert torch.allclose(ops.chunk_attention(*work), chunk_attention_reference(*work), atol=1e-5)


def test_gradients_flow_where_they_are_asked_for_and_the_trainers_ops_are_the_same_without(fresh_choice):
    x, weight = normal(3, 17).requires_grad_(), normal(17, seed=1).requires_grad_()
    ops.rms_norm_rows(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is not None
    ops.swiglu_rows(normal(3, 34).requires_grad_()).sum().backward()
    with torch.no_grad():  # reference log-probs: the same bits as the policy's forward
        quiet = ops.rms_norm(x, weight, 1e-5), ops.swiglu(torch.cat([x, x], dim=1))
    assert torch.equal(quiet[0], ops.rms_norm(x, weight, 1e-5))
    assert torch.equal(quiet[1], ops.swiglu(torch.cat([x, x], dim=1)))
    assert ops.backends()["rms_norm"] == ops.backends()["swiglu"] == "native"


@pytest.mark.parametrize("threads", [2, 3])
def test_rows_that_are_shared_out_to_threads_have_the_bits_of_one_thread(threads):
    """Little work stays on one thread whatever is asked for, so there are many rows."""
    x, weight = torch.randn(6000, 512, generator=torch.Generator().manual_seed(0)), torch.ones(512)
    assert torch.equal(ops.rms_norm_rows(x, weight, 1e-5, threads), ops.rms_norm_rows(x, weight, 1e-5, 1))
    assert torch.equal(ops.swiglu_rows(x, threads), ops.swiglu_rows(x, 1))
