"""Draws against their torch reference, exact float64 distributions and plain Python; bits against neighbours, threads
and instruction levels; and rules that are refused by name."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine import _C, ops
from engine.kernels.sample import DrawRules, Draws, kept, ragged, sample_reference

LEVELS = _C.instruction_levels()
LEVEL = pytest.mark.parametrize("level", LEVELS)


def rules(rows, vocab, forbidden=(), labels=(), seed=7, **columns):
    """`DrawRules` with one value, or a list of one per row, for each truncation."""

    def column(name, default, dtype):
        value = columns.pop(name, default)
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    result = DrawRules(
        column("temperature", 1.0, torch.float32),
        column("top_k", 0, torch.int64),
        column("top_p", 1.0, torch.float64),
        column("min_p", 0.0, torch.float64),
        torch.full((rows,), seed),
        torch.arange(rows) % 1000,
        torch.arange(rows) // 1000,
        vocab,
        *ragged(forbidden or [()] * rows),
        *ragged(labels or [()] * rows),
    )
    assert not columns
    return result


def take(given, rows):
    """The rules of some rows, in their order."""

    def entries(offsets, ids):
        return ragged([ids[offsets[row] : offsets[row + 1]].tolist() for row in rows])

    columns = [column[rows] for column in given[:7]]
    return DrawRules(*columns, given.vocab, *entries(*given[8:10]), *entries(*given[10:12]))


def native(logits, given, threads=1, level=""):
    rows = len(logits)
    filled = [torch.full((count,), 9.0) for count in (rows, rows, len(given.label_ids))]
    draws = Draws(torch.full((rows,), -1), *filled)
    columns = [value if isinstance(value, int) else value.numpy() for value in given]
    _C.sample(logits.numpy(), *columns, *(x.numpy() for x in draws), threads, level)
    return draws


def same(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaped(kind, rows, vocab, seed=0):
    """Logits of an untrained model, of a trained one, in steps so that many are equal, and of one token that stands out."""
    x = normal(rows, vocab, seed=seed)
    if kind == "flat":
        return x * 0.6
    if kind == "tied":
        return (x * 2).round() / 2
    if kind == "one":
        return x.index_fill(1, torch.tensor([vocab // 2]), 40.0)
    head = torch.randint(0, vocab, (rows, 50), generator=torch.Generator().manual_seed(seed))
    return (x * 2.5).scatter(1, head, 12 - 1.5 * torch.arange(50.0).sqrt() + normal(rows, 50, seed=seed + 1))


def plain_kept(y, top_k, top_p, min_p):
    """Sort by hand, cut by hand."""
    order = sorted(range(len(y)), key=lambda token: (-y[token], token))
    if top_k:
        order = order[:top_k]
    weight = [math.exp(value - max(y)) for value in y]
    total = sum(weight[token] for token in order)
    keep, mass = [], 0.0
    for token in order:
        if top_p < 1 and mass >= top_p * total:
            break
        keep.append(token)
        mass += weight[token]
    return {token for token in keep if weight[token] >= min_p}


def nucleus(logits, given, row=0):
    """Which tokens the reference keeps of a row."""
    allowed = logits[row : row + 1].double()
    one = take(given, [row])
    y = (allowed - allowed.max()) / one.temperature.double()[:, None]
    return kept(allowed, y, one)[0]


# ---- what is drawn ---------------------------------------------------------------------------------------------------

CHOICES = [
    {}, {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9}, {"top_p": 0.999999},
    {"top_p": 1e-9}, {"top_p": 1 - 2**-53}, {"top_k": 1}, {"top_k": 20}, {"top_k": 3, "top_p": 0.5},
    {"top_k": 10**6}, {"top_k": 10**6, "top_p": 0.8}, {"temperature": 2.0, "top_k": 5000, "top_p": 0.7},
    {"min_p": 0.1}, {"min_p": 1.0}, {"min_p": 1e-310}, {"temperature": 0.5, "top_k": 100, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1e-6}, {"temperature": 1e-6, "top_p": 0.9}, {"temperature": 1e-6, "top_k": 7},
    {"temperature": 1e6}, {"temperature": 1e6, "top_p": 0.5}, {"temperature": 1e6, "top_k": 9, "min_p": 0.9},
]  # fmt: skip
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def every_choice(repeat):
    """One row per choice, over and over, each `repeat` times."""
    return {name: [choice.get(name, off) for choice in CHOICES * repeat] for name, off in DEFAULTS.items()}


def agree(result, expected):
    """The ids are the reference's: both compare the same float64 totals. Log-probs are near to its float64."""
    assert torch.equal(result.ids, expected.ids)
    for ours, theirs in zip(result[1:], expected[1:], strict=True):
        assert torch.allclose(ours, theirs, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "vocab"),
    [
        *((kind, vocab) for kind in ("flat", "peaked", "tied", "one") for vocab in (1, 2, 15, 16, 17, 111, 1023)),
        ("peaked", 32000),
        ("tied", 32000),
    ],
)
def test_draws_equal_the_reference(kind, vocab):
    repeat = 1 if vocab == 32000 else 4
    rows = repeat * len(CHOICES)
    logits = shaped(kind, rows, vocab)
    labels = [(vocab - 1, 0, row % vocab, 0)[: row % 5] for row in range(rows)]
    given = rules(rows, vocab, labels=labels, **every_choice(repeat))
    agree(native(logits, given), sample_reference(logits, given))


