"""The sampler's linear: the contract's bits at every level, a row independent of its batch, nothing written outside."""

import os
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import _C, ops
from engine.kernels import linear as kernel

LEVELS = [
    pytest.param(
        level, marks=pytest.mark.skipif(level not in _C.instruction_levels(), reason=f"this CPU does not run {level}")
    )
    for level in ("avx512", "avx2", "portable")
]
ROWS = [1, 2, 5, 6, 7, 64, 129]


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def pack(weight):
    packed = np.full((-(-len(weight) // 64), weight.shape[1], 64), np.nan, np.float32)
    _C.linear_pack(weight, packed)
    return packed


def native(x, weight, threads=1, level=""):
    out = np.full((len(x), len(weight)), np.nan, np.float32)
    _C.linear(x, pack(weight), out, threads, level)
    return out


def reference(x, weight):
    return kernel.linear_reference(torch.from_numpy(x), torch.from_numpy(weight)).numpy()


def assert_same_bits(a, b):
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def nearest_float(exact):
    """The fp32 number nearest to a fraction, ties to even; float(Fraction) rounds once, to float64."""
    guess = np.float32(float(exact))
    candidates = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.uint32)) & 1))


def test_the_references_fma_rounds_the_exact_sum_once():
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-(2**24), 2**24, 3000).astype(np.float32) for _ in range(3))
    c *= np.exp2(random.integers(-50, 70, 3000)).astype(np.float32)
    # By hand: a hair below the middle of two numbers (float64 holds only the middle), far apart, subnormal, cancelling.
    a[:4] = 2.0**-24 * (1 + 2.0**-23), 2.0**-40, 2.0**-75, 1 + 2.0**-12
    b[:4] = 1 - 2.0**-23, 2.0**-40, 2.0**-75, 1 - 2.0**-12
    c[:4] = 1 + 2.0**-23, 1 + 2.0**-23, 2.0**-149, -1.0
    ours = kernel.fma(*map(torch.from_numpy, (a, b, c))).numpy()
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c)]
    np.testing.assert_array_equal(ours, np.array([nearest_float(e) for e in exact], np.float32))
    twice = (a[0].astype(np.float64) * b[0] + c[0]).astype(np.float32)
    assert twice != ours[0]  # or the case by hand tests nothing


def test_packed_weights_are_panels_of_64_outputs():
    weight = normal(130, 37)
    padded = np.full((192, 37), np.nan, np.float32)  # as `pack` has made them: nothing else is written
    padded[:130] = weight
    np.testing.assert_array_equal(pack(weight), padded.reshape(3, 64, 37).transpose(0, 2, 1))


@pytest.mark.parametrize("first", [1, 63, 64, 65, 100])
def test_a_part_is_packed_and_read_at_any_place_and_touches_nothing_else(first):
    whole, part = normal(300, 37), normal(70, 37, seed=1)
    packed = pack(whole)
    _C.linear_pack(part, packed, first)
    np.testing.assert_array_equal(packed, pack(np.concatenate([whole[:first], part, whole[first + 70 :]])))
    read = np.full_like(part, np.nan)
    _C.linear_unpack(packed, read, first)
    np.testing.assert_array_equal(read, part)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("depth, outputs", [(1, 1), (255, 63), (256, 64), (257, 65), (700, 130), (1, 130), (700, 1)])
def test_every_level_has_the_references_bits(depth, outputs, rows, level):
    x, weight = normal(rows, depth), normal(outputs, depth, seed=1)
    assert_same_bits(native(x, weight, level=level), reference(x, weight))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_has_the_references_bits_for_zeros_infinities_and_numbers_near_the_ends_of_the_range(level):
    x = (normal(7, 300) * np.exp2(normal(7, 300, seed=2) * 20)).astype(np.float32)
    weight = (normal(65, 300, seed=1) * np.exp2(normal(65, 300, seed=3) * 20)).astype(np.float32)
    x[0] *= np.float32(2.0**-100)  # products underflow
    x[1] = np.where(x[1] > 0, 1e38, -1e38)  # sums overflow to infinity, and to NaN from there
    x[2, ::3] = -0.0
    weight[5], weight[6] = 0.0, -0.0
    x[4, 9] = np.inf
    ours, theirs = native(x, weight, level=level), reference(x, weight)
    assert np.isnan(theirs).any() and np.isinf(theirs).any()
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))  # a NaN's own bits are the CPU's affair
    assert_same_bits(np.where(np.isnan(ours), 0, ours), np.where(np.isnan(theirs), 0, theirs))


