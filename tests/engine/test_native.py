"""The trainer's native kernels: values and gradients against float64, odd shapes, levels, threads, bad input."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import engine._C as _C
from engine import Llama, LlamaConfig, native, ops
from engine.kernels.linear_logprob import linear_logprob, linear_logprob_loss, linear_logprob_reference
from engine.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from engine.kernels.rope import rope_reference
from engine.kernels.swiglu import swiglu_reference
from engine.kernels.tree_attention import tree_attention_reference
from engine.train.trainer import pack_logprobs
from engine.tree import TokenTree
from tests.kernels.yardstick import POISON, check, gradients, within

LEVELS = _C.instruction_levels()
DIMS = (1, 7, 16, 127, 768)


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def packed_end(*trees):
    """`end` of a pack: a tree is a number of tokens, or (prompt, [answers])."""
    made = []
    for tree in trees:
        prompt, answers = tree if isinstance(tree, tuple) else (tree, [])
        made.append(TokenTree([0] * prompt, children=tuple(TokenTree([0] * answer) for answer in answers)))
    (pack,) = TokenTree.pack(made, 1 << 20)
    return pack.end


PACKS = {
    "short trees": packed_end(3, 1, (2, [1, 3]), 5),
    "a tile and one": packed_end(64, 65),
    "pairs": packed_end((70, [40, 33]), (10, [70, 130]), 90),
    "shared rubric": packed_end((129, [1, 64, 17, 63, 65])),
}


@pytest.mark.parametrize("rows, depth, columns", [(1, 1, 1), (2, 7, 65), (5, 257, 63), (61, 64, 130), (300, 513, 70)])
def test_dense_and_its_gradients(rows, depth, columns):
    check(native.dense, F.linear, [random(rows, depth), random(columns, depth)])


@pytest.mark.parametrize(
    "rows, depth, columns", [(5, 4200, 130), (600, 70, 1100), (7, 2049, 1030), (1100, 2100, 70), (513, 4097, 65)]
)  # a transposed x of the last two has more rows than are packed at a time
def test_products_have_the_samplers_bits_in_every_layout_and_blocks_change_none(rows, depth, columns):
    x, weight = random(rows, depth), random(columns, depth)
    expected = ops.linear(x, ops.pack_linear(weight))
    for a in (x, x.T.contiguous().T):
        for b in (weight.T, weight.T.contiguous()):
            assert torch.equal(native.product(a, b), expected)


def test_no_rows_and_no_tokens_have_empty_results_and_zero_gradients():
    x, weight = random(0, 5).requires_grad_(), random(3, 5).requires_grad_()
    y = native.dense(x, weight)
    y.sum().backward()
    assert y.shape == (0, 3) and x.grad.shape == (0, 5) and not weight.grad.any() and weight.grad.shape == (3, 5)
    assert torch.equal(native.product(random(2, 0), random(0, 3), torch.ones(2, 3), add=True), torch.ones(2, 3))
    end = torch.zeros(0, dtype=torch.int64)
    q, k, v = (random(0, heads, 8).requires_grad_() for heads in (4, 2, 2))
    out = native.tree_attention(q, k, v, end, native.windows(end))
    out.sum().backward()
    assert native.windows(end).tolist() == [0] and out.shape == q.grad.shape == (0, 4, 8) and k.grad.shape == (0, 2, 8)


def test_memory_that_attention_does_not_get_is_an_error_not_the_end():
    """It asks for 100 MB a thread here, when 50 are left, before any thread works."""
    code = """if True:
        import resource
        import torch
        from engine import native
        torch.set_num_threads(2)
        n = 200_000
        q, end = torch.zeros(n, 2, 1), torch.full((n,), n)
        bounds = native.windows(end)
        few, small = q[:900], torch.full((900,), 900)
        native.tree_attention(few, few, few, small, native.windows(small))  # starts the thread, whose stack is memory too
        taken = int(next(x for x in open("/proc/self/status") if x.startswith("VmSize")).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (taken + (50 << 20),) * 2)
        try:
            native.tree_attention(q, q, q, end, bounds)
        except MemoryError:
            print("no memory")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no memory\n"), done.stderr