@pytest.mark.parametrize("vocab", [90, 100, 111])
def test_draws_with_forbidden_ids_and_a_padded_head_equal_the_reference(vocab):
    rows = 8 * len(CHOICES)
    logits = shaped("peaked", rows, 111)
    logits[:, 100:] += 20.0  # padding that is likelier than anything
    generator = torch.Generator().manual_seed(1)
    likely = logits[:, :vocab].argmax(dim=1)
    forbidden = [
        [] if row % 3 == 0 else [int(likely[row]), *torch.randint(0, 111, (row % 60,), generator=generator).tolist()]
        for row in range(rows)
    ]
    given = rules(rows, vocab, forbidden, [[110, 5]] * rows, **every_choice(8))
    result = native(logits, given)
    agree(result, sample_reference(logits, given))
    assert (result.ids < vocab).all()
    assert not any(token in banned for token, banned in zip(result.ids.tolist(), forbidden))
    assert torch.allclose(
        result.labels.view(-1, 2), logits.double().log_softmax(-1)[:, [110, 5]].float(), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("vocab", [3, 111, 4096])
def test_every_draw_is_the_argmax_over_all_tokens(vocab):
    """Noise is worked out only for tokens that can win: none may be passed over, among 2,000 draws from each shape."""
    for kind, choice in (("flat", {}), ("tied", {"temperature": 3.0}), ("peaked", {"temperature": 0.8})):
        logits = shaped(kind, 1, vocab).expand(2000, -1).contiguous() if kind != "flat" else torch.zeros(2000, vocab)
        given = rules(2000, vocab, seed=11, **choice)
        noise = ops.gumbel_noise(given.seeds, given.positions, given.candidates, 0, vocab).double()
        y = (logits.double() - logits.double().amax(1, keepdim=True)) / given.temperature.double()[:, None]
        assert torch.equal(native(logits, given).ids, (y + noise).argmax(1))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([-3.0, -1.5, -1.0, 0.0, 0.3, 0.7, 1.1, 2.0]), min_size=2, max_size=9),
    st.integers(0, 4),
    st.sampled_from([1.0, 0.93, 0.61, 0.23]),
    st.sampled_from([0.0, 0.07, 0.4]),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_what_is_kept_equals_cutting_by_hand(values, top_k, top_p, min_p, temperature):
    """The reference keeps it, and native draws reach every likely token of it and no other."""
    logits = torch.tensor([values]).expand(300, -1).contiguous()
    given = rules(300, len(values), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = plain_kept((logits[0].double() / temperature).tolist(), top_k, top_p, min_p)
    assert set(nucleus(logits, given).nonzero().flatten().tolist()) == expected
    drawn = set(native(logits, given).ids.tolist())
    weight = {token: math.exp((values[token] - max(values)) / temperature) for token in expected}
    assert drawn <= expected
    assert {token for token in expected if weight[token] > 0.1 * sum(weight.values())} <= drawn


@pytest.mark.parametrize("off", [-1e-6, 1e-6])
@pytest.mark.parametrize("upto", [16000, 24000])
def test_the_nucleus_of_a_large_vocabulary_is_cut_at_the_right_token(upto, off):
    """A boundary 5e-11 of the mass away from a token: weights or a top_p in fp32 would cut at another. Up to 16,000 it is
    between the two kinds of tokens, where fp32 looks for it on the wrong side. The log-prob tells how many were kept: each
    is 1e-5 of the mass."""
    logits = torch.zeros(1, 32000)
    logits[0, ::2] = 1.0
    weight = math.exp(-1 / float(np.float32(0.7)))
    size = upto + (off > 0)
    given = rules(1, 32000, temperature=0.7, top_p=(16000 + (upto - 16000) * weight + off) / (16000 + 16000 * weight))
    assert nucleus(logits, given).sum() == size
    draws = native(logits, given)
    likeliest = -math.log(16000 + (size - 16000) * weight)
    expected = likeliest + (0.0 if draws.ids[0] % 2 == 0 else math.log(weight))
    assert draws.sampled.item() == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize("scale, top_p", [(0.5, 0.999), (1.0, 0.9)])
def test_the_last_token_of_a_nucleus_can_be_drawn_and_the_next_cannot(scale, top_p):
    """At positions where their noise is among the largest of a million, so that they win where nothing is cut off."""
    logits = normal(32000, seed=5) * scale
    order = logits.sort(descending=True).indices
    size = int((logits[order].double().softmax(0).cumsum(0) < top_p).sum()) + 1
    edge = order[[size - 1, size]]
    logits[:2], logits[edge] = logits[edge], logits[:2].clone()  # to the ids 0 and 1: little noise to look through
    positions = torch.arange(2**20)
    noise = ops.gumbel_noise(torch.full_like(positions, 7), positions, torch.zeros_like(positions), 0, 2)
    for token in (0, 1):
        given = rules(24, 32000)._replace(positions=noise[:, token].topk(24).indices)
        rows = logits.expand(24, -1).contiguous()
        wins = native(rows, given).ids == token
        assert wins.sum() >= 3
        drawn = native(rows, given._replace(top_p=torch.full((24,), top_p, dtype=torch.float64))).ids == token
        assert drawn[wins].all() if token == 0 else not drawn.any()


def test_a_nucleus_of_equal_tokens_holds_exactly_its_share():
    """The lowest ids, and all of them: -log of their number is the log-prob."""
    logits = torch.full((300, 32000), 0.3)
    for choice, size in (
        ({"top_p": 0.5}, 16000), ({"top_p": 0.9}, 28800), ({"top_p": 1e-9}, 1), ({}, 32000), ({"top_k": 777}, 777),
        ({"top_k": 31999}, 31999), ({"top_k": 1000, "top_p": 0.25}, 250), ({"min_p": 1.0}, 32000),
        ({"top_p": 1 - 2**-53}, 32000),
    ):  # fmt: skip
        rows = 2 if choice else 300
        draws = native(logits[:rows], rules(rows, 32000, **choice))
        assert draws.ids.max() < size
        assert torch.allclose(draws.sampled, torch.tensor(-math.log(size)), atol=1e-5, rtol=0)
        assert torch.allclose(draws.raw, torch.tensor(-math.log(32000)), atol=1e-5, rtol=0)


@LEVEL
def test_top_k_and_top_p_cut_ties_by_id_wherever_the_edge_lies(level):
    """A vocabulary of several vectors with four likelier tokens: the edge at every lane."""
    logits = torch.zeros(1, 50)
    logits[0, [3, 17, 33, 49]] = 1.0
    order = [3, 17, 33, 49, *(token for token in range(50) if token not in (3, 17, 33, 49))]
    for size in range(1, 51):
        inside = set(order[:size])
        mass = 4 * math.e + 46
        share = (sum(math.exp(logits[0, token]) for token in inside) - 0.5) / mass
        for choice in ({"top_k": size}, {"top_p": share}):
            drawn = native(logits.expand(200, -1).contiguous(), rules(200, 50, temperature=1.0, **choice), level=level)
            assert set(drawn.ids.tolist()) <= inside
            rest = sum(math.exp(logits[0, token]) for token in inside)
            assert torch.allclose(drawn.sampled, logits[0, drawn.ids] - math.log(rest), atol=2e-6)


# ---- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [111, 32000])
@pytest.mark.parametrize(
    "choice",
    [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20}, {"min_p": 0.02}, {"temperature": 1.9, "top_k": 50, "top_p": 0.8}],
)  # fmt: skip
def test_frequencies_follow_the_exact_distribution_and_stay_inside_the_nucleus(vocab, choice):
    draws = 4000 if vocab == 32000 else 50_000
    logits = normal(1, vocab, seed=1) * 3
    given = rules(draws, vocab, seed=2024, **choice)
    inside = nucleus(logits, given)
    exact = (logits[0].double() / given.temperature[0].double()).softmax(0) * inside
    exact = exact / exact.sum()
    result = native(logits.expand(draws, -1).contiguous(), given, threads=2)
    assert inside[result.ids].all()
    assert torch.allclose(result.sampled, exact[result.ids].log().float(), rtol=2e-6, atol=2e-6)

    observed = torch.bincount(result.ids, minlength=vocab).double()
    expected = exact * draws
    often = expected >= 5  # where the approximation holds; all others together
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1] * observed[:-1].sum() / expected[:-1].sum()
    assert len(expected) >= 5
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_draws_lie_in_the_float64_nucleus(top_p):
    """With 1e-9 of mass for rounding at the boundary, at temperatures that are no power of two."""
    for row, temperature in enumerate((0.3, 0.7, 1.0, 1.9)):
        logits = normal(1, 32000, seed=row) * 2
        draws = native(logits.expand(250, -1).contiguous(), rules(250, 32000, temperature=temperature, top_p=top_p))
        mass = (logits[0].double() / float(np.float32(temperature))).softmax(0)
        order = mass.sort(descending=True)
        before = torch.zeros_like(mass).scatter(0, order.indices, order.values.cumsum(0) - order.values)
        assert (before[draws.ids] <= top_p + 1e-9).all()


