"""The tiled log-prob op against all logits at once, with gradients through both outputs; the loss in one pass."""

import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import InputError, logprob_loss, native, ops
from engine.kernels import linear_logprob as op
from engine.kernels.linear_logprob import (
    TorchTiles,
    TritonTiles,
    linear_logprob,
    linear_logprob_loss,
    linear_logprob_reference,
)
from engine.train.losses import dpo_loss, sft_loss
from engine.tree import Edges


def inputs(rows, dim, vocab, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64) * dim**-0.5
    targets = torch.randint(vocab, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def gradients(fn, hidden, weight, targets, up_logp, up_lse):
    logp, lse = fn(hidden, weight, targets)
    return torch.autograd.grad((logp * up_logp).sum() + (lse * up_lse).sum(), (hidden, weight))


@pytest.mark.parametrize(("rows", "vocab"), [(1, 7), (37, 111), (130, 1000)])
def test_float64_gradients_pass_gradcheck_or_equal_autograd(rows, vocab):
    hidden, weight, targets = inputs(rows, 8, vocab, torch.float64)
    up = torch.randn(2, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    up[0, ::3] = 0.0  # masked rows
    tiled = gradients(lambda *a: linear_logprob(*a, TorchTiles(16 * vocab * 8)), hidden, weight, targets, *up)
    plain = gradients(linear_logprob_reference, hidden, weight, targets, *up)
    for ours, theirs in zip(tiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_gradcheck_in_float64():
    hidden, weight, targets = inputs(5, 4, 9, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_eager_in_the_same_dtype(dtype):
    hidden, weight, targets = inputs(200, 64, 500, dtype)
    exact = linear_logprob_reference(hidden.double(), weight.double(), targets)[0]
    eager = torch.log_softmax((hidden.float() @ weight.float().T), -1).gather(1, targets[:, None]).squeeze(1)
    ours = linear_logprob(hidden, weight, targets, TorchTiles(16 * 500 * 4))[0]
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-7


def test_large_logits_do_not_overflow():
    hidden, weight, targets = inputs(20, 16, 50, torch.float32)
    logp, lse = linear_logprob(hidden * 1e4, weight, targets)
    exact, _ = linear_logprob_reference((hidden * 1e4).double(), weight.double(), targets)
    assert torch.isfinite(lse).all()
    torch.testing.assert_close(logp.double(), exact, rtol=1e-5, atol=1e-2)


def edges_of(rows, targets, seed=5):
    """Two edges for most rows, out of order, in four answers; weights that are not all one."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(rows, (len(targets),), generator=generator)
    weight = torch.rand(len(targets), generator=generator) + 0.5
    return Edges(row, targets, weight, torch.arange(len(targets)) * 4 // len(targets))


LOSSES = {
    "sft": lambda edges: (partial(sft_loss, edges=edges, total_weight=17.0), True),
    "dpo": lambda edges: (
        partial(
            dpo_loss, edges=edges, reference=torch.tensor([[-90.0, -91.0], [-88.0, -99.0]]), beta=0.1, total_pairs=3
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_in_one_pass_has_the_log_probs_of_the_op_bit_for_bit_and_the_gradients_of_autograd(
    name, fits, dtype, monkeypatch
):
    if not fits:
        monkeypatch.setattr(op, "HELD_BYTES", -1)
    hidden, weight, _ = inputs(50, 24, 300, dtype)
    edges = edges_of(50, torch.randint(300, (90,), generator=torch.Generator().manual_seed(1)))
    loss, linear = LOSSES[name](edges)
    value, metrics, logp = logprob_loss(hidden, weight, edges, loss, linear)
    assert torch.equal(logp, ops.token_logprobs(hidden[edges.row], weight, edges.target)[0])
    assert value.item() == pytest.approx(metrics["loss"], rel=1e-6) and metrics == loss(logp)[1]
    found = torch.autograd.grad(-2.5 * value, (hidden, weight))

    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(-2.5 * loss(_exact(*wide, edges))[0], wide)
    theirs = torch.autograd.grad(-2.5 * loss(_exact(hidden, weight, edges))[0], (hidden, weight))
    for mine, exactly, torchs in zip(found, exact, theirs, strict=True):
        bound = 3 * (torchs.double() - exactly).abs().max() + torch.finfo(dtype).eps * exactly.abs().max()
        assert (mine.double() - exactly).abs().max() <= bound


def _exact(hidden, weight, edges):
    return linear_logprob_reference(hidden[edges.row], weight, edges.target)[0]


def test_tiles_of_one_pass_are_those_of_recompute(monkeypatch):
    """Many tiles, and a last one of another size."""
    hidden, weight, targets = inputs(130, 24, 300, torch.float32)
    tiles = TorchTiles(16 * 300 * 4)
    plain = linear_logprob(hidden, weight, targets, tiles)[0]
    for held in (op.HELD_BYTES, -1):
        monkeypatch.setattr(op, "HELD_BYTES", held)
        loss = linear_logprob_loss(hidden, weight, targets, lambda logp: (logp.sum(), None), True, tiles)
        assert torch.equal(loss[2], plain)
        for mine, theirs in zip(
            torch.autograd.grad(loss[0], (hidden, weight)),
            torch.autograd.grad(linear_logprob(hidden, weight, targets, tiles)[0].sum(), (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_size_alone_chooses_the_schedule(monkeypatch):
    """All logits held up to HELD_BYTES (for a linear loss on a CPU GROUP_BYTES); above that one pass for a linear loss and
    recompute for others."""
    used, logprobs, gradients, at_once = [], TorchTiles.logprobs, TorchTiles.gradients, TorchTiles.at_once
    monkeypatch.setattr(
        TorchTiles, "gradients", lambda *a: used.append(f"gradients{' held' * (a[7] is not None)}") or gradients(*a)
    )
    monkeypatch.setattr(TorchTiles, "at_once", lambda *a: used.append("at once") or at_once(*a))
    monkeypatch.setattr(
        TorchTiles, "logprobs", lambda *a: used.append(f"logprobs{' held' * (a[4] is not None)}") or logprobs(*a)
    )
    hidden, weight, targets = inputs(20, 4, 100, torch.float32)
    size, held, again = 20 * 100 * 4, ["logprobs held", "gradients held"], ["logprobs", "gradients"]
    for most, group, linear, expected in (
        (size, size, False, held),
        (size, size - 1, False, held),  # a part that is larger than a group, like one pair
        (size, size, True, held),
        (size, size - 1, True, ["at once", *held]),
        (size - 1, size, True, ["at once", *held]),
        (size - 1, size, False, again),
    ):
        monkeypatch.setattr(op, "HELD_BYTES", most)
        monkeypatch.setattr(op, "GROUP_BYTES", group)
        used.clear()
        linear_logprob_loss(hidden, weight, targets, lambda logp: (logp.sum(), None), linear)[0].backward()
        assert used == expected


TILES = {
    "torch": TorchTiles(16 * 300 * 4),
    "native": native.LogprobTiles(),
    "triton": TritonTiles(16 * 300 * 4, 16, 32),
}
each_tiles = pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)


def parts_of(targets):
    """Three parts of rows that are in no order, one of them twice in a part; each with a loss that is not linear."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(2))
    order[1] = order[0]
    return [(rows, targets[rows], lambda logp: (logp.sigmoid().sum(), len(logp))) for rows in order.split((30, 1, 60))]


@each_tiles
@pytest.mark.parametrize("held", [0, 40, 60], ids=["none", "the small ones", "all"])
def test_losses_of_several_parts_are_their_sum_in_one_dw(tiles, held, monkeypatch):
    monkeypatch.setattr(op, "HELD_BYTES", held * 300 * 4)
    monkeypatch.setattr(native.LogprobTiles, "COLUMNS", 128)
    hidden, weight, targets = inputs(91, 24, 300, torch.float32)
    parts = parts_of(targets)
    value, metrics, logp = op.linear_logprob_losses(hidden, weight, parts, tiles=tiles)
    found = torch.autograd.grad(3.0 * value, (hidden, weight))

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logps = [linear_logprob_reference(exact[0][rows], exact[1], ids)[0] for rows, ids, _ in parts]
    total = sum(loss(logp)[0] for (_, _, loss), logp in zip(parts, logps, strict=True))
    assert metrics == [30, 1, 60] and value.item() == pytest.approx(total.item(), rel=1e-6)
    torch.testing.assert_close(logp.double(), torch.cat(logps), rtol=1e-6, atol=1e-5)
    for mine, theirs in zip(found, torch.autograd.grad(3.0 * total, exact), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


class Products(TorchDispatchMode):
    """Multiplications in torch's products; the native ones are counted where they are called."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        matrices = [x for x in args if isinstance(x, torch.Tensor) and x.dim() == 2]
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = matrices[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def multiplications(run, monkeypatch):
    with Products() as products, monkeypatch.context() as patch:

        def counted(a, b, *rest, product=native.product, **options):
            products.count += a.shape[0] * a.shape[1] * b.shape[1]
            return product(a, b, *rest, **options)

        patch.setattr(native, "product", counted)
        run()
    return products.count


class Peak(TorchDispatchMode):
    """The most bytes of tensors made inside that lived at once."""

    def __init__(self):
        super().__init__()
        self.seen, self.live, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key, size):
        self.seen.discard(key)
        self.live -= size


def extra(rows, vocab, schedule, tiles, dim=8):
    """Bytes besides the gradients, of pairs of 64 rows."""
    hidden, weight, targets = inputs(rows, dim, vocab, torch.float32)
    with Peak() as peak:
        peak.seen.update(x.untyped_storage()._cdata for x in (hidden, weight, targets))
        if schedule == "recompute":
            value = linear_logprob(hidden, weight, targets, tiles)[0].sum()
        else:
            linear = schedule == "sft"
            loss = (lambda logp: (logp.sum(), None)) if linear else (lambda logp: (logp.sigmoid().sum(), None))
            parts = [(ids, targets[ids], loss) for ids in torch.arange(rows).split(rows if linear else 64)]
            value = op.linear_logprob_losses(hidden, weight, parts, linear, tiles)[0]
        value.backward()
    return peak.peak - hidden.nbytes - weight.nbytes


@pytest.mark.parametrize("name", ["torch", "native"])
@pytest.mark.parametrize("schedule", ["pairs", "sft", "recompute"])
def test_memory_grows_with_the_rows_and_with_the_vocabulary_only_up_to_the_tile_budget(name, schedule, monkeypatch):
    """Besides dX and dW, tiles of 64 rows of 4,000 logits: pairs of 64 rows hold that much, however many there are. For
    a row some numbers (its hidden state twice, what is known of it); for twice the vocabulary nothing: a pair that is over
    the budget then is made twice."""
    budget = 64 * 4000 * 4
    monkeypatch.setattr(op, "GROUP_BYTES", budget)
    monkeypatch.setattr(op, "HELD_BYTES", budget)
    monkeypatch.setattr(native.LogprobTiles, "ROW_BYTES", budget)
    monkeypatch.setattr(native.LogprobTiles, "COLUMNS", 128)
    tiles = native.LogprobTiles() if name == "native" else TorchTiles(budget)
    few, many, most = (extra(rows, 4000, schedule, tiles) for rows in (128, 512, 1024))
    a_row = 4 * 128 + 200 if (name, schedule) == ("native", "recompute") else 200  # its tile is all rows x COLUMNS
    assert few <= 1.2 * budget + 128 * a_row
    assert many - few <= 384 * a_row and most - many <= 512 * a_row
    assert extra(512, 8000, schedule, tiles) <= many + 0.1 * budget


SCHEDULES = {  # the loss, whether it is called linear, the limit in rows, and products of all rows, dim and vocab
    "held": (lambda logp: (logp.sigmoid().sum(), None), False, 91, 1),
    "recompute": (lambda logp: (logp.sigmoid().sum(), None), False, 0, 2),
    "at once": (lambda logp: (logp.sum(), None), True, 0, 1),
    "op": (None, False, 0, 2),
}


@pytest.mark.parametrize(
    ("tiles", "schedule"),
    [  # Triton's interpreter takes seconds for each
        pytest.param(tiles, schedule, id=f"{schedule}-{name}", marks=pytest.mark.full if slow else ())
        for name, tiles in TILES.items()
        for schedule in SCHEDULES
        if (slow := name == "triton" and schedule != "recompute") or True
    ],
)
def test_a_gradient_that_is_not_wanted_costs_no_product_and_the_other_keeps_its_bits(tiles, schedule, monkeypatch):
    """A LoRA's head is frozen. No dW: two thirds of the products, or three quarters where logits are made twice."""
    loss, linear, held, logits = SCHEDULES[schedule]
    monkeypatch.setattr(op, "HELD_BYTES", held * 300 * 4)
    monkeypatch.setattr(native.LogprobTiles, "COLUMNS", 128)
    given = inputs(91, 24, 300, torch.float32)

    def run(for_hidden, for_weight):
        hidden, weight, targets = given
        hidden, weight = hidden.detach().requires_grad_(for_hidden), weight.detach().requires_grad_(for_weight)
        if loss is None:
            value = linear_logprob(hidden, weight, targets, tiles)[0].sigmoid().sum()
        else:
            value = linear_logprob_loss(hidden, weight, targets, loss, linear, tiles)[0]
        value.backward()
        return hidden.grad, weight.grad

    one = 91 * 24 * 300
    both = run(True, True)
    again = 300 - tiles.kept(300) if schedule == "at once" and isinstance(tiles, TritonTiles) else 0
    for wanted in ((True, True), (True, False), (False, True)):
        made = one * (logits + sum(wanted)) + (91 * 24 * again if wanted[1] else 0)
        assert multiplications(lambda wanted=wanted: run(*wanted), monkeypatch) == made
        for found, asked, expected in zip(run(*wanted), wanted, both, strict=True):
            if not asked:
                assert found is None
            elif schedule == "at once" and isinstance(tiles, TritonTiles):  # dX is not summed in two parts then
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(found, expected)


def test_rows_that_many_edges_begin_at_get_the_same_gradient_every_time_with_two_threads():
    """Many answers to one prompt: torch's index_put_ adds as its threads come."""
    hidden, weight, _ = inputs(300, 256, 50, torch.float32)
    rows, targets = torch.arange(3000) % 7, torch.arange(3000) % 50
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(8):
            value = op.linear_logprob_losses(hidden, weight, [(rows, targets, lambda x: ((x * x).sum(), None))])[0]
            runs.append(torch.autograd.grad(value, hidden)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(runs[0], run) for run in runs)


def test_a_target_that_is_no_token_is_an_error():
    hidden, weight, targets = inputs(20, 4, 100, torch.float32)
    targets[3] = 100
    for run in (linear_logprob, lambda *a: linear_logprob_loss(*a, lambda logp: (logp.sum(), None))):
        with pytest.raises(RuntimeError, match="out of bounds"):
            run(hidden, weight, targets)


NONE = torch.zeros(0, dtype=torch.int64)


def test_no_edges_give_zero_gradients():
    hidden, weight, _ = inputs(3, 4, 9, torch.float32)
    edges = Edges(NONE, NONE, torch.zeros(0), NONE)
    value, _, logp = logprob_loss(hidden, weight, edges, partial(sft_loss, edges=edges, total_weight=5.0), True)
    value.backward()
    assert len(logp) == 0 and value == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("tiles", [TorchTiles(), TritonTiles(), native.LogprobTiles()], ids=lambda x: type(x).__name__)
def test_no_edges_give_zero_gradients_in_all_tiles_and_schedules(tiles, linear):
    hidden, weight, _ = inputs(3, 4, 9, torch.float32)
    parts = [(NONE, NONE, lambda logp: (logp.sum(), None))] * 2
    value, _, logp = op.linear_logprob_losses(hidden, weight, parts, linear, tiles)
    value.backward()
    assert len(logp) == 0 and value == 0 and not hidden.grad.any() and not weight.grad.any()
    hidden.grad = weight.grad = None
    logp, lse = linear_logprob(hidden[:0], weight, NONE, tiles)
    (logp.sum() + lse.sum()).backward()
    assert len(logp) == 0 and not hidden.grad.any() and not weight.grad.any()
    logp, *gradients = tiles.at_once(hidden.detach()[:0], weight.detach(), NONE, torch.zeros(0))
    assert len(logp) == len(gradients[0]) == 0 and not gradients[1].any()


def test_parts_that_are_none_or_of_which_one_would_overwrite_the_others_gradient_are_errors():
    hidden, weight, targets = inputs(4, 4, 9, torch.float32)
    some, whole = (torch.arange(2), targets[:2], torch.sum), (None, targets, torch.sum)
    for parts, said in (
        ([], "parts is empty"),
        ([some, whole], "one of 2 parts has rows None"),
        ([whole, some], "None"),
    ):
        with pytest.raises(ValueError, match=said):
            op.linear_logprob_losses(hidden, weight, parts)
        with pytest.raises(ValueError, match=said), torch.no_grad():
            op.linear_logprob_losses(hidden, weight, parts)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "said"),
    [
        ((3, 4), (5, 6), [1, 2, 3], r"hidden is \[3, 4\], weight \[5, 6\], targets \[3\]; expected \[N, dim\]"),
        ((3, 4), (5, 4), [1, 2], r"targets \[2\]; expected"),
        ((2, 3, 4), (5, 4), [1, 2], r"hidden is \[2, 3, 4\]"),
        ((3, 4), (5, 4), [1.0, 2.0, 3.0], "targets are torch.float32; expected torch.int64"),
        ((3, 4), (5, 4), [0, 4, 5], "targets hold 5; expected 0 to 4"),
        ((3, 4), (5, 4), [0, -100, 4], "targets hold -100; expected 0 to 4"),
    ],
)
def test_what_does_not_fit_is_named(hidden, weight, targets, said):
    with pytest.raises(InputError, match=said):
        ops.token_logprobs(torch.zeros(hidden), torch.zeros(weight), torch.tensor(targets))


def test_no_rows_are_no_log_probs():
    logp, lse = ops.token_logprobs(torch.zeros(0, 4), torch.zeros(5, 4), torch.zeros(0, dtype=torch.int64))
    assert logp.shape == lse.shape == (0,)
