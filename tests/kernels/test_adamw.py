"""AdamW of bf16 parameters: the backends agree bit for bit, parts are the whole, the rounded write is right on average."""

import numpy as np
import pytest
import torch
from scipy import stats

from engine import _C, ops
from engine.kernels import adamw
from engine.kernels.adamw import AdamWStep, Place, adamw_bf16_reference, random_halves
from engine.native import view

KEY = 0x1234_5678_9ABC_DEF0
STEP = AdamWStep(beta1=0.9, beta2=0.95, eps=1e-8, decay=0.999, rate=3e-3, root=1.7, scale=0.3)


def state(count, seed=0):
    """weight, grad, mean, square; zeros and values far from one among them."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-9, 4, (4, count), generator=generator)
    weight, grad, mean, square = torch.randn(4, count, generator=generator) * size
    weight[::7], grad[::5], mean[::3], square[::4] = 0, 0, 0, 0
    return weight.bfloat16(), grad.bfloat16(), mean, square.abs()


def after(update, given, place, step=STEP):
    given = [x.clone() for x in given]
    update(*given, step, place)
    return given


def native(level="", threads=1):
    def update(weight, grad, mean, square, step, place):
        flat = [view(x) for x in (weight, grad, mean, square)]
        rest = {"beta1": step.beta1, "rest1": 1 - step.beta1, "beta2": step.beta2, "rest2": 1 - step.beta2}
        rest |= {name: getattr(step, name) for name in ("eps", "decay", "rate", "root", "scale")}
        place = place._replace(key=place.key & (2**64 - 1))
        _C.adamw_bf16(*flat, **place._asdict(), **rest, threads=threads, level=level)

    return update


def same(found, expected):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected))


@pytest.mark.parametrize("level", _C.instruction_levels())
@pytest.mark.parametrize("first", [0, 1, 8, 127, 128, 2**35 + 5])
def test_native_equals_the_reference_bit_for_bit(level, first):
    for count in (0, 1, 15, 16, 17, 127, 129, 1000):
        place = Place(KEY, 3, first)
        expected = after(adamw_bf16_reference, state(count), place)
        assert same(after(native(level), state(count), place), expected)
    _C.share_little(True)
    try:
        assert same(after(native(level, threads=3), state(1000), place), expected)
    finally:
        _C.share_little(False)


def test_who_holds_a_part_gets_the_bits_of_the_whole():
    whole = after(adamw_bf16_reference, state(1000), Place(KEY, 1))
    for update in (adamw_bf16_reference, native()):
        for cut in (1, 8, 333, 999):
            given = [x.clone() for x in state(1000)]
            update(*(x[:cut] for x in given), STEP, Place(KEY, 1))
            update(*(x[cut:] for x in given), STEP, Place(KEY, 1, cut))
            assert same(given, whole)


def test_the_reference_is_the_same_in_pieces(monkeypatch):
    whole = after(adamw_bf16_reference, state(1000), Place(KEY, 1, 3))
    monkeypatch.setattr(adamw, "PIECE", 64)
    assert same(after(adamw_bf16_reference, state(1000), Place(KEY, 1, 3)), whole)


def odd_state():
    """`state` with NaNs, of both signs and with all bits set, and infinities, each in all four and alone."""
    given = state(40 * 16)
    for number, bits in enumerate((0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x00800000)):
        value = torch.tensor([bits], dtype=torch.int32)
        for which, x in enumerate(given):
            at = 16 * (4 * number + which) + torch.arange(16)
            if x.dtype == torch.float32:
                x.view(torch.int32)[at] = value
            else:
                x.view(torch.int16)[at] = (value >> 16).short()
    return given


@pytest.mark.parametrize("update", [adamw_bf16_reference, *map(native, _C.instruction_levels())])
def test_what_is_not_finite_stays_so(update):
    """A NaN is not turned into -0.0 by the random bits that it would overflow with."""
    before = odd_state()
    weight, grad, mean, square = (x.double() for x in before)
    g = grad * STEP.scale
    mean = mean * STEP.beta1 + g * (1 - STEP.beta1)
    square = square * STEP.beta2 + g * g * (1 - STEP.beta2)
    wide = weight * STEP.decay - mean * STEP.rate / (square.sqrt() * STEP.root + STEP.eps)
    found = after(update, before, Place(KEY, 0))[0]
    assert wide.isnan().sum() > 12 * 16 and wide.isinf().any()
    assert torch.equal(found.isnan(), wide.isnan())
    assert torch.equal(found[wide.isinf()].double(), wide[wide.isinf()])


def test_an_element_has_a_half_word_of_its_own():
    place = Place(5, 7, 8 * (3 * 2**32 + 11))
    words = _C.philox(5, 3, 7, 11, 0)
    assert random_halves(place, 8).tolist() == [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert random_halves(place._replace(first=place.first + 3), 5).tolist() == random_halves(place, 8).tolist()[3:]


@pytest.mark.parametrize("change", [{"key": 6}, {"key": 5 + 2**32}, {"number": 1}, {"first": 8}, {"first": 2**36}])
def test_every_part_of_the_place_changes_the_draws(change):
    base = Place(5, 0, 0)
    one, other = random_halves(base, 4096), random_halves(base._replace(**change), 4096)
    assert (one == other).float().mean() < 0.01
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / 4096**0.5


def test_halves_are_uniform():
    counts = np.bincount(random_halves(Place(KEY, 0), 1 << 18).numpy() >> 8, minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_update_far_below_half_a_spacing_comes_true_as_often_as_it_should(sign):
    """At 0.02 a spacing is 1.2e-4: of 10^6 weights that move by 1e-6 each, one in 122 moves, by 122 times as much."""
    count, lr = 1 << 20, 1e-6
    weight = torch.full((count,), 0.02 * sign).bfloat16()
    before, zero = weight.double(), torch.zeros(count)
    grad = torch.full((count,), -sign).bfloat16()
    step = AdamWStep(0.9, 0.95, 0.0, 1.0, lr / (1 - 0.9), 1 / (1 - 0.95) ** 0.5, 1.0)  # step 1: mean / sqrt(square) = 1
    ops.adamw_bf16(weight, grad, zero.clone(), zero.clone(), step, Place(KEY, 0))
    moved = sign * (weight.double() - before)
    spacing = 2.0**-13
    assert set(moved.unique().tolist()) == {0.0, spacing}
    share, expected = float((moved > 0).double().mean()), lr / spacing
    assert abs(share - expected) <= 4 * (expected / count) ** 0.5
    assert not torch.equal((before + sign * lr).bfloat16().double(), before + sign * lr)
    assert torch.equal((before + sign * lr).bfloat16().double(), before)  # to the nearest: nothing would ever move


def test_moments_and_weights_are_those_of_torchs_adamw():
    weight, grad, _, _ = (x[:512] for x in state(512))
    weight, grad = (weight.float().clamp(-2, 2)).bfloat16(), grad.float().clamp(-2, 2).bfloat16()
    theirs = torch.nn.Parameter(weight.double())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    mean, square = torch.zeros(512), torch.zeros(512)
    for number in range(1, 4):
        theirs.data.copy_(weight.double())
        theirs.grad = grad.double() * number
        optimizer.step()
        step = AdamWStep(
            0.9, 0.95, 1e-8, 1 - 1e-2 * 0.1, 1e-2 / (1 - 0.9**number), 1 / (1 - 0.95**number) ** 0.5, float(number)
        )
        ops.adamw_bf16(weight, grad, mean, square, step, Place(KEY, 0))
        expected = theirs.detach()
        spacing = 2.0 ** (torch.floor(torch.log2(expected.abs().clamp_min(1e-30))) - 7)
        assert ((weight.double() - expected).abs() <= 1.01 * spacing + 1e-12).all()
        found = optimizer.state[theirs]
        torch.testing.assert_close(mean.double(), found["exp_avg"], rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(square.double(), found["exp_avg_sq"], rtol=1e-5, atol=1e-12)


def test_ops_takes_the_native_update_on_the_cpu():
    assert ops.backends("cpu")["adamw_bf16"] == "native"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": np.zeros(4, np.float32)}, "weight has dtype float32; expected uint16"),
        ({"grad": np.zeros(5, np.uint16)}, r"grad has shape \[5\]; expected \[4\]"),
        ({"mean": np.zeros(4)}, "mean has dtype float64; expected float32"),
        ({"square": np.zeros((2, 2), np.float32)}, r"square has shape \[2, 2\]; expected \[4\]"),
        ({"square": "mean"}, "square shares memory with mean"),
        ({"threads": 0}, "threads is 0"),
        ({"level": "best"}, "level is 'best'"),
    ],
)
def test_the_native_update_names_a_wrong_argument(change, said):
    given = {name: np.zeros(4, np.uint16) for name in ("weight", "grad")}
    given |= {name: np.zeros(4, np.float32) for name in ("mean", "square")}
    given |= dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps", "decay", "rate", "root", "scale"), 0.5)
    given |= {"key": 0, "number": 0, "first": 0, "threads": 1} | change
    if isinstance(given["square"], str):
        given["square"] = given[given["square"]]
    with pytest.raises(ValueError, match=said):
        _C.adamw_bf16(**given)
