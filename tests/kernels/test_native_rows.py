"""The sampler's native row kernels: RMSNorm, SwiGLU and attention over chunks.

Against float64 by the yardstick of torch's own fp32, and for every one: a row's bits are the same at every instruction
level, alone and in any batch, place and thread count. Masked slots and unused pages hold NaN throughout.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import _C, ops
from engine.errors import InputError
from engine.kernels.chunk_attention import chunk_attention_reference
from engine.kernels.rms_norm import rms_norm_reference
from engine.kernels.swiglu import swiglu_reference

LEVELS = _C.instruction_levels()
CANARY = 12345.0
LEVEL = pytest.mark.parametrize("level", LEVELS)
WIDTHS = [1, 7, 16, 17, 127, 768, 4095]


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


def call(kernel, shape, *given, threads=1, level=""):
    out, check = guarded(shape)
    kernel(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in given), out, threads, level)
    check()
    return torch.from_numpy(out.copy())


def rms_norm(x, weight, eps=1e-5, **how):
    return call(_C.rms_norm, tuple(x.shape), x, weight, eps, **how)


def swiglu(gate_up, **how):
    return call(_C.swiglu, (len(gate_up), gate_up.shape[1] // 2), gate_up, **how)


def attend(q, keys, values, tables, positions, **how):
    return call(_C.chunk_attention, tuple(q.shape), q, keys, values, tables, positions, **how)


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


def case(rows, heads, groups, dim, size, chunks, seed=0):
    """Contexts that end anywhere, edges of chunks among them; whatever no row may read is NaN, block 0 too."""
    generator = torch.Generator().manual_seed(seed)
    blocks = rows * chunks + 1
    keys = torch.randn(blocks, groups, dim, size, generator=generator)
    values = torch.randn(blocks, groups, size, dim, generator=generator)
    queries = torch.randn(rows, heads, dim, generator=generator) * 2
    positions = torch.randint(0, size * chunks, (rows,), generator=generator)
    edges = torch.tensor([place for c in range(chunks) for place in (c * size, (c + 1) * size - 1)])[:rows]
    positions[: len(edges)] = edges
    tables = torch.randperm(blocks - 1, generator=generator).view(rows, chunks) + 1
    tables = torch.where(
        torch.arange(chunks) <= (positions // size)[:, None], tables, -(10**9)
    )  # entries behind: unread
    used = torch.zeros(blocks, size, dtype=torch.bool)
    for row, position in enumerate(positions.tolist()):
        for at in range(position + 1):
            used[tables[row, at // size], at % size] = True
    keys.masked_fill_(~used[:, None, None, :], math.nan)
    values.masked_fill_(~used[:, None, :, None], math.nan)
    return queries, keys, values, tables, positions


def exact(queries, keys, values, tables, positions, dtype=torch.float64):
    """Row by row over the written-out context, by torch."""
    repeat, dim, size = queries.shape[1] // keys.shape[1], keys.shape[2], keys.shape[3]
    out = torch.empty_like(queries, dtype=dtype)
    for row, position in enumerate(positions.tolist()):
        pages = tables[row, : position // size + 1]
        k = keys[pages].movedim(-1, 1).flatten(0, 1)[: position + 1].to(dtype).repeat_interleave(repeat, dim=1)
        v = values[pages].movedim(1, 2).flatten(0, 1)[: position + 1].to(dtype).repeat_interleave(repeat, dim=1)
        weights = (torch.einsum("hd,jhd->hj", queries[row].to(dtype), k) * dim**-0.5).softmax(-1)
        out[row] = torch.einsum("hj,jhd->hd", weights, v)
    return out


SHAPES = [  # rows, heads, groups, dim, size, chunks
    (9, 2, 2, 2, 8, 4), (5, 4, 2, 6, 65, 3), (7, 3, 1, 32, 64, 3), (6, 8, 1, 80, 8, 5), (4, 12, 12, 64, 64, 2),
    (5, 16, 2, 128, 65, 2), (3, 7, 1, 128, 128, 2), (9, 5, 1, 18, 1, 9), (3, 4, 2, 16, 33, 2), (129, 2, 1, 6, 8, 2),
    (64, 4, 2, 64, 64, 4),  # enough work for several threads
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
def test_a_row_of_attention_is_the_same_alone_and_anywhere_in_a_batch(shape, level):
    queries, keys, values, tables, positions = case(*shape)
    batch = attend(queries, keys, values, tables, positions, level=level)
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(1))
    for threads in (1, 2, 3, 8):
        mixed = attend(queries[order], keys, values, tables[order], positions[order], threads=threads, level=level)
        assert same(mixed, batch[order])
    for row in range(min(len(queries), 5)):
        own = int(positions[row]) // keys.shape[3] + 1
        one = slice(row, row + 1)
        alone = attend(queries[one], keys, values, tables[one, :own].clone(), positions[one], threads=2, level=level)
        assert same(alone, batch[one])


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
    assert rms_norm(torch.zeros(0, 5), torch.zeros(5)).shape == (0, 5) and swiglu(torch.zeros(0, 6)).shape == (0, 3)


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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", zeros(2, 4, 6, dtype=np.float64), "q has dtype float64; expected float32"),
        ("q", zeros(2, 3, 6), r"out has shape \[2, 4, 6\]; expected \[2, 3, 6\]"),
        ("key_pages", zeros(5, 2, 7, 8), r"key_pages has shape \[5, 2, 7, 8\]; expected \[-1, -1, 6, -1\]"),
        ("key_pages", zeros(5, 2, 8, 6).swapaxes(2, 3), "key_pages has strides"),
        ("value_pages", zeros(4, 2, 8, 6), r"value_pages has shape \[4, 2, 8, 6\]; expected \[5, 2, 8, 6\]"),
        ("tables", zeros(2, 3, dtype=np.int32), "tables has dtype int32; expected int64"),
        ("tables", ints([1, 5, 0], [1, 2, 3]), r"tables\[0, 1\] is 5; expected 0 or more and below 5"),
        ("tables", ints([1, 2, 0], [-1, 2, 3]), r"tables\[1, 0\] is -1; expected 0 or more and below 5"),
        ("positions", ints(1, 24), r"positions\[1\] is 24; expected 0 or more and below 24, the 3 chunks of 8"),
        ("positions", ints(-1, 3), r"positions\[0\] is -1; expected 0 or more and below 24"),
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
        "tables": ints([1, 2, 0], [1, 2, 3]), "positions": ints(9, 23), "out": zeros(2, 4, 6), "threads": 1, "level": "",
    }  # fmt: skip


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


ROW_OPS = ["rms_norm_rows", "swiglu_rows"]


@pytest.mark.parametrize("op", ROW_OPS)
def test_the_table_gives_the_native_kernel_for_fp32_on_the_cpu_and_says_why_not_otherwise(
    op, fresh_choice, monkeypatch
):
    assert ops.choose(op, "cpu").name == "native"
    native = ops.OPS[op][0]
    for device, dtype, gradients, why in (
        ("cpu", torch.float32, True, "needs gradients"),
        ("cpu", torch.bfloat16, False, "torch.bfloat16"),
        ("cuda", torch.float32, False, "on cuda"),
    ):
        assert ops.choose(op, device, dtype, gradients).name == "torch"
        assert why in native.why_not(ops.Case(device, dtype, gradients))
    ops.choose.cache_clear()
    monkeypatch.setenv("SELFREWARD_BACKEND", "native")
    with pytest.raises(InputError, match=r"native: needs gradients.*torch: SELFREWARD_BACKEND=native"):
        ops.choose(op, "cpu", gradients=True)


def test_the_ops_run_the_kernels_and_the_torch_backend_agrees(fresh_choice):
    x, weight, gate_up = normal(3, 17), normal(17, seed=1).requires_grad_(), normal(3, 34)
    given = case(9, 4, 2, 16, 8, 3)
    native = next(backend for backend in ops.OPS["chunk_attention"] if backend.name == "native")
    with torch.no_grad():
        assert same(ops.rms_norm_rows(x, weight, 1e-5, threads=2), rms_norm(x, weight.detach()))
        assert torch.allclose(ops.rms_norm_rows(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), atol=1e-6)
    assert same(ops.swiglu_rows(gate_up), swiglu(gate_up))
    assert torch.allclose(ops.swiglu_rows(gate_up), swiglu_reference(gate_up), atol=1e-6)
    assert same(native.fn(*given, 3), attend(*given))
    pages = [torch.where(pages.isnan(), 0.0, pages) for pages in given[1:3]]
    expected = chunk_attention_reference(given[0], *pages, given[3].clamp(min=0), given[4])
    assert torch.allclose(native.fn(*given, 1), expected, atol=1e-5)
    assert ops.choose("chunk_attention", "cpu").name == "torch"  # until the sampler's whole step is native


def test_gradients_flow_where_they_are_asked_for_and_the_trainers_ops_never_turn_native(fresh_choice):
    x, weight = normal(3, 17).requires_grad_(), normal(17, seed=1).requires_grad_()
    ops.rms_norm_rows(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is not None
    ops.swiglu_rows(normal(3, 34).requires_grad_()).sum().backward()
    with torch.no_grad():  # reference log-probs: the same bits as the policy's forward
        quiet = ops.rms_norm(x, weight, 1e-5), ops.swiglu(torch.cat([x, x], dim=1))
    assert torch.equal(quiet[0], ops.rms_norm(x, weight, 1e-5))
    assert torch.equal(quiet[1], ops.swiglu(torch.cat([x, x], dim=1)))
    assert ops.backends()["rms_norm"] == ops.backends()["swiglu"] == "torch"
