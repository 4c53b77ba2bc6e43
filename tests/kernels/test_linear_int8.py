"""The linear with 8-bit weights: the reference's bits at every level, a row independent of its batch."""

import numpy as np
import pytest
import torch

from engine import _C
from engine.kernels import linear_int8 as kernel

LEVELS = [
    pytest.param(
        level, marks=pytest.mark.skipif(level not in _C.linear_int8_levels(), reason=f"this CPU does not run {level}")
    )
    for level in ("avx512vnni", "avxvnni", "avx2", "portable")
]
SHAPES = [(1, 1), (7, 127), (127, 7), (129, 65), (64, 64), (63, 63), (1100, 130)]  # depth, outputs


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def pack(weight, first=0):
    outputs, depth = weight.shape
    panels = -(-(first + outputs) // 64)
    packed = np.full((panels, 16 * -(-depth // 64), 64, 4), 77, np.uint8)
    scales = np.full(64 * panels, np.nan, np.float32)
    _C.linear_pack_int8(weight, packed, scales, first)
    return packed, scales


def native(x, weight, threads=1, level=""):
    out = np.full((len(x), len(weight)), np.nan, np.float32)
    _C.linear_int8(x, *pack(weight), out, threads, level)
    return out


def reference(x, weight):
    return kernel.linear_int8_reference(torch.from_numpy(x), torch.from_numpy(weight)).numpy()


def assert_same_bits(a, b):
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def assert_same_bits_but_for_nan(a, b):
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    assert_same_bits(np.where(np.isnan(a), 0, a), np.where(np.isnan(b), 0, b))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 64])
@pytest.mark.parametrize("depth, outputs", SHAPES)
def test_every_level_has_the_references_bits(depth, outputs, rows, level):
    x, weight = normal(rows, depth), normal(outputs, depth, seed=1)
    assert_same_bits(native(x, weight, level=level), reference(x, weight))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("depth, outputs", [(4095, 3), (3, 4095)])
def test_long_rows_and_many_outputs_have_the_references_bits(depth, outputs, level):
    x, weight = normal(7, depth), normal(outputs, depth, seed=1)
    assert_same_bits(native(x, weight, threads=2, level=level), reference(x, weight))


@pytest.mark.parametrize("level", LEVELS)
def test_the_largest_products_do_not_saturate(level):
    """A pair of them is 2 * 255 * 127 with the offset: more than 16 bits hold."""
    x, weight = np.full((6, 256), 3.0, np.float32), np.full((70, 256), 0.5, np.float32)
    weight[1::3], weight[2::3, ::2] = -0.5, -0.5
    assert_same_bits(native(x, weight, level=level), reference(x, weight))
    x = -x
    assert_same_bits(native(x, weight, level=level), reference(x, weight))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_has_the_references_bits_with_outliers_zeros_and_numbers_that_are_not_finite(level):
    x, weight = normal(11, 300), normal(70, 300, seed=1)
    x[0] *= np.exp2(normal(1, 300, seed=2)[0] * 20)
    x[1, 70] = 1e6
    x[2], x[3, 64:128] = 0, 0
    x[4], x[5] = x[4] * np.float32(2.0**-99), x[5] * np.float32(2.0**-102)  # groups on both sides of the limit
    x[6], x[7, 3], x[8, 299], x[9, 0] = 1e38, np.nan, np.inf, -np.inf
    weight[3], weight[4], weight[5, 17], weight[6, 18], weight[7, 299] = 0, weight[4] * 1e-35, np.inf, np.nan, 1e4
    ours, theirs = native(x, weight, level=level), reference(x, weight)
    assert_same_bits_but_for_nan(ours, theirs)
    assert np.isnan(ours[7:10]).all() and np.isnan(ours[:, 5:7]).all()
    good = ours[[0, 1, 2, 3, 4, 5, 10]][:, np.r_[0:5, 7:70]]
    assert np.isfinite(good).all() and (good[2] == 0).all() and (good[:, 3:5] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_x_is_multiplied_by_the_inverse_of_its_scale_and_rounded_to_even(level):
    x = np.abs(normal(1000000, 2))
    x = np.sort(x, axis=1)
    largest = x[:, 1]
    other = np.rint(x[:, 0] / (largest / np.float32(127)))  # the same but for about one in a million
    x = x[other != np.rint(x[:, 0] * (np.float32(127) / largest))]
    x = np.concatenate([x, np.array([[0.5, 127], [1.5, 127], [-2.5, 127], [-3.5, 127]], np.float32)])
    assert len(x) > 4
    assert_same_bits(native(x, np.eye(2, dtype=np.float32), level=level), reference(x, np.eye(2, dtype=np.float32)))


@pytest.mark.parametrize("level", LEVELS)
def test_a_poisoned_row_leaves_the_others_alone(level):
    x, weight = normal(13, 300), normal(70, 300, seed=1)
    clean = native(x, weight, level=level)
    for poison in (np.nan, np.inf, -np.inf):
        x[4, 299] = poison
        poisoned = native(x, weight, level=level)
        assert np.isnan(poisoned[4]).all()
        others = np.arange(13) != 4
        assert_same_bits(poisoned[others], clean[others])


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_has_the_same_bits_in_any_batch_at_any_place_with_any_threads(level):
    row, others, weight = normal(1, 701), normal(300, 701, seed=1), normal(500, 701, seed=2)
    alone = native(row, weight, level=level)
    sizes = (1, 2, 3, 4, 5, 6, 7, 13) if level == "portable" else (*range(1, 20), 64, 251, 252, 253, 300)
    for rows in sizes:
        for place, threads in ((0, 1), (rows // 2, 2), (rows - 1, 3)):
            x = others[:rows].copy()
            x[place] = row
            assert_same_bits(native(x, weight, threads, level)[place], alone[0])


def test_more_rows_than_a_section_of_scratch_memory_have_the_same_bits():
    x, weight = normal(2100, 70), normal(65, 70, seed=1)
    ours = native(x, weight, threads=2)
    for rows in (slice(0, 5), slice(1005, 1012), slice(2090, 2100)):
        assert_same_bits(ours[rows], native(x[rows], weight))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("depth", [64, 768, 2048])
def test_the_error_is_that_of_8_bits_and_a_tenth_of_one_scale_for_a_row_with_outliers(depth, level):
    """Against float64 from the quantised inputs: the error of fp32 sums. Against the inputs themselves: 8 bits'."""
    x, weight = normal(32, depth), normal(200, depth, seed=1)
    x[:, 5] *= 1000
    ours = native(x, weight, level=level).astype(np.float64)
    whole, scales = (t.double().numpy() for t in kernel.quantize_weight(torch.from_numpy(weight)))
    groups = [kernel.quantize_group(torch.from_numpy(x[:, k : k + 64])) for k in range(0, depth, 64)]
    quantised = np.concatenate([(q.double() * s.double()[:, None]).numpy() for q, s in groups], axis=1)
    exact = quantised @ (whole * scales[:, None]).T
    truth = x.astype(np.float64) @ weight.astype(np.float64).T
    eager = (torch.from_numpy(quantised).float() @ torch.from_numpy(whole * scales[:, None]).float().T).double().numpy()

    def rms(error):
        return float(np.sqrt(np.mean(error**2)))

    assert rms(ours - exact) <= 2 * rms(eager - exact) + 1e-7 * rms(exact)
    step = np.abs(x).max(1, keepdims=True) / 127
    for_a_row = (x / step).round() * step @ (whole * scales[:, None]).T
    if depth == 2048:
        assert rms(ours - truth) <= 0.5 * rms(for_a_row - truth)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows, outputs", [(1, 1), (1, 65), (7, 130), (253, 63)])
def test_nothing_is_read_or_written_outside(rows, outputs, level):
    guard = 512

    def fenced(array, poison):
        memory = np.full(array.size + 2 * guard, poison, array.dtype)
        memory[guard : guard + array.size] = array.ravel()
        return memory, memory[guard : guard + array.size].reshape(array.shape)

    x, weight = normal(rows, 257), normal(outputs, 257, seed=1)
    packed, scales = pack(weight)
    (_, fenced_x), (_, packed), (_, scales) = fenced(x, np.nan), fenced(packed, 255), fenced(scales, np.nan)
    memory, out = fenced(np.full((rows, outputs), np.nan, np.float32), np.nan)
    _C.linear_int8(fenced_x, packed, scales, out, 3, level)
    assert_same_bits(out, native(x, weight, level=level))
    assert np.isfinite(out).all() and np.isnan(memory[:guard]).all() and np.isnan(memory[-guard:]).all()


def test_packed_weights_are_quantised_and_their_depth_padded_with_zeros_that_are_128():
    weight = normal(130, 70)
    whole, scales = kernel.quantize_weight(torch.from_numpy(weight))
    padded = np.full((192, 128), 77.0 - 128.0)  # as `pack` has made them: nothing else is written
    padded[:130] = 0.0
    padded[:130, :70] = whole.numpy()
    packed, found = pack(weight)
    np.testing.assert_array_equal(packed - 128.0, padded.reshape(3, 64, 32, 4).transpose(0, 2, 1, 3))
    np.testing.assert_array_equal(found, np.concatenate([scales.numpy(), np.full(62, np.nan, np.float32)]))


@pytest.mark.parametrize("depth", [1, 64, 65])
@pytest.mark.parametrize("first", [1, 63, 64, 65, 100])
def test_a_part_is_packed_at_any_place_and_touches_nothing_else(first, depth):
    whole, part = normal(300, depth), normal(70, depth, seed=1)
    packed, scales = pack(whole)
    _C.linear_pack_int8(part, packed, scales, first)
    for found, expected in zip((packed, scales), pack(np.concatenate([whole[:first], part, whole[first + 70 :]]))):
        np.testing.assert_array_equal(found, expected)


def test_no_rows_and_no_outputs_give_empty_results():
    assert native(normal(0, 5), normal(3, 5)).shape == (0, 3)
    assert native(normal(3, 5), normal(0, 5)).shape == (3, 0)


def arguments(**changes):
    arrays = {"x": np.zeros((3, 65), np.float32), "packed": np.zeros((2, 32, 64, 4), np.uint8)}
    arrays |= {"scales": np.zeros(128, np.float32), "out": np.zeros((3, 70), np.float32)}
    return arrays | {"threads": 1, "level": ""} | changes


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("x", np.zeros((3, 65)), "x has dtype float64; expected float32"),
        ("x", np.zeros((3, 0), np.float32), r"x has shape \[3, 0\]; expected at least one column"),
        ("x", np.zeros((3, 64), np.float32), r"packed has shape \[2, 32, 64, 4\]; expected \[2, 16, 64, 4\]"),
        ("packed", np.zeros((1, 32, 64, 4), np.uint8), r"packed has shape \[1, 32, 64, 4\]; expected \[2, 32, 64, 4\]"),
        ("packed", np.zeros((2, 32, 64, 4), np.int8), "packed has dtype int8; expected uint8"),
        ("scales", np.zeros(70, np.float32), r"scales has shape \[70\]; expected \[128\]"),
        ("out", np.zeros((2, 70), np.float32), r"out has shape \[2, 70\]; expected \[3, -1\]"),
        ("threads", 0, "threads is 0; expected at least 1"),
        ("level", "avx9", "level is 'avx9'; this CPU runs .*portable"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_found_and_expected(name, value, message):
    _C.linear_int8(**arguments())
    with pytest.raises(ValueError, match=message):
        _C.linear_int8(**arguments(**{name: value}))


def test_packing_names_a_wrong_argument():
    weight, packed, scales = (
        np.zeros((65, 5), np.float32),
        np.zeros((2, 16, 64, 4), np.uint8),
        np.zeros(128, np.float32),
    )
    _C.linear_pack_int8(weight, packed, scales, 63)
    with pytest.raises(ValueError, match=r"packed has shape \[2, 16, 64, 4\]; expected \[3, 16, 64, 4\] or more"):
        _C.linear_pack_int8(weight, packed, scales, 64)
    with pytest.raises(ValueError, match="first is -1; expected 0 or more"):
        _C.linear_pack_int8(weight, packed, scales, -1)
    with pytest.raises(ValueError, match=r"scales has shape \[127\]; expected \[128\]"):
        _C.linear_pack_int8(weight, packed, scales[:127])
    scales.flags.writeable = False
    with pytest.raises(ValueError, match="scales is read-only"):
        _C.linear_pack_int8(weight, packed, scales)


def test_bytes_count_padded_panels_and_groups_once():
    assert kernel.bytes(3, 65, 70) == 128 * (128 + 4) + 4 * (3 * 70 + 3 * 65)