# ---- special rows ----------------------------------------------------------------------------------------------------


@LEVEL
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 49])
def test_a_row_that_is_no_distribution_has_nan_log_probs_and_leaves_the_others_alone(place, bad, temperature, level):
    logits = normal(3, 50)
    given = rules(3, 48, labels=[[1, 2], [3], [4]], temperature=temperature, top_p=0.9)
    plain = native(logits, given, level=level)
    logits[1, place] = bad
    broken = native(logits, given, level=level)
    assert broken.raw[1].isnan() and broken.sampled[1].isnan() and broken.labels[2].isnan() and broken.ids[1] == 0
    for a, b in zip(plain[:3], broken[:3]):
        assert torch.equal(a[::2], b[::2])
    assert torch.equal(plain.labels[[0, 1, 3]], broken.labels[[0, 1, 3]])
    agree(broken, sample_reference(logits, given))


def test_a_row_of_which_nothing_can_be_drawn_has_nan_log_probs():
    logits = normal(4, 20)
    logits[0] = -math.inf
    logits[1, :18] = -math.inf
    given = rules(4, 18, [[], [], range(18), range(17)], [[3]] * 4)
    draws = native(logits, given)
    assert draws.raw.isnan().tolist() == draws.labels.isnan().tolist() == [True, True, True, False]
    assert draws.ids[3] == 17 and draws.sampled[3] == 0.0
    agree(draws, sample_reference(logits, given))