def test_dense_gives_only_the_gradients_that_are_asked_for():
    x, weight = random(5, 8), random(3, 8).requires_grad_()
    native.dense(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None
    x, weight = random(5, 8).requires_grad_(), random(3, 8)
    native.dense(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("dim", (2, *DIMS[1:]))  # a single feature has no gradient but what cancels
@pytest.mark.parametrize("rows", (0, 1, 70, 130))
def test_rms_norm_and_its_gradients(rows, dim):
    x, branch, weight = random(rows, dim), random(rows, dim, seed=1), random(dim)
    check(lambda *given: native.rms_norm(*given, 1e-5), lambda *given: rms_norm_reference(*given, 1e-5), [x, weight])
    given = [x, branch, weight]
    check(
        lambda *given: native.add_rms_norm(*given, 1e-5),
        lambda *given: add_rms_norm_reference(*given, 1e-5),
        given,
        outputs=2,
    )


def test_a_sum_whose_norm_is_not_used_has_its_own_gradient():
    x, branch, weight = (y.requires_grad_() for y in (random(3, 8), random(3, 8, seed=1), random(8)))
    native.add_rms_norm(x, branch, weight, 1e-5)[0].mul(2.0).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 8), 2.0)) and torch.equal(branch.grad, x.grad) and weight.grad is None


@pytest.mark.parametrize("ffn", DIMS)
@pytest.mark.parametrize("rows", (0, 1, 33))
def test_swiglu_and_its_gradient(rows, ffn):
    check(native.swiglu, swiglu_reference, [random(rows, 2 * ffn, scale=3.0)])


def test_swiglu_of_huge_gates_has_finite_gradients():
    gate_up = torch.tensor([[-200.0, 200.0, -88.0, 88.0, 1.0, 1.0, 1.0, 1.0]]).requires_grad_()
    native.swiglu(gate_up).sum().backward()
    assert torch.isfinite(gate_up.grad).all()