@pytest.mark.parametrize("level", LEVELS)
def test_the_first_block_sum_is_not_added_to_zero(level):
    x, weight = np.zeros((1, 512), np.float32), np.full((1, 512), 0.25, np.float32)
    x[0, [255, 511]] = -1e-45  # either block's sum rounds to -0; a sum from zero would be +0
    ours = native(x, weight, level=level)
    assert ours == 0 and np.signbit(ours)
    assert_same_bits(ours, reference(x, weight))


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_has_the_same_bits_in_any_batch_at_any_place_with_any_threads(level):
    row, others, weight = normal(1, 700), normal(300, 700, seed=1), normal(1000, 700, seed=2)
    alone = native(row, weight, level=level)
    sizes = (1, 2, 3, 4, 5, 6, 7, 8, 13, 64) if level == "portable" else (*range(1, 40), 64, 129, 251, 252, 253, 300)
    for rows in sizes:
        for place, threads in ((0, 1), (rows // 2, 2), (rows - 1, 3)):
            x = others[:rows].copy()
            x[place] = row
            assert_same_bits(native(x, weight, threads, level)[place], alone[0])


def test_torchs_product_does_not_have_this_property_here():
    row, others, weight = normal(1, 768), normal(64, 768, seed=1), torch.from_numpy(normal(2304, 768, seed=2))
    alone = F.linear(torch.from_numpy(row), weight)
    for rows in range(2, 65):
        x = others[:rows].copy()
        x[-1] = row
        if not torch.equal(F.linear(torch.from_numpy(x), weight)[-1], alone[0]):
            return
    pytest.skip("torch's product gives a row the same bits for 1 to 64 rows on this machine")


@pytest.mark.parametrize("depth", [64, 768, 2048])
def test_the_error_is_at_most_twice_that_of_torch(depth):
    x, weight = normal(64, depth), normal(200, depth, seed=1)
    truth = x.astype(np.float64) @ weight.astype(np.float64).T
    theirs = F.linear(torch.from_numpy(x), torch.from_numpy(weight)).numpy()

    def rms(y):
        return float(np.sqrt(np.mean((y - truth) ** 2)))

    assert rms(native(x, weight)) <= 2 * rms(theirs) + 1e-7


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_row_leaves_the_others_alone(poison, level):
    x, weight = normal(13, 300), normal(70, 300, seed=1)
    clean = native(x, weight, level=level)
    x[4, 7] = poison
    poisoned = native(x, weight, level=level)
    assert not np.isfinite(poisoned[4]).any()
    others = np.arange(13) != 4
    assert_same_bits(poisoned[others], clean[others])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows, outputs", [(1, 1), (1, 65), (7, 130), (253, 63)])
def test_nothing_is_read_or_written_outside(rows, outputs, level):
    depth, guard = 257, 512  # the block behind the last panel is only fetched, never used
    x, weight = normal(rows, depth), normal(outputs, depth, seed=1)
    packed = pack(weight)

    def fenced(array):
        memory = np.full(array.size + 2 * guard, np.nan, np.float32)
        memory[guard : guard + array.size] = array.ravel()
        return memory, memory[guard : guard + array.size].reshape(array.shape)

    (_, fenced_x), (_, fenced_packed) = fenced(x), fenced(packed)
    memory, out = fenced(np.full((rows, outputs), np.nan, np.float32))
    _C.linear(fenced_x, fenced_packed, out, 3, level)
    assert_same_bits(out, native(x, weight, level=level))
    assert np.isfinite(out).all() and np.isnan(memory[:guard]).all() and np.isnan(memory[-guard:]).all()


def test_no_rows_and_no_outputs_give_empty_results():
    assert native(normal(0, 5), normal(3, 5)).shape == (0, 3)
    assert native(normal(3, 5), normal(0, 5)).shape == (3, 0)


def test_calls_from_several_threads_at_once_give_the_same_bits():
    x, weight = normal(40, 512), normal(1500, 512, seed=1)
    expected, results = native(x, weight), [None] * 4

    def work(i):
        results[i] = [native(x, weight, threads=2) for _ in range(10)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for mine in results:
        for result in mine:
            assert_same_bits(result, expected)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="only Linux shows a process's threads")
def test_a_forked_child_has_threads_of_its_own():
    x, weight = normal(8, 512), normal(4096, 512, seed=1)
    expected = native(x, weight, threads=3)
    child = os.fork()
    if child == 0:
        same = np.array_equal(native(x, weight, threads=3), expected)
        os._exit(0 if same and len(os.listdir("/proc/self/task")) == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def arguments(**changes):
    zeros = {"x": (3, 5), "packed": (2, 5, 64), "out": (3, 70)}
    return {name: np.zeros(shape, np.float32) for name, shape in zeros.items()} | {"threads": 1, "level": ""} | changes


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("x", np.zeros((3, 5)), "x has dtype float64; expected float32"),
        ("x", np.zeros(5, np.float32), r"x has shape \[5\]; expected \[-1, -1\]"),
        ("x", np.zeros((5, 3), np.float32).T, "x has strides .* expected a C-contiguous array"),
        ("x", np.zeros((3, 0), np.float32), r"x has shape \[3, 0\]; expected at least one column"),
        ("x", np.zeros((3, 6), np.float32), r"packed has shape \[2, 5, 64\]; expected \[2, 6, 64\]"),
        ("packed", np.zeros((1, 5, 64), np.float32), r"packed has shape \[1, 5, 64\]; expected \[2, 5, 64\]"),
        ("packed", np.zeros((2, 5, 64), np.int32), "packed has dtype int32; expected float32"),
        ("out", np.zeros((2, 70), np.float32), r"out has shape \[2, 70\]; expected \[3, -1\]"),
        ("out", np.zeros((70, 3), np.float32).T, "out has strides"),
        ("threads", 0, "threads is 0; expected at least 1"),
        ("level", "sse9", "level is 'sse9'; this CPU runs .*portable"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_found_and_expected(name, value, message):
    _C.linear(**arguments())
    with pytest.raises(ValueError, match=message):
        _C.linear(**arguments(**{name: value}))


def test_an_output_that_overlaps_an_input_is_refused():
    memory = np.zeros(1000, np.float32)
    out = memory[700:910].reshape(3, 70)
    _C.linear(**arguments(x=memory[685:700].reshape(3, 5), out=out))
    with pytest.raises(ValueError, match="out shares memory with x"):
        _C.linear(**arguments(x=memory[686:701].reshape(3, 5), out=out))
    with pytest.raises(ValueError, match="out shares memory with packed"):
        _C.linear(**arguments(packed=memory[61:701].reshape(2, 5, 64), out=out))
    with pytest.raises(ValueError, match="packed shares memory with weight"):
        _C.linear_pack(memory[:320].reshape(64, 5), memory[319:639].reshape(1, 5, 64))


def test_a_read_only_output_is_refused():
    out = np.zeros((3, 70), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        _C.linear(**arguments(out=out))


def test_packing_names_a_wrong_argument():
    weight, packed = np.zeros((65, 5), np.float32), np.zeros((2, 5, 64), np.float32)
    _C.linear_pack(weight, packed)
    with pytest.raises(ValueError, match=r"packed has shape \[1, 5, 64\]; expected \[2, 5, 64\]"):
        _C.linear_pack(weight, packed[:1])
    for run, given in ((_C.linear_pack, (weight, packed)), (_C.linear_unpack, (packed, weight))):
        with pytest.raises(
            ValueError, match=r"packed has shape \[2, 5, 64\]; expected \[3, 5, 64\] or more .* 64 to 129"
        ):
            run(*given, 64)
        with pytest.raises(ValueError, match="first is -1; expected 0 or more"):
            run(*given, -1)
    with pytest.raises(ValueError, match="weight has dtype float64; expected float32"):
        _C.linear_pack(weight.astype(np.float64), packed)
    packed.flags.writeable = False
    with pytest.raises(ValueError, match="packed is read-only"):
        _C.linear_pack(weight, packed)


def test_flops_and_bytes_count_padded_panels_once():
    assert kernel.flops(3, 65, 10) == 3900
    assert kernel.bytes(3, 65, 10) == 4 * (128 * 10 + 3 * 10 + 3 * 65)


def test_the_table_takes_the_native_linear_on_the_cpu():
    assert ops.choose("linear", "cpu").name == "native"
    reason = ops.OPS["linear"][0].why_not(ops.Case("cuda", torch.float32, False))
    assert reason is not None and "cuda" in reason


def test_work_that_is_shared_out_to_threads_has_the_bits_of_one_thread():
    """Small products stay on one thread whatever is asked for, so this one is large."""
    x, weight = normal(200, 768), normal(2304, 768, seed=1)
    packed = pack(weight)
    one, *others = (np.full((200, 2304), np.nan, np.float32) for _ in range(3))
    _C.linear(x, packed, one, 1)
    for threads, out in enumerate(others, start=2):
        _C.linear(x, packed, out, threads)
        assert np.array_equal(out, one)
