"""The linear with bf16 weights: the bits of the dot instruction at every level, a row independent of its batch."""

import numpy as np
import pytest
import torch

from engine import _C
from engine.kernels import linear_bf16 as kernel

LEVELS = [
    pytest.param(
        level, marks=pytest.mark.skipif(level not in _C.linear_bf16_levels(), reason=f"this CPU does not run {level}")
    )
    for level in ("avx512bf16", "avx512", "avx2", "portable")
]
SHAPES = [(1, 1), (7, 127), (127, 7), (129, 65), (255, 63), (256, 64), (513, 130)]  # depth, outputs


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def bf16(array):
    return torch.from_numpy(array).bfloat16()


def bits(weight):
    return weight.view(torch.uint16).numpy()


def pack(weight, first=0, panels=None):
    outputs, depth = weight.shape
    shape = (-(-(first + outputs) // 64) if panels is None else panels, -(-depth // 2), 64, 2)
    packed = np.full(shape, 0x7FC0, np.uint16)
    _C.linear_pack_bf16(bits(weight), packed, first)
    return packed


def native(x, weight, threads=1, level=""):
    out = np.full((len(x), len(weight)), np.nan, np.float32)
    _C.linear_bf16(x, pack(weight), out, threads, level)
    return out


def reference(x, weight):
    return kernel.linear_bf16_reference(torch.from_numpy(x), weight).numpy()


def assert_same_bits(a, b):
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def assert_same_bits_but_for_nan(a, b):
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    assert_same_bits(np.where(np.isnan(a), 0, a), np.where(np.isnan(b), 0, b))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 64])
@pytest.mark.parametrize("depth, outputs", SHAPES)
def test_every_level_has_the_references_bits(depth, outputs, rows, level):
    x, weight = normal(rows, depth), bf16(normal(outputs, depth, seed=1))
    assert_same_bits(native(x, weight, level=level), reference(x, weight))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("depth, outputs", [(4095, 3), (3, 4095)])
def test_long_rows_and_many_outputs_have_the_references_bits(depth, outputs, level):
    x, weight = normal(7, depth), bf16(normal(outputs, depth, seed=1))
    assert_same_bits(native(x, weight, threads=2, level=level), reference(x, weight))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_has_the_references_bits_near_the_ends_of_the_range(level):
    x = (normal(8, 301) * np.exp2(normal(8, 301, seed=2) * 20)).astype(np.float32)
    weight = (normal(65, 301, seed=1) * np.exp2(normal(65, 301, seed=3) * 20)).astype(np.float32)
    x[0] *= np.float32(2.0**-110)  # products and sums fall below 2^-126
    x[1] = np.where(x[1] > 0, 1e38, -1e38)  # sums overflow to infinity, and to NaN from there
    x[2, ::3] = -0.0
    x[3] = 1e-40  # itself below 2^-126
    x[4, 9] = np.inf
    x[5] = np.nextafter(np.float32(2.0**-126), np.float32(0))  # rounds up to a number that counts
    x[6, 3] = 3.4e38  # rounds to infinity
    weight[5], weight[6], weight[7] = 0.0, -0.0, 1e-39
    ours, theirs = native(x, bf16(weight), level=level), reference(x, bf16(weight))
    assert np.isnan(theirs).any() and np.isinf(theirs).any() and (theirs[0] == 0).any() and (theirs[0] != 0).any()
    assert_same_bits_but_for_nan(ours, theirs)


@pytest.mark.parametrize("level", LEVELS)
def test_numbers_below_the_normal_ones_count_as_zero_and_the_threads_mode_is_left_as_it_was(level):
    tiny = np.float32(2.0**-127)
    x, weight = np.full((1, 2), tiny, np.float32), bf16(np.full((1, 2), 2.0**20, np.float32))
    assert native(x, weight, level=level) == 0
    half = np.array(tiny * np.float32(0.5))  # numpy's arithmetic in this thread still has them
    assert half.view(np.uint32) == 1 << 21  # bits: in the other mode the number compares equal to zero