@pytest.mark.parametrize("dim", (2, 6, 48, 64, 130))
def test_rope_of_rows_that_lie_apart(dim):
    qkv = random(9, 5, dim)
    angle = random(9, dim // 2)
    cos, sin = angle.cos(), angle.sin()
    for part in (qkv, qkv[:, :2], qkv[:, 3:]):
        check(lambda x: native.rope(x, cos, sin), lambda x: rope_reference(x, cos, sin), [part])


@pytest.mark.parametrize("dim", (1, 16, 48, 64, 80, 128, 130))
@pytest.mark.parametrize("name", PACKS)
def test_tree_attention_and_its_gradients(name, dim):
    end = PACKS[name]
    heads, groups = (4, 2) if dim in (16, 64) else (2, 2) if dim == 48 else (3, 1)
    q, k, v = random(len(end), heads, dim), random(len(end), groups, dim, seed=1), random(len(end), groups, dim, seed=2)
    bounds = native.windows(end)
    check(
        lambda q, k, v: native.tree_attention(q, k, v, end, bounds),
        lambda q, k, v: tree_attention_reference(q, k, v, end),
        [q * 2, k, v],
    )


def test_a_token_alone_gets_its_value():
    end, v = packed_end(1), random(1, 2, 80)
    assert torch.equal(native.tree_attention(random(1, 4, 80), v, v, end, native.windows(end)), v[:, [0, 0, 1, 1]])


def test_windows_are_cut_where_nobody_sees_across():
    assert native.windows(packed_end(3, (2, [1, 3]), 1)).tolist() == [0, 3, 9, 10]


def test_a_tree_has_the_same_bits_in_any_pack():
    tree, others = (70, [40, 33]), (65, (3, [2, 2]), 20)
    end = packed_end(tree)
    n = len(end)
    q, k, v = random(n, 4, 64), random(n, 2, 64, seed=1), random(n, 2, 64, seed=2)
    alone = gradients(
        lambda *x: native.tree_attention(*x, end, native.windows(end)), [q, k, v], [random(n, 4, 64, seed=3)]
    )
    wide_end = packed_end(*others, tree, *others)
    before = len(packed_end(*others))
    total = len(wide_end)

    def around(x):
        wide = random(total, *x.shape[1:], seed=9)
        wide[before : before + n] = x
        return wide

    given, upstream = [around(x) for x in (q, k, v)], [around(random(n, 4, 64, seed=3))]
    packed = gradients(lambda *x: native.tree_attention(*x, wide_end, native.windows(wide_end)), given, upstream)
    for mine, theirs in zip([*alone[0], *alone[1]], [*packed[0], *packed[1]], strict=True):
        assert torch.equal(mine, theirs[before : before + n])


@pytest.mark.parametrize("vocab", (1, 7, 63, 1025, 5000))  # the last one: three tiles
def test_logprobs_and_their_gradients(vocab):
    tiles = native.LogprobTiles()
    hidden, weight = random(50, 24), random(vocab, 24)
    targets = torch.randint(vocab, (50,), generator=torch.Generator().manual_seed(0))
    check(
        lambda h, w: linear_logprob(h, w, targets, tiles),
        lambda h, w: linear_logprob_reference(h, w, targets),
        [hidden, weight],
        outputs=2,
    )


@pytest.mark.parametrize("linear", (False, True))
@pytest.mark.parametrize("held", (False, True))
def test_both_schedules_give_the_same_logp_bit_for_bit_and_the_same_gradients(monkeypatch, linear, held):
    if not held:
        monkeypatch.setattr("engine.kernels.linear_logprob.HELD_BYTES", 0)
    monkeypatch.setattr(native.LogprobTiles, "COLUMNS", 128)
    monkeypatch.setattr(native.LogprobTiles, "ROW_BYTES", 20 * 300 * 4)
    tiles = native.LogprobTiles()
    hidden, weight = random(50, 24), random(300, 24)
    targets = torch.randint(300, (50,), generator=torch.Generator().manual_seed(0))
    slope = random(50)

    def one_pass(h, w):
        loss = linear_logprob_loss(h, w, targets, lambda logp: ((logp * slope).sum(), None), linear, tiles)
        return loss[0], loss[2]

    def recompute(h, w):
        logp = linear_logprob(h, w, targets, tiles)[0]
        return (logp * slope).sum(), logp.detach()

    found, expected = ([x.detach().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    values = one_pass(*found), recompute(*expected)
    values[0][0].backward()
    values[1][0].backward()
    assert torch.equal(values[0][1], values[1][1])
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_logprob_of_infinities_is_torchs():
    inf = torch.inf
    logits = torch.tensor([[inf, 0.0, 1.0], [0.0, -inf, inf], [-inf, -inf, 0.0], [-inf] * 3, [3e38, 0.0, -3e38]])
    targets = torch.tensor([1, 0, 2, 0, 0])
    best, hit, total = torch.full((5,), -inf), torch.full((5,), torch.nan), torch.zeros(5, dtype=torch.float64)
    for first in (0, 2):
        tile = logits[:, first : first + 2]
        _C.logprob(tile.numpy(), targets.numpy(), first, best.numpy(), total.numpy(), hit.numpy(), 1)
    lse = torch.where(best.isinf(), 0.0, best).double() + total.log()
    assert torch.equal(lse.float(), torch.logsumexp(logits, dim=1))
    assert torch.equal(hit, logits.gather(1, targets[:, None]).squeeze(1))


def test_a_target_that_is_no_token_has_no_logprob():
    logp, lse = native.LogprobTiles().logprobs(random(3, 4), random(5, 4), torch.tensor([4, 5, -1]))
    assert logp.isnan().tolist() == [False, True, True] and not lse.isnan().any()


def kernels(level, threads):
    """Every kernel's results at one instruction level and number of threads."""
    out = []

    def new(*shape):
        out.append(np.full(shape, np.nan, np.float32))
        return out[-1]

    x, w, dy = (y.numpy() for y in (random(130, 300), random(70, 300), random(130, 70)))
    _C.product(x, w.T, new(130, 70), False, threads, level)
    _C.product(dy, w, new(130, 300), False, threads, level)
    _C.product(dy.T, x, new(70, 300), False, threads, level)
    weight = random(300).numpy()
    for dsum in (None, x[::-1].copy()):
        _C.rms_norm_gradient(x, weight, 1e-5, x[:, ::-1].copy(), dsum, new(130, 300), new(300), threads, level)
    _C.swiglu_gradient(x, x[:, :150].copy(), new(130, 300), threads, level)
    angle = random(130, 25)
    for back in (False, True):
        cos, sin = angle.cos().numpy(), angle.sin().numpy()
        _C.rope(x.reshape(130, 6, 50)[:, 1:4], cos, sin, new(130, 3, 50), back, threads, level)
    targets = np.arange(130) * 2
    best, total, hit = np.full(130, -np.inf, np.float32), np.zeros(130), np.zeros(130, np.float32)
    for first in (0, 300):
        _C.logprob(x, targets, first, best, total, hit, threads, level)
    logits = x.copy()
    _C.logprob_gradient(logits, targets, 0, best, weight[:130].copy(), weight[130:260].copy(), threads, level)
    out.extend((best, total, hit, logits))
    end = packed_end((70, [20, 11]), 29)
    q, k, v = (random(130, heads, 70, seed=heads).numpy() for heads in (4, 2, 2))
    given = q, k, v, end.numpy(), native.windows(end)
    attended, lse = new(130, 4, 70), new(4, 130)
    _C.tree_attention(*given, attended, lse, threads, level)
    dq, dk, dv = new(130, 4, 70), new(130, 2, 70), new(130, 2, 70)
    _C.tree_attention_gradient(*given, attended, lse, q[::-1].copy(), dq, dk, dv, threads, level)
    return out


def test_levels_and_threads_change_no_bit():
    _C.share_little(True)
    try:
        expected = kernels("portable", 1)
        assert all(np.isfinite(x).all() for x in expected)
        for level in LEVELS:
            for threads in (1, 2, 3):
                for mine, theirs in zip(kernels(level, threads), expected, strict=True):
                    assert np.array_equal(mine, theirs), (level, threads)
    finally:
        _C.share_little(False)


def test_a_product_is_added_to_what_is_there_and_writes_nothing_beside_it():
    a, b = random(70, 9), random(9, 65)
    place = torch.full((70, 80), POISON)
    out = place[:, 3:68]
    native.product(a, b, out.fill_(1.0), add=True)
    within(out, 1.0 + a.double() @ b.double(), 1.0 + a @ b)
    assert place[:, :3].isnan().all() and place[:, 68:].isnan().all()


def test_results_are_the_same_with_and_without_gradients():
    x, weight = random(20, 32), random(48, 32).requires_grad_()
    with torch.no_grad():
        without = native.dense(x, weight)
    assert torch.equal(native.dense(x, weight).detach(), without)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: _C.product(f(3, 4), f(5, 6), f(3, 6), False, 1), r"b has shape \[5, 6\]; expected \[4, -1\]"),
        (lambda: _C.product(f(3, 4)[:, ::2], f(2, 6), f(3, 6), False, 1), "a has strides"),
        (lambda: _C.product(f(3, 4), f(4, 6), f(6, 3).T, False, 1), "out has strides"),
        (lambda: _C.product(*same(4), False, 1), "out shares memory with a"),
        (lambda: _C.product(f(3, 4), f(4, 6), f(3, 6), False, 0), "threads is 0"),
        (lambda: _C.rope(f(3, 1, 3), f(3, 1), f(3, 1), f(3, 1, 3), False, 1), "even last dimension"),
        (lambda: _C.logprob(f(2, 3), np.array([0]), 0, f(2), np.zeros(2), f(2), 1), r"targets has shape \[1\]"),
        (lambda: _C.logprob(f(2, 3), np.array([0, 1]), 0, f(2), f(2), f(2), 1), "total has dtype float32"),
        (lambda: trees(end=[2, 3], bounds=[0, 2]), r"end\[1\] is 3; expected behind the token and at most 2"),
        (lambda: trees(end=[1, 2], bounds=[0, 1]), "bounds"),
        (lambda: trees(end=[2, 2], bounds=[0, 1, 2]), r"end\[0\] is 2"),
        (lambda: trees(end=[1, 2], bounds=[0, 2, 2]), r"bounds\[2\] is 2"),
        (lambda: trees(end=[2, 2], bounds=[0, 2], heads=3), "heads a multiple of the 2 of k"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def f(*shape):
    return np.zeros(shape, np.float32)


def same(n):
    x = f(n, n)
    return x, f(n, n), x


def trees(end, bounds, heads=2):
    ints = np.array(end, np.int64), np.array(bounds, np.int64)
    return _C.tree_attention(f(2, heads, 4), f(2, 2, 4), f(2, 2, 4), *ints, f(2, heads, 4), f(heads, 2), 1)


@pytest.fixture
def fresh_choice(monkeypatch):
    """Choices of backends are remembered; they are forgotten around a test that sets SELFREWARD_BACKEND."""
    monkeypatch.delenv("SELFREWARD_BACKEND", raising=False)
    ops.choose.cache_clear()
    yield monkeypatch
    ops.choose.cache_clear()


TRAINING = ("dense", "rms_norm", "add_rms_norm", "rope", "swiglu", "tree_attention")
LOGPROBS = ("linear_logprob", "linear_logprob_loss")


def test_the_trainer_computes_natively_in_fp32_and_by_torch_in_other_dtypes_or_where_it_is_asked_for(fresh_choice):
    for op in (*TRAINING, *LOGPROBS):
        assert ops.choose(op, "cpu").name == "native"
        for dtype in (torch.float64, torch.bfloat16):
            assert ops.choose(op, "cpu", dtype).name == "torch"
    fresh_choice.setenv("SELFREWARD_BACKEND", "torch")
    ops.choose.cache_clear()
    assert {ops.choose(op, "cpu").name for op in (*TRAINING, *LOGPROBS)} == {"torch"}


def test_a_models_logprobs_and_gradients_are_those_of_float64(fresh_choice):
    config = LlamaConfig(48, 2, 4, 2, 12, 80, vocab_size=300, max_seq_len=128)
    model = Llama(config).init_weights(seed=0, std=0.1)
    trees = [
        TokenTree(ids(70), children=(TokenTree(ids(9, 1), 1.0, 0), TokenTree(ids(20, 2), 1.0, 1))),
        TokenTree(ids(30, 3), 1.0, 2),
    ]
    (pack,) = TokenTree.pack(trees, 1000)
    slope = random(len(pack.edges))

    def logps_and_gradients(dtype):
        ops.choose.cache_clear()
        other = Llama(config, dtype=dtype)
        other.load_state_dict(model.state_dict())
        logp = pack_logprobs(other, pack)
        (logp * slope.to(logp.dtype)).sum().backward()
        return [logp.detach(), *(p.grad for p in other.parameters())]

    mine, exact = logps_and_gradients(torch.float32), logps_and_gradients(torch.float64)
    fresh_choice.setenv("SELFREWARD_BACKEND", "torch")
    for found, truth, theirs in zip(mine, exact, logps_and_gradients(torch.float32), strict=True):
        within(found, truth, theirs, factor=3.0)


def ids(count, seed=0):
    return torch.randint(300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