def test_special_rows():
    one_hot = torch.full((1, 50), -1e9)
    one_hot[0, 33] = 0.0
    some = torch.full((1, 50), -math.inf)
    some[0, [7, 20, 41]] = torch.tensor([-1e38, -1e38, -3e38])
    for choice in ({}, {"top_p": 0.01}, {"min_p": 1.0}, {"top_k": 1}, {"top_k": 40}, {"top_k": 5, "top_p": 0.99}):
        draws = native(one_hot, rules(1, 50, **choice))
        assert draws.ids.item() == 33 and draws.raw.item() == draws.sampled.item() == 0.0
        many = some.expand(100, -1).contiguous()
        agree(native(many, rules(100, 50, **choice)), sample_reference(many, rules(100, 50, **choice)))
    assert native(torch.zeros(1, 50), rules(1, 50, temperature=0.0)).ids.item() == 0  # the lowest id
    tops = torch.zeros(50, 50).fill_diagonal_(1.0)
    assert torch.equal(native(tops, rules(50, 50, temperature=0.0)).ids, torch.arange(50))


def test_the_ends_of_the_range_of_temperatures():
    logits = torch.tensor([[-3e4, 2e4, 1e4, 3e4]])
    draws = native(logits, rules(1, 4, temperature=1e-6, top_p=0.9))
    assert draws.ids.item() == 3 and draws.raw.item() == draws.sampled.item() == 0.0
    hot = native(normal(3000, 3), rules(3000, 3, temperature=1e6))
    assert torch.allclose(hot.sampled, torch.tensor(-math.log(3)), atol=1e-5)
    assert (torch.bincount(hot.ids, minlength=3) > 800).all()