@pytest.mark.parametrize("level", LEVELS)
def test_x_is_rounded_to_the_nearest_bf16_ties_to_even(level):
    x = np.array([[1 + 2.0**-8], [1 + 3 * 2.0**-8], [1 + 2.0**-8 + 2.0**-20], [np.pi], [-np.pi]], np.float32)
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    assert_same_bits(native(x, bf16(np.ones((1, 1), np.float32)), level=level), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_has_the_same_bits_in_any_batch_at_any_place_with_any_threads(level):
    row, others, weight = normal(1, 701), normal(300, 701, seed=1), bf16(normal(500, 701, seed=2))
    alone = native(row, weight, level=level)
    sizes = (1, 2, 3, 4, 5, 6, 7, 13) if level == "portable" else (*range(1, 20), 64, 251, 252, 253, 300)
    for rows in sizes:
        for place, threads in ((0, 1), (rows // 2, 2), (rows - 1, 3)):
            x = others[:rows].copy()
            x[place] = row
            assert_same_bits(native(x, weight, threads, level)[place], alone[0])


def test_more_rows_than_a_section_of_scratch_memory_have_the_same_bits():
    x, weight = normal(2100, 70), bf16(normal(65, 70, seed=1))
    ours = native(x, weight, threads=2)
    for rows in (slice(0, 5), slice(1005, 1012), slice(2090, 2100)):
        assert_same_bits(ours[rows], native(x[rows], weight))


@pytest.mark.parametrize("depth", [64, 768, 2048])
def test_the_error_is_at_most_twice_that_of_torch(depth):
    """Both against float64 from the same bf16 inputs; torch sums bf16 products in fp32 and rounds to bf16 at the end."""
    x, weight = normal(64, depth), bf16(normal(200, depth, seed=1))
    truth = bf16(x).double() @ weight.double().T
    eager = torch.nn.functional.linear(bf16(x).float(), weight.float())

    def rms(y):
        return float((y.double() - truth).pow(2).mean().sqrt())

    assert rms(torch.from_numpy(native(x, weight))) <= 2 * rms(eager) + 1e-7


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, np.float32(np.uint32(0x7FFFFFFF).view(np.float32))])
def test_a_poisoned_row_leaves_the_others_alone(poison, level):
    x, weight = normal(13, 301), bf16(normal(70, 301, seed=1))
    clean = native(x, weight, level=level)
    x[4, 300] = poison
    poisoned = native(x, weight, level=level)
    assert not np.isfinite(poisoned[4]).any()
    others = np.arange(13) != 4
    assert_same_bits(poisoned[others], clean[others])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows, outputs", [(1, 1), (1, 65), (7, 130), (253, 63)])
def test_nothing_is_read_or_written_outside(rows, outputs, level):
    guard = 512

    def fenced(array, poison):
        memory = np.full(array.size + 2 * guard, poison, array.dtype)
        memory[guard : guard + array.size] = array.ravel()
        return memory, memory[guard : guard + array.size].reshape(array.shape)

    x, weight = normal(rows, 257), bf16(normal(outputs, 257, seed=1))
    (_, fenced_x), (_, packed) = fenced(x, np.nan), fenced(pack(weight), 0x7FC0)
    memory, out = fenced(np.full((rows, outputs), np.nan, np.float32), np.nan)
    _C.linear_bf16(fenced_x, packed, out, 3, level)
    assert_same_bits(out, native(x, weight, level=level))
    assert np.isfinite(out).all() and np.isnan(memory[:guard]).all() and np.isnan(memory[-guard:]).all()


def test_packed_weights_are_pairs_in_panels_an_odd_depth_padded_with_zeros():
    weight = bf16(normal(130, 37))
    padded = np.full((192, 38), 0x7FC0, np.uint16)  # as `pack` has made them: nothing else is written
    padded[:130, :37], padded[:130, 37] = bits(weight), 0
    np.testing.assert_array_equal(pack(weight), padded.reshape(3, 64, 19, 2).transpose(0, 2, 1, 3))


@pytest.mark.parametrize("depth", [1, 36, 37])
@pytest.mark.parametrize("first", [1, 63, 64, 65, 100])
def test_a_part_is_packed_and_read_at_any_place_and_touches_nothing_else(first, depth):
    whole, part = bf16(normal(300, depth)), bf16(normal(70, depth, seed=1))
    packed = pack(whole)
    _C.linear_pack_bf16(bits(part), packed, first)
    expected = torch.cat([whole[:first], part, whole[first + 70 :]])
    np.testing.assert_array_equal(packed, pack(expected))
    read = np.zeros((70, depth), np.uint16)
    _C.linear_unpack_bf16(packed, read, first)
    np.testing.assert_array_equal(read, bits(part))


def test_no_rows_and_no_outputs_give_empty_results():
    assert native(normal(0, 5), bf16(normal(3, 5))).shape == (0, 3)
    assert native(normal(3, 5), bf16(normal(0, 5))).shape == (3, 0)


def arguments(**changes):
    arrays = {"x": np.zeros((3, 5), np.float32), "packed": np.zeros((2, 3, 64, 2), np.uint16)}
    return arrays | {"out": np.zeros((3, 70), np.float32), "threads": 1, "level": ""} | changes


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("x", np.zeros((3, 5)), "x has dtype float64; expected float32"),
        ("x", np.zeros((3, 0), np.float32), r"x has shape \[3, 0\]; expected at least one column"),
        ("x", np.zeros((3, 7), np.float32), r"packed has shape \[2, 3, 64, 2\]; expected \[2, 4, 64, 2\]"),
        ("packed", np.zeros((1, 3, 64, 2), np.uint16), r"packed has shape \[1, 3, 64, 2\]; expected \[2, 3, 64, 2\]"),
        ("packed", np.zeros((2, 3, 64), np.float32), "packed has dtype float32; expected uint16"),
        ("out", np.zeros((2, 70), np.float32), r"out has shape \[2, 70\]; expected \[3, -1\]"),
        ("threads", 0, "threads is 0; expected at least 1"),
        ("level", "avx9", "level is 'avx9'; this CPU runs .*portable"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_found_and_expected(name, value, message):
    _C.linear_bf16(**arguments())
    with pytest.raises(ValueError, match=message):
        _C.linear_bf16(**arguments(**{name: value}))


def test_packing_and_reading_name_a_wrong_argument():
    weight, packed = np.zeros((65, 5), np.uint16), np.zeros((2, 3, 64, 2), np.uint16)
    for run, given in ((_C.linear_pack_bf16, (weight, packed)), (_C.linear_unpack_bf16, (packed, weight))):
        run(*given, 63)
        with pytest.raises(ValueError, match=r"packed has shape .*2, 3, 64, 2.*expected \[3, 3, 64, 2\] or more"):
            run(*given, 64)
        with pytest.raises(ValueError, match="first is -1; expected 0 or more"):
            run(*given, -1)
    with pytest.raises(ValueError, match="weight has dtype float32; expected uint16"):
        _C.linear_pack_bf16(weight.astype(np.float32), packed)
    with pytest.raises(ValueError, match="weight shares memory with packed"):
        _C.linear_unpack_bf16(packed, packed.reshape(-1)[:325].reshape(65, 5))


def test_bytes_count_padded_panels_once():
    assert kernel.bytes(3, 65, 9) == 2 * 128 * 10 + 4 * (3 * 9 + 3 * 65)
