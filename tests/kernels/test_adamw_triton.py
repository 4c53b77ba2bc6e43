"""AdamW of bf16 parameters in Triton: the reference's bits, for whole parameters and parts of them.

On a GPU as compiled, elsewhere in Triton's interpreter: the kernel handles bf16 as the bits it is made of.
"""

import pytest
import torch

from engine.kernels.adamw import AdamWStep, Place, adamw_bf16, adamw_bf16_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = AdamWStep(beta1=0.9, beta2=0.95, eps=1e-8, decay=0.999, rate=3e-3, root=1.7, scale=0.3)

pytestmark = pytest.mark.gpu_too


def state(count):
    generator = torch.Generator().manual_seed(0)
    size = 10.0 ** torch.randint(-9, 4, (4, count), generator=generator)
    weight, grad, mean, square = torch.randn(4, count, generator=generator) * size
    weight[::7], grad[::5], mean[::3], square[::4] = 0, 0, 0, 0
    return [x.to(DEVICE) for x in (weight.bfloat16(), grad.bfloat16(), mean, square.abs())]


@pytest.mark.parametrize("first", [0, 5, 2**35 + 5])
@pytest.mark.parametrize("count", [0, 1, 1019, 2500])
def test_the_bits_are_the_references(first, count):
    check(count, Place(-0x1234_5678_9ABC_DEF0, 2, first))


def test_arguments_that_are_1_which_triton_takes_as_constants():
    check(2500, Place(1, 1, 1))


def check(count, place):
    found, expected = state(count), state(count)
    adamw_bf16(*found, STEP, place)
    adamw_bf16_reference(*expected, STEP, place)
    for a, b in zip(found, expected):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_what_is_not_finite_stays_so():
    """A NaN is not turned into -0.0 by the random bits that it would overflow with; which one it is, the device decides."""
    found, expected = state(64), state(64)
    for given in (found, expected):
        for number, bits in enumerate((0x7FFFFFFF, -1, 0x7F800000, -0x00800000)):
            given[2].view(torch.int32)[16 * number : 16 * number + 8] = bits
            given[1].view(torch.int16)[16 * number + 8 : 16 * number + 16] = bits >> 16
    adamw_bf16(*found, STEP, Place(1, 1))
    adamw_bf16_reference(*expected, STEP, Place(1, 1))
    assert found[0][:32].isnan().all() and found[0][32:40].isinf().all()
    for a, b in zip(found, expected):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