def test_forbidden_ids_do_not_touch_the_raw_log_prob():
    logits = torch.tensor([[0.0, 5.0, 1.0]]).repeat(64, 1)
    draws = native(logits, rules(64, 3, [[1], []] * 32))
    assert 1 not in draws.ids[::2] and (draws.ids[1::2] == 1).any()
    assert torch.allclose(draws.raw, logits.log_softmax(-1).gather(1, draws.ids[:, None])[:, 0], atol=1e-6)
    cut = torch.log_softmax(torch.tensor([0.0, -math.inf, 1.0]), 0)
    assert torch.allclose(draws.sampled[::2], cut[draws.ids[::2]], atol=1e-6)


def test_log_probs_are_near_to_float64_for_logits_of_any_size():
    for scale in (0.01, 1.0, 5.0, 100.0, 1e4):
        logits = normal(8, 32000, seed=3) * scale + 10 * scale
        given = rules(8, 32000, labels=[range(0, 32000, 31)] * 8, temperature=0.9)
        draws = native(logits, given)
        truth = logits.double().log_softmax(-1)
        assert torch.allclose(draws.labels.view(8, -1).double(), truth[:, ::31], rtol=2e-6, atol=2e-6)
        tempered = (logits.double() / float(np.float32(0.9))).log_softmax(-1).gather(1, draws.ids[:, None])[:, 0]
        assert torch.allclose(draws.sampled.double(), tempered, rtol=2e-6, atol=2e-6)


def test_no_rows_are_no_error():
    assert native(torch.zeros(0, 5), rules(0, 5)).ids.shape == (0,)


# ---- bits ------------------------------------------------------------------------------------------------------------


