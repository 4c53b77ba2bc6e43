"""RMSNorm, RoPE and SwiGLU in Triton: values and gradients against float64, at shapes that fit no tile.

On a GPU as compiled, elsewhere in Triton's interpreter, which knows no bf16.
"""

import pytest
import torch

from engine.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from engine.kernels.rope import rope, rope_reference
from engine.kernels.swiglu import swiglu, swiglu_reference
from tests.kernels.yardstick import check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
EPS = 1e-5

pytestmark = pytest.mark.gpu_too


def random(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,dim", [(1, 1), (3, 11), (7, 100), (5, 128), (300, 17), (0, 8)])
def test_rms_norm_and_its_gradients(rows, dim, dtype):
    x, weight = random(rows, dim, dtype=dtype), random(dim, dtype=dtype, seed=1)
    check(lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_reference(x, w, EPS), [x, weight])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,dim", [(3, 11), (5, 128), (260, 9), (0, 8)])
def test_add_rms_norm_and_its_gradients_through_both_results(rows, dim, dtype):
    x, branch = random(rows, dim, dtype=dtype), random(rows, dim, dtype=dtype, seed=2)
    weight = random(dim, dtype=dtype, seed=1)
    check(
        lambda x, b, w: add_rms_norm(x, b, w, EPS),
        lambda x, b, w: add_rms_norm_reference(x, b, w, EPS),
        [x, branch, weight],
        outputs=2,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,heads,dim", [(1, 1, 2), (5, 3, 10), (4, 33, 128), (3, 8, 96), (0, 2, 4)])
def test_rope_and_its_gradient(rows, heads, dim, dtype):
    x = random(rows, heads, dim, dtype=dtype)
    angle = random(rows, dim // 2, dtype=torch.float32, seed=3)
    check(lambda x: rope(x, angle.cos(), angle.sin()), lambda x: rope_reference(x, angle.cos(), angle.sin()), [x])


def test_rope_of_rows_that_lie_apart():
    qkv = random(4, 9, 8, dtype=torch.float32)
    angle = random(4, 4, dtype=torch.float32)
    for part in qkv.split([5, 2, 2], dim=1):
        turned = rope(part, angle.cos(), angle.sin())
        assert torch.equal(turned, rope(part.contiguous(), angle.cos(), angle.sin()))
        torch.testing.assert_close(turned, rope_reference(part, angle.cos(), angle.sin()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,ffn", [(1, 1), (3, 11), (2, 1024), (2, 1500), (0, 8)])
def test_swiglu_and_its_gradient(rows, ffn, dtype):
    check(swiglu, swiglu_reference, [4 * random(rows, 2 * ffn, dtype=dtype)])


def test_swiglu_far_from_zero_is_finite():
    gate = torch.tensor([[-200.0, -90.0, 90.0, 200.0]], device=DEVICE)
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1).requires_grad_()
    out = swiglu(gate_up)
    out.sum().backward()
    torch.testing.assert_close(out, swiglu_reference(gate_up))
    assert gate_up.grad.isfinite().all()


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "rope", "swiglu"])
def test_gradcheck_in_float64(name):
    def wide(*shape, seed=0):
        return random(*shape, dtype=torch.float64, seed=seed).requires_grad_()

    angle = wide(3, 2).detach()
    fn, inputs = {
        "rms_norm": (lambda x, w: rms_norm(x, w, EPS), [wide(3, 5), wide(5, seed=1)]),
        "add_rms_norm": (lambda x, b, w: add_rms_norm(x, b, w, EPS), [wide(3, 5), wide(3, 5, seed=2), wide(5, seed=1)]),
        "rope": (lambda x: rope(x, angle.cos(), angle.sin()), [wide(3, 2, 4)]),
        "swiglu": (swiglu, [wide(3, 6)]),
    }[name]
    assert torch.autograd.gradcheck(fn, inputs)


def test_gradients_are_the_same_bits_every_time():
    x, weight = random(600, 33, dtype=torch.float32).requires_grad_(), random(33, dtype=torch.float32).requires_grad_()
    runs = [torch.autograd.grad(rms_norm(x, weight, EPS).square().sum(), (x, weight)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