def mixed(rows, vocab):
    """Rows of every shape and choice, with forbidden ids and labels."""
    logits = torch.cat([shaped(kind, rows // 4, vocab, seed=3) for kind in ("flat", "peaked", "tied", "one")])
    logits[rows // 2, 5] = math.nan
    repeat = rows // len(CHOICES) + 1
    columns = {name: values[:rows] for name, values in every_choice(repeat).items()}
    forbidden = [range(row % 7) if row % 3 else () for row in range(rows)]
    return logits, rules(rows, vocab, forbidden, [range(row % 4) for row in range(rows)], **columns)


@pytest.mark.parametrize("vocab", [7, 111, 32000])
def test_draws_have_the_same_bits_at_every_level(vocab):
    logits, given = mixed(72, vocab)
    for level in LEVELS[1:]:
        assert same(native(logits, given, level=level), native(logits, given))


@LEVEL
@pytest.mark.parametrize("vocab", [7, 111, 4099])
def test_a_row_is_the_same_alone_and_anywhere_in_a_batch(vocab, level):
    logits, given = mixed(132, vocab)
    batch = native(logits, given, level=level)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(3)).tolist()
    for threads in (1, 2, 3, 8):
        moved = native(logits[order], take(given, order), threads, level)
        assert same(moved[:3], [x[order] for x in batch[:3]])
    for row in range(0, 132, 5):
        alone = native(logits[[row]], take(given, [row]), 2, level)
        labels = batch.labels[given.label_offsets[row] : given.label_offsets[row + 1]]
        assert same(alone, [*(x[[row]] for x in batch[:3]), labels])


# ---- the op ----------------------------------------------------------------------------------------------------------


def test_the_op_is_native_on_the_cpu_and_both_backends_agree():
    assert ops.choose("sample_rows", "cpu").name == "native" and ops.choose("sample_rows", "cuda").name == "triton"
    logits, given = mixed(72, 111)
    agree(ops.sample_rows(logits, given, threads=2), ops.OPS["sample_rows"][-1].fn(logits, given, 2))
    assert ops.DrawRules is DrawRules and isinstance(ops.sample_rows(logits, given), ops.Draws)


def test_ragged_holds_every_row_in_its_place():
    offsets, ids = ops.ragged([[3, 1], [], (2,)])
    assert offsets.tolist() == [0, 2, 2, 3] and ids.tolist() == [3, 1, 2] and ids.dtype == torch.int64
    offsets, ids = ops.ragged([])
    assert offsets.tolist() == [0] and ids.dtype == offsets.dtype == torch.int64


def arguments():
    given = [value if isinstance(value, int) else value.numpy() for value in rules(2, 5, [[1], [2, 4]], [[0], [3]])]
    names = [*DrawRules._fields, *Draws._fields]
    outputs = [np.zeros(2, np.int64), *(np.zeros(2, np.float32) for _ in range(3))]
    return {"logits": np.zeros((2, 5), np.float32), **dict(zip(names, [*given, *outputs], strict=True)), "threads": 1}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", np.zeros((2, 5)), "logits has dtype float64; expected float32"),
        ("logits", np.zeros((5, 2), np.float32).T, "logits has strides .* expected a C-contiguous array"),
        ("logits", np.zeros((2, 0), np.float32), r"logits has shape \[2, 0\]; expected 1 to"),
        ("temperature", np.array([1.0, -0.5], np.float32), r"temperature\[1\] is -0.5; expected 0 \(greedy\)"),
        ("temperature", np.array([math.nan, 1.0], np.float32), r"temperature\[0\] is nan"),
        ("temperature", np.array([1.0, math.inf], np.float32), r"temperature\[1\] is inf"),
        ("top_k", np.array([0, -1]), r"top_k\[1\] is -1; expected 0 \(off\) or more"),
        ("top_p", np.array([0.0, 1.0]), r"top_p\[0\] is 0.0; expected above 0 and at most 1"),
        ("top_p", np.array([1.0, 1.5]), r"top_p\[1\] is 1.5"),
        ("top_p", np.array([1.0, math.nan]), r"top_p\[1\] is nan"),
        ("min_p", np.array([0.0, 2.0]), r"min_p\[1\] is 2.0; expected 0 \(off\) to 1"),
        ("min_p", np.array([math.nan, 0.0]), r"min_p\[0\] is nan"),
        ("seeds", np.zeros(3, np.int64), r"seeds has shape \[3\]; expected \[2\]"),
        ("positions", np.array([0, 2**32]), r"positions\[1\] is 4294967296; expected 0 or more and below 2\^32"),
        ("candidates", np.array([-1, 0]), r"candidates\[0\] is -1"),
        ("vocab", 0, "vocab is 0; expected 1 to 5, the columns of logits"),
        ("vocab", 6, "vocab is 6"),
        ("forbidden", np.array([1, 5, 2]), r"forbidden\[1\] is 5; expected 0 or more and below 5"),
        ("forbidden", np.array([1, 2]), r"forbidden_offsets\[2\] is 3; expected 2, the length of forbidden"),
        ("forbidden_offsets", np.array([0, 4, 3]), r"forbidden_offsets\[2\] is 3; expected at least 4, the one before"),
        ("forbidden_offsets", np.array([1, 1, 3]), r"forbidden_offsets\[0\] is 1; expected 0"),
        ("forbidden_offsets", np.array([0, 3]), r"forbidden_offsets has shape \[2\]; expected \[3\]"),
        ("label_ids", np.array([0, -1]), r"label_ids\[1\] is -1; expected 0 or more and below 5"),
        ("label_offsets", np.array([0, 1, 1]), r"label_offsets\[2\] is 1; expected 2, the length of label_ids"),
        ("labels", np.zeros(3, np.float32), r"labels has shape \[3\]; expected \[2\]"),
        ("threads", 0, "threads is 0; expected at least 1"),
        ("level", "sse9", "level is 'sse9'; this CPU runs .*portable"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(name, value, message):
    _C.sample(**arguments())
    with pytest.raises(ValueError, match=message):
        _C.sample(**(arguments() | {name: value}))


@pytest.mark.parametrize("name", Draws._fields)
def test_outputs_are_writeable_and_share_no_memory(name):
    given = arguments()
    given[name].flags.writeable = False
    with pytest.raises(ValueError, match=f"{name} is read-only"):
        _C.sample(**given)
    given = arguments()
    source = "top_k" if name == "ids" else "temperature"
    given[source] = given[name]
    if source == "temperature":
        given[source][:] = 1.0
    with pytest.raises(ValueError, match=f"{name} shares memory with {source}"):
        _C.sample(**given)
    if name in ("sampled", "labels"):
        given = arguments()
        given[name] = given["raw"]
        with pytest.raises(ValueError, match=f"{name} shares memory with raw"):
            _C.sample(**given)
